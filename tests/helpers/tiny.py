"""Small models and tokenizers for tests: random weights, exact vocabularies, no downloads."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[3] / "shared"  # sample data and a small trained model, if available
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no sample data and models: expected the folder {SHARED}"
)
EOS, PAD, BOS = "</s>", "<pad>", "<s>"


def tiny_tokenizer(pieces: Sequence[str] = "abc") -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per piece in this order, then EOS and PAD.

    Texts must be sequences of pieces; they are split greedily into the longest ones.
    """
    vocabulary = {piece: index for index, piece in enumerate([*pieces, EOS, PAD])}
    longest_first = sorted(map(re.escape, pieces), key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, then EOS, PAD and BOS; non-ASCII characters have several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, EOS, PAD, BOS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, bos_token=BOS)


def tiny_model(
    vocab: int,
    seed: int,
    layers: int = 1,
    hidden: int = 16,
    dtype: torch.dtype = torch.float32,
    extra_rows: int = 0,
    eos_token_id: int | None = None,
) -> LlamaForCausalLM:
    """Make a Llama with random weights whose next-token distribution depends on the context.

    Logits have a standard deviation of about 1.5, so the distribution is neither flat nor peaked.

    Args:
        vocab: Number of ordinary vocabulary rows.
        seed: Seed of the weights, which do not depend on extra_rows.
        layers: Number of layers.
        hidden: Hidden size.
        dtype: dtype of the weights.
        extra_rows: Even number of rows beyond `vocab`, in pairs of w and -w: one of them always has a logit
            far above all others, so code that does not mask these rows fails.
        eos_token_id: EOS in the model's config.
    """
    config = LlamaConfig(
        vocab_size=vocab + extra_rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:  # gains of the norms stay 1
                continue
            per_token = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            rows = vocab if per_token else weight.shape[0]
            scale = 1.0 if "embed_tokens" in name else 1.5 / weight.shape[1] ** 0.5
            weight[:rows] = scale * torch.randn(rows, weight.shape[1], generator=rng)
        if extra_rows:
            huge = 100 * torch.ones(extra_rows // 2, hidden)
            model.lm_head.weight[vocab:] = torch.cat([huge, -huge])
    return model.to(dtype)  # pyright: ignore[reportArgumentType]


class Scripted:
    """A fake model that prefers the script's token at each step, and its last token from then on.

    Args:
        tokenizer: Converts pieces to ids.
        script: Token ids, or pieces.
        prompt_length: Number of prompt tokens before the first step.
        margin: Logit of the preferred token; all others have 0.
        config: EOS in the model's config.
        generation_config: EOS in its generation config.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        script: Sequence[int] | Sequence[str],
        prompt_length: int,
        margin: float = 40.0,
        config: int | list[int] | None = None,
        generation_config: int | list[int] | None = None,
    ) -> None:
        self.script = [
            token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in script
        ]
        self.prompt_length = prompt_length
        self.vocab = len(tokenizer)
        self.margin = margin
        self.config = SimpleNamespace(vocab_size=self.vocab, eos_token_id=config)
        self.generation_config = SimpleNamespace(eos_token_id=generation_config)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        steps = (position_ids[:, -1:] - self.prompt_length + 1).clamp(max=len(self.script) - 1)
        tokens = torch.tensor(self.script)[steps]
        logits = torch.zeros(len(input_ids), 1, self.vocab).scatter(-1, tokens.unsqueeze(-1), self.margin)
        return SimpleNamespace(logits=logits)

    __call__ = forward


def save_model_folder(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Write a plain transformers folder; return its path as text."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
