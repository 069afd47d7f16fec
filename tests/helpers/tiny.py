"""Small models and tokenizers for the tests: random weights, exact vocabularies, nothing to download."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).resolve().parents[3] / "shared"  # sample data and a small trained model, where given
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"sample data and models are not there: expected the folder {SHARED}"
)
EOS, PAD, BOS = "</s>", "<pad>", "<s>"


def tiny_tokenizer(pieces="abc"):
    """One token per piece, in this order, then EOS and PAD; text is cut greedily into the longest pieces.

    Pieces may be any strings. Text that is no sequence of pieces is not for this tokenizer.
    """
    vocabulary = {piece: index for index, piece in enumerate([*pieces, EOS, PAD])}
    longest_first = sorted(map(re.escape, pieces), key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(longest_first)), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def byte_tokenizer():
    """One token per byte, then EOS, PAD and BOS: takes every text and splits every character above ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate([*alphabet, EOS, PAD, BOS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, bos_token=BOS)


def tiny_model(vocab, seed, layers=1, hidden=16, dtype=torch.float32, extra_rows=0, eos_token_id=None):
    """A Llama with random weights whose next-token laws hang on the context, neither flat nor peaked.

    Logits have a standard deviation of about 1.5. The same seed gives the same weights for any extra_rows
    (an even count): rows beyond `vocab`, in pairs ±w, so that one of them has a logit far above all others.
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
            if weight.dim() == 1:  # the norms' gains stay 1
                continue
            per_token = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            rows = vocab if per_token else weight.shape[0]
            scale = 1.0 if "embed_tokens" in name else 1.5 / weight.shape[1] ** 0.5
            weight[:rows] = scale * torch.randn(rows, weight.shape[1], generator=rng)
        if extra_rows:
            huge = 100 * torch.ones(extra_rows // 2, hidden)
            model.lm_head.weight[vocab:] = torch.cat([huge, -huge])
    return model.to(dtype)


class Scripted:
    """Stands in for a model: prefers the script's token at each step, the last one from then on.

    script: token ids, or pieces. config, generation_config: the EOS that each of them states.
    """

    def __init__(self, tokenizer, script, prompt_length, margin=40.0, config=None, generation_config=None):
        self.script = script if isinstance(script[0], int) else tokenizer.convert_tokens_to_ids(list(script))
        self.prompt_length, self.vocab, self.margin = prompt_length, len(tokenizer), margin
        self.config = SimpleNamespace(vocab_size=self.vocab, eos_token_id=config)
        self.generation_config = SimpleNamespace(eos_token_id=generation_config)
        self.device = torch.device("cpu")

    def __call__(self, input_ids, position_ids, **_):
        steps = (position_ids[:, -1:] - self.prompt_length + 1).clamp(max=len(self.script) - 1)
        wanted = torch.tensor(self.script)[steps]
        logits = torch.zeros(len(input_ids), 1, self.vocab).scatter(-1, wanted.unsqueeze(-1), self.margin)
        return SimpleNamespace(logits=logits)


def save_model_folder(path, model, tokenizer):
    """Writes a plain transformers folder and returns its path as text."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
