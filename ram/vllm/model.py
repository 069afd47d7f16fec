"""A proposal and an aligner as one model of vLLM, the architecture RAMPair.

    input ids -> both members' hidden states, side by side -> both members' logits -> laws.fused_logits

vLLM loads, shards, quantises and caches each member as it would alone; docs/vllm.md says what was shown.
"""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, replace
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import init_vllm_registered_model
from vllm.tokenizers.registry import cached_tokenizer_from_config, get_tokenizer
from vllm.transformers_utils.config import get_config

from ram.vllm import laws

ALIGNER = "aligner."
# Kinds of drafts that do not read the hidden states of the model that they draft for.
DRAFTS = ("draft_model", "ngram", "ngram_gpu", "suffix")
LOADERS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")


class RAMPair(nn.Module):
    """The pair. Its hidden states are the proposal's, then the aligner's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        settings = laws.PairSettings.parse(getattr(model_config.hf_config, "ram", None))
        check_engine(vllm_config)
        aligner_config = aligner_model_config(vllm_config, settings.aligner)
        self.params = settings.params
        self.tokens = shared_vocabulary(model_config, aligner_config)
        self.columns = model_config.get_vocab_size()
        # The overrides name this class and may have another vocabulary size; the proposal needs its own.
        own = get_config(model_config.model, model_config.trust_remote_code, model_config.revision)
        if not own.architectures:
            raise ValueError(f"{model_config.model}/config.json names no architectures: vLLM needs one")
        proposal_config = copy.deepcopy(model_config.hf_config)
        proposal_config.vocab_size = own.vocab_size
        self.eos_token_ids = shared_ends(model_config, aligner_config)
        # The proposal's layers keep the names of its checkpoint, which quantised checkpoints refer to.
        self.proposal = init_vllm_registered_model(
            vllm_config, prefix="", hf_config=proposal_config, architectures=own.architectures
        )
        # A config of its own, for its own quantisation or none.
        own_config = replace(vllm_config, model_config=aligner_config, quant_config=None)
        with set_model_tag("ram_aligner"):
            self.aligner = initialize_model(vllm_config=own_config, prefix=ALIGNER.removesuffix("."))
        self.secondary_weights = [DefaultModelLoader.Source(settings.aligner, None, prefix=ALIGNER)]
        self.hidden_size = model_config.get_hidden_size()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.proposal.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return both members' hidden states (tokens, H_proposal + H_aligner)."""
        # A drafter may have rows beyond the tokenizer: such a draft is rejected, but may not end the server.
        input_ids = input_ids.clamp(max=self.tokens - 1)
        return torch.cat([member(input_ids, positions) for member in (self.proposal, self.aligner)], dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the pair's logits (rows, vocabulary); None on ranks that do not sample."""
        split = [self.hidden_size, hidden_states.shape[-1] - self.hidden_size]
        of_proposal, of_aligner = hidden_states.split(split, dim=-1)
        z_p = self.proposal.compute_logits(of_proposal.contiguous())
        z_q = self.aligner.compute_logits(of_aligner.contiguous())
        if z_p is None or z_q is None:
            return None
        z_p, z_q = z_p[:, : self.tokens], z_q[:, : self.tokens]
        return laws.fused_logits(z_p, z_q, self.params, self.eos_token_ids, self.columns)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the proposal's weights, then the aligner's; return the names of those that were set."""
        loaded: set[str] = set()
        for is_aligner, group in itertools.groupby(weights, lambda weight: weight[0].startswith(ALIGNER)):
            name = ALIGNER if is_aligner else "proposal."
            member = self.aligner if is_aligner else self.proposal
            stripped = ((key.removeprefix(ALIGNER), value) for key, value in group)
            loaded |= {name + key for key in member.load_weights(stripped)}
        return loaded


def check_engine(config: VllmConfig) -> None:
    """Raise ValueError for settings of vLLM that a pair cannot work with."""
    model, speculative = config.model_config, config.speculative_config
    refused = {
        "--pipeline-parallel-size": config.parallel_config.pipeline_parallel_size > 1,
        "--enable-lora": config.lora_config is not None,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--logits-processors": bool(model.logits_processors),
        "--skip-tokenizer-init": model.skip_tokenizer_init,
        f"--runner {model.runner_type}": model.runner_type != "generate",
        f"--load-format {config.load_config.load_format}": config.load_config.load_format not in LOADERS,
        "a proposal with images or sound": model.hf_config is not model.hf_text_config,
    }
    if speculative is not None:
        refused[f"drafts by {speculative.method}"] = speculative.method not in DRAFTS
    if found := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"a pair of proposal and aligner does not work with {found[0]}: leave it out")


def aligner_model_config(config: VllmConfig, aligner: str) -> ModelConfig:
    """Return the aligner's ModelConfig, its lengths and type as the proposal's.

    Raises:
        ValueError: The aligner holds fewer positions, its heads cannot be divided, or they are larger.
    """
    outer = config.model_config
    model_config = ModelConfig(
        model=aligner,
        tokenizer=aligner,
        tokenizer_mode=outer.tokenizer_mode,
        trust_remote_code=outer.trust_remote_code,
        dtype=outer.dtype,
        seed=outer.seed,
        max_model_len=outer.max_model_len,
        enforce_eager=outer.enforce_eager,
        max_logprobs=outer.max_logprobs,
    )
    model_config.verify_with_parallel_config(config.parallel_config)
    if model_config.get_head_size() > outer.get_head_size():
        raise ValueError(
            f"the aligner {aligner} has heads of {model_config.get_head_size()}, the proposal of "
            f"{outer.get_head_size()}: vLLM sizes attention's buffers by the proposal's"
        )
    return model_config


def shared_vocabulary(proposal: ModelConfig, aligner: ModelConfig) -> int:
    """Return the number of tokens of the members' one tokenizer.

    Raises:
        ValueError: The members have two tokenizers, its ids have gaps, or a member has fewer rows.
    """
    tokenizer = cached_tokenizer_from_config(proposal)
    other = get_tokenizer(aligner.model, trust_remote_code=aligner.trust_remote_code)
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(f"the tokenizers of {proposal.model} and {aligner.model} differ: a pair needs one")
    if max(tokenizer.get_vocab().values()) + 1 != len(tokenizer):
        raise ValueError(
            f"the tokenizer of {proposal.model} leaves ids unused, which vLLM could draw: use serve.py"
        )
    rows = min(proposal.get_vocab_size(), aligner.get_vocab_size())
    if rows < len(tokenizer):
        raise ValueError(f"a member has {rows} vocabulary rows, the tokenizer {len(tokenizer)} tokens")
    return len(tokenizer)


def shared_ends(proposal: ModelConfig, aligner: ModelConfig) -> tuple[int, ...]:
    """Return the ids at which vLLM ends an answer.

    Raises:
        ValueError: A member's configuration has another one, at which `generate` would end.
    """
    ends = {cached_tokenizer_from_config(proposal).eos_token_id}
    ends |= eos_ids(proposal.try_get_generation_config())
    for member in (proposal, aligner):
        others = eos_ids(vars(member.hf_config)) | eos_ids(member.try_get_generation_config())
        if others - ends:
            raise ValueError(
                f"{member.model} ends answers at the ids {sorted(others)}, vLLM at {sorted(ends)}: put all "
                f"into eos_token_id of {proposal.model}/generation_config.json"
            )
    return tuple(sorted(ends))


def eos_ids(config: dict[str, Any]) -> set[int]:
    """Return the EOS ids in a configuration's values."""
    ids = config.get("eos_token_id")
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
