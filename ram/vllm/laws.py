"""The logits that a pair's model returns to vLLM, and the settings that a request may then have.

vLLM's sampler applies penalties, temperature, top-k and top-p, in this order, to what a model returns. So a
pair takes one of two forms.

- Open: the aligner's raw logits on the proposal's nucleus, -inf elsewhere. The request sets temperature,
  penalty, and top-p or top-k: the result is `par`.
- Closed: `temperature` times the finished log-probabilities. Requests have this temperature and nothing else.

The distributions themselves are computed by `ram.decoding.par`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ram.decoding import par
from ram.decoding.par import PARParams

OPEN, CLOSED = "open", "closed"
ROWS = 64  # rows of one pass: float32 temporaries over a vocabulary of 128k stay at 34 MB each
LEAST_TEMPERATURE = 0.01  # vLLM raises a smaller one above 0 to this value


@dataclass(frozen=True)
class PairSettings:
    """The value `ram` of a pair's `--hf-overrides`.

    Attributes:
        aligner: folder of the aligner.
        params: the pair's next-token settings.
        digests: fingerprints of both models' files, which `/ram` reports; empty if the server was not started
            by bin/serve_vllm.sh.
    """

    aligner: str
    params: PARParams
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Any) -> "PairSettings":
        """Return the settings in a flat mapping; raise ValueError for a key or a value that cannot work."""
        if not isinstance(values, Mapping) or not isinstance(values.get("aligner"), str):
            raise ValueError('hf_overrides.ram: expected a mapping with at least {"aligner": FOLDER}')
        known = PARParams.field_names()
        if unknown := [key for key in values if key not in ("aligner", "digests", *known)]:
            raise ValueError(f"hf_overrides.ram.{unknown[0]}: unknown key; expected {', '.join(known)}")
        params = PARParams(**{key: values[key] for key in known if key in values})
        check(params)
        return cls(values["aligner"], params, dict(values.get("digests", {})))


def form_of(params: PARParams) -> str:
    """Return the form of a pair with these settings: open or closed."""
    gate_is_open = params.sample_mode == "par_kl" and params.kl_fallback == "aligner"
    return OPEN if params.sample_mode == "par" or gate_is_open else CLOSED


def check(params: PARParams) -> None:
    """Raise ValueError for settings that neither form keeps."""
    mode = params.sample_mode
    if mode == "snis":
        raise ValueError("sample_mode=snis draws candidates, which a model in vLLM cannot: use serve.py")
    if params.greedy:
        raise ValueError(
            "greedy=true: not known to vLLM; in mode par a request's temperature 0 does the same"
        )
    if 0 < params.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"temperature={params.temperature}: give 0 (argmax) or at least {LEAST_TEMPERATURE}, vLLM's least"
        )
    if form_of(params) == OPEN:
        if params.temperature > 0 and params.top_k > 0 and params.top_p < 1:
            raise ValueError(
                f"top_k={params.top_k} with top_p={params.top_p}: vLLM applies them in the other order; give "
                "top_k=-1 or top_p=1"
            )
        return
    mode += f" with kl_fallback={params.kl_fallback}" if mode == "par_kl" else ""
    if params.repetition_penalty != 1:
        raise ValueError(
            f"repetition_penalty={params.repetition_penalty}: sample_mode={mode} has it inside its formula, "
            "where vLLM has no access to the tokens; give 1"
        )
    if params.temperature == 0:
        raise ValueError(f"temperature=0: vLLM would take the argmax everywhere, sample_mode={mode} does not")


def request_settings(params: PARParams) -> dict[str, float]:
    """Return the sampling settings of a request that decodes with `params`, in vLLM's names."""
    settings = {"temperature": params.temperature, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    if form_of(params) == CLOSED:
        return settings
    top_k, penalty = max(params.top_k, 0), params.repetition_penalty
    return settings | {"top_p": params.top_p, "top_k": top_k, "repetition_penalty": penalty}


def fixed_settings(params: PARParams) -> dict[str, Any]:
    """Return the settings that a pair's server decides for all requests: in the closed form all of them."""
    own = () if form_of(params) == CLOSED else ("temperature", "top_p", "top_k", "repetition_penalty")
    return {key: value for key, value in params.identity().items() if key not in own}


def fused_logits(
    proposal_logits_BV: torch.Tensor,
    aligner_logits_BV: torch.Tensor,
    params: PARParams,
    eos_token_ids: Sequence[int] = (),
    columns: int | None = None,
) -> torch.Tensor:
    """Return the logits that stand for the pair in vLLM, (B, columns) in float32.

    Args:
        proposal_logits_BV, aligner_logits_BV: raw logits, both cut to the tokenizer's length V.
        columns: width of the result; those after V are -inf. None means V.
    """
    rows, size = proposal_logits_BV.shape
    fused = proposal_logits_BV.new_full((rows, columns or size), par.NEG_INF, dtype=torch.float32)
    for start in range(0, rows, ROWS):
        chunk = slice(start, start + ROWS)
        fused[chunk, :size] = _fused(
            proposal_logits_BV[chunk], aligner_logits_BV[chunk], params, eos_token_ids
        )
    return fused


def _fused(z_p: torch.Tensor, z_q: torch.Tensor, params: PARParams, eos: Sequence[int]) -> torch.Tensor:
    if form_of(params) == CLOSED:
        return params.temperature * par.next_token_law(z_p, z_q, params, None, eos).logprobs
    # With neutral settings the law's support is that of the raw logits, and its gate does not change.
    neutral = replace(params, temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.0)
    law = par.next_token_law(z_p, z_q, neutral, None, eos)
    logits = torch.where(law.fell_back.unsqueeze(-1), par.wide(z_p), par.wide(z_q))
    return logits.masked_fill(law.logprobs == par.NEG_INF, par.NEG_INF)
