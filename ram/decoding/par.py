"""PAR maths: Proposing, Aligning, Reducing one next-token law from two models' logits.

A law is a next-token distribution, p(token). The functions are pure and take tensors: no model, no cache, no
configuration file. They change no argument in place.

Shapes: B rows, V vocabulary (already cut to the tokenizer's length), T context, N candidates. The proposal's
logits are `proposal_logits_BV` (z_P), the aligner's `aligner_logits_BV` (z_Q).

Source: "Leveraging Importance Sampling to Detach Alignment Modules from Large Language Models"
(arXiv 2505.19700), section 3 and algorithm 1; docs/differences.md lists where practice differs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

# Random numbers have a module of their own; their names are also importable from here.
from ram.decoding.noise import ALL as ALL
from ram.decoding.noise import LARGE_VOCABULARY, NEG_INF
from ram.decoding.noise import Noise as Noise
from ram.decoding.noise import gumbel_argmax as gumbel_argmax
from ram.decoding.noise import gumbel_noise as gumbel_noise
from ram.decoding.noise import signed as signed

IGNORE_INDEX = -100
# The settings of one model's own law; the proposal's have the prefix "base_".
MODEL_KEYS = ("temperature", "top_p", "top_k", "repetition_penalty")
# Keys of PARParams that are younger than finished answers, with the value that those were decoded with.
INTRODUCED: dict[str, Any] = {
    "mixture_weight": 0.5,
    "greedy": False,
    "kl_direction": "forward",
}


@dataclass(frozen=True)
class PARParams:
    """Settings of the next-token law. A temperature of 0 means argmax, a top_k of -1 or 0 no limit.

    The first block shapes the aligner's logits, and in some modes the fused ones; the `base_` block shapes
    the proposal's nucleus. Raises ValueError for a value outside its range or an unknown mode.
    """

    sample_mode: str = "par_kl"
    temperature: float = 0.5
    top_p: float = 0.9
    top_k: int = -1
    repetition_penalty: float = 1.05
    base_temperature: float = 0.5
    base_top_p: float = 0.95
    base_top_k: int = -1
    div_threshold: float = 0.1  # nats; par_kl falls back if the divergence is above it
    kl_direction: str = "forward"  # par_kl: KL(P_M || Q), or KL(Q || P_M) if "reverse"
    kl_fallback: str = "proposal"
    eos_priority: bool = False
    base_repetition_penalty: float = 1.0  # only if the proposal decodes alone
    expert_temperature: float | None = None  # mds only; None means 1.0
    n_candidates: int | None = None  # snis only; required there
    mixture_weight: float = 0.5  # mixture only; the aligner's share
    greedy: bool = False  # a pair takes the most likely token of its finished law

    def __post_init__(self) -> None:
        def require(condition: bool, key: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {expected}")

        for field in fields(PARParams):
            kind: Any = field.type
            accepted = kind | int if kind in (float, float | None) else kind
            expected = getattr(field.type, "__name__", str(field.type)).replace("None", "null")
            value = getattr(self, field.name)
            fits = isinstance(value, accepted) and (field.type is bool or not isinstance(value, bool))
            require(fits, field.name, f"a value of type {expected}")
        require(self.sample_mode in SAMPLE_MODES, "sample_mode", f"one of {', '.join(SAMPLE_MODES)}")
        require(self.kl_fallback in KL_FALLBACKS, "kl_fallback", f"one of {', '.join(KL_FALLBACKS)}")
        require(self.kl_direction in KL_DIRECTIONS, "kl_direction", f"one of {', '.join(KL_DIRECTIONS)}")
        for key in ("temperature", "base_temperature", "expert_temperature"):
            value = getattr(self, key) or 0  # a smaller one would overflow float32 logits
            require(value == 0 or 1e-4 <= value < math.inf, key, "0 (argmax) or a number >= 1e-4")
        for key in ("top_p", "base_top_p"):
            require(0 < getattr(self, key) <= 1, key, "a number in (0, 1]")
        for key in ("top_k", "base_top_k"):
            require(getattr(self, key) >= -1, key, "-1 (no limit) or a count")
        for key in ("repetition_penalty", "base_repetition_penalty"):
            require(0 < getattr(self, key) < math.inf, key, "a number > 0 (1 = none)")
        require(self.div_threshold >= 0, "div_threshold", "a divergence in nats, >= 0")
        require(0 <= self.mixture_weight <= 1, "mixture_weight", "a number in [0, 1]")
        n = self.n_candidates
        fits = self.sample_mode != "snis" if n is None else n >= 1
        require(fits, "n_candidates", "a count >= 1, which sample_mode=snis requires")

    def identity(self) -> dict[str, Any]:
        """Return the keys that identify answers: all but those in INTRODUCED that have their value there."""
        values = {key: getattr(self, key) for key in self.field_names()}
        return {k: v for k, v in values.items() if k not in INTRODUCED or v != INTRODUCED[k]}

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the keys of the settings, in their order; those of a subclass are not included."""
        return tuple(field.name for field in fields(PARParams))


class Law(NamedTuple):
    """One position's next-token law, and the quantities that decided it."""

    logprobs: torch.Tensor  # (B, V) normalised, -inf outside the support
    fell_back: torch.Tensor  # (B,) bool, whether par_kl used its fall-back
    kl: torch.Tensor  # (B,) KL(P_M || Q) in nats; zeros if one model decodes alone
    proposal_logprobs: torch.Tensor | None  # (B, V) log P~ over the nucleus; None without a proposal


# ---- filters: (B, V) logits -> (B, V) logits, -inf for dropped tokens --------------------------------------


def penalise_repetition(logits: torch.Tensor, seen: torch.Tensor | None, penalty: float) -> torch.Tensor:
    """Divide positive logits of seen ids by `penalty` and multiply negative ones with it.

    The rule (Keskar et al. 2019, section 4.1) is not invariant under a shift, so it must be applied to
    logits, never to log-probabilities. seen: (B, V) bool, the ids of the prompt and of the output so far.
    """
    if penalty == 1.0 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits of each row, and all that tie with the k-th."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    kth = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, NEG_INF)


def keep_top_p(
    logits: torch.Tensor, top_p: float, inclusive: bool = False, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep a token if the probability mass of the tokens ranked before it is below `top_p`.

    The first rank is always kept. Ties are ranked by token id, so the result does not depend on the sort's
    implementation. inclusive: also keep a token if that mass equals top_p, as for the proposal's nucleus.
    total: (B, 1) log-sum of the whole vocabulary, if the logits are some columns of it.
    """
    if top_p >= 1.0:
        return logits
    if total is None and logits.device.type == "cpu" and logits.shape[-1] >= LARGE_VOCABULARY:
        return keep_top_p_by_threshold(logits, top_p, inclusive)
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    probs = torch.softmax(logits, dim=-1) if total is None else (logits - total).exp()
    inside = _inside_top_p(probs.gather(-1, order), top_p, inclusive)
    return logits.masked_fill(~torch.zeros_like(inside).scatter(-1, order, inside), NEG_INF)


def keep_top_p_by_threshold(logits: torch.Tensor, top_p: float, inclusive: bool = False) -> torch.Tensor:
    """`keep_top_p` without a sort of the vocabulary: rank only as many tokens as hold the mass.

    Their number is read from the result, which costs nothing on a CPU but a synchronisation on other devices.
    """
    probs, size, ranks = torch.softmax(logits, dim=-1), logits.shape[-1], 64
    while True:
        ranks = min(4 * ranks, size)
        ranked, order = torch.topk(logits, ranks, dim=-1)
        inside = _inside_top_p(probs.gather(-1, order), top_p, inclusive)
        if ranks == size or not inside[..., -1].any():
            break
    count = inside.sum(dim=-1, keepdim=True)
    least = ranked.gather(-1, count - 1)
    keep = logits >= least
    if (keep.sum(dim=-1, keepdim=True) > count).any():  # among ties at the last rank, the first ids stay
        above, tied = logits > least, logits == least
        keep = above | (tied & (tied.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True)))
    return logits.masked_fill(~keep, NEG_INF)


def _inside_top_p(ranked_probs: torch.Tensor, top_p: float, inclusive: bool) -> torch.Tensor:
    before = ranked_probs.cumsum(dim=-1) - ranked_probs
    inside = before <= top_p if inclusive else before < top_p
    inside[..., 0] = True
    return inside


def point_mass(scores: torch.Tensor) -> torch.Tensor:
    """Return the law (log-probabilities) that always takes the first largest score of each row."""
    law = torch.full_like(scores, NEG_INF)
    return law.scatter(-1, scores.argmax(dim=-1, keepdim=True), 0.0)


def greedy(logprobs: torch.Tensor) -> torch.Tensor:
    """Return the law of the most likely token; a row that is not a number stays so."""
    return torch.where(logprobs.isnan().any(dim=-1, keepdim=True), logprobs, point_mass(logprobs))


def untempered(params: PARParams) -> PARParams:
    """Return the settings under which log-probabilities are reported: temperature 1 in place of an argmax."""
    keys = ("temperature", "base_temperature", "expert_temperature")
    return replace(params, greedy=False, **{key: 1.0 for key in keys if getattr(params, key) == 0})


def warp(
    logits: torch.Tensor, params: PARParams, seen: torch.Tensor | None, total: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply temperature, penalty, top-p, top-k and log-softmax with the aligner's settings, (B, V)."""
    if params.temperature == 0:
        # The penalty commutes with a positive scale, so the limit of small temperatures needs none.
        return point_mass(penalise_repetition(logits, seen, params.repetition_penalty))
    logits = penalise_repetition(logits / params.temperature, seen, params.repetition_penalty)
    logits = keep_top_p(logits, params.top_p, total=total)
    return torch.log_softmax(keep_top_k(logits, params.top_k), dim=-1)


def align(
    aligner_logits_BV: torch.Tensor,
    params: PARParams,
    seen: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return log Q (B, V) under the aligner's own settings, from which it drafts; greedy if the pair is."""
    law = warp(wide(aligner_logits_BV), params, seen, total)
    return greedy(law) if params.greedy else law


def propose(
    proposal_logits_BV: torch.Tensor,
    params: PARParams,
    seen: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return log P~ (B, V): the proposal's nucleus, renormalised; -inf outside it.

    seen: only if the proposal decodes alone, for `base_repetition_penalty`. total: as in `keep_top_p`.
    """
    logits = keep_top_k(proposal_logits_BV, params.base_top_k)
    if params.base_temperature == 0:
        return point_mass(penalise_repetition(logits, seen, params.base_repetition_penalty))
    logits = penalise_repetition(logits / params.base_temperature, seen, params.base_repetition_penalty)
    return torch.log_softmax(keep_top_p(logits, params.base_top_p, inclusive=True, total=total), dim=-1)


def kl_divergence(p_logits_BV: torch.Tensor, q_logits_BV: torch.Tensor) -> torch.Tensor:
    """Return KL(P || Q) (B,) in nats, of raw logits over the whole vocabulary."""
    log_p = torch.log_softmax(p_logits_BV, dim=-1)
    log_q = torch.log_softmax(q_logits_BV, dim=-1)
    # If p is exactly 0, its term is 0 though log p - log q may be infinite; NaN logits keep NaN. The sum is
    # float64 because threads may split a long row differently in another batch, which must not move the gate.
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(dim=-1, dtype=torch.float64)


# ---- the modes: (z_P, z_Q, log P~, params, seen, candidates) -> (B, V) log-probs ---------------------------


def _par(z_p, z_q, log_nucleus, params, seen, candidates) -> torch.Tensor:
    return warp(z_q.masked_fill(log_nucleus == NEG_INF, NEG_INF), params, seen)


def _product(z_p, z_q, log_nucleus, params, seen, candidates) -> torch.Tensor:
    if params.temperature == 0:
        return _low_temperature_limit(log_nucleus, z_q, params, seen)
    log_q = penalise_repetition(z_q / params.temperature, seen, params.repetition_penalty)
    return torch.log_softmax(keep_top_k(keep_top_p(log_nucleus + log_q, params.top_p), params.top_k), dim=-1)


def _low_temperature_limit(log_p, z_q, params, seen) -> torch.Tensor:
    """Return the limit of p * Q^(1/T) for T -> 0: Q decides inside the support of p, and p breaks ties."""
    scores = penalise_repetition(z_q, seen, params.repetition_penalty).masked_fill(log_p == NEG_INF, NEG_INF)
    best = scores == scores.amax(dim=-1, keepdim=True)
    return point_mass(log_p.masked_fill(~best, NEG_INF))


def _snis(z_p, z_q, log_nucleus, params, seen, candidates) -> torch.Tensor:
    if candidates is None:
        raise ValueError("sample_mode=snis needs candidates (B, n_candidates) from the proposal's nucleus")
    counts = torch.zeros_like(z_q).scatter_add(-1, candidates, torch.ones_like(candidates, dtype=z_q.dtype))
    if params.temperature == 0:
        return _low_temperature_limit(counts.log(), z_q, params, seen)
    log_q = penalise_repetition(z_q / params.temperature, seen, params.repetition_penalty)
    return torch.log_softmax(counts.log() + log_q, dim=-1)


def _mds(z_p, z_q, log_nucleus, params, seen, candidates) -> torch.Tensor:
    expert_temperature = 1.0 if params.expert_temperature is None else params.expert_temperature
    if params.base_temperature == 0 and expert_temperature == 0:
        # Both are sharpened alike: two separate one-hots may have no common token.
        log_product = point_mass(z_p + z_q)
    elif params.base_temperature == 0:
        log_product = point_mass(z_p)
    elif expert_temperature == 0:
        log_product = point_mass(z_q)
    else:
        log_product = torch.log_softmax(z_p / params.base_temperature, dim=-1)
        log_product = log_product + torch.log_softmax(z_q / expert_temperature, dim=-1)
    log_product = log_product - log_product.logsumexp(dim=-1, keepdim=True)
    mixed = torch.logaddexp(log_product, torch.full_like(log_product, 1e-10).log())
    return warp(mixed.masked_fill(z_p == NEG_INF, NEG_INF), params, seen)  # ids without a token stay out


def _mixture(z_p, z_q, log_nucleus, params, seen, candidates) -> torch.Tensor:
    log_q, w = warp(z_q, params, seen), params.mixture_weight
    if w in (0, 1):  # exactly one model's, also where the other's is 0
        return log_q if w else log_nucleus
    return torch.logaddexp(log_nucleus + math.log1p(-w), log_q + math.log(w))


SAMPLE_MODES: dict[str, Callable[..., torch.Tensor]] = {
    "par": _par,
    "par_kl": _par,  # the gate below replaces rows above the threshold
    "product": _product,
    "snis": _snis,
    "mds": _mds,
    "mixture": _mixture,
}
KL_DIRECTIONS = ("forward", "reverse")
KL_FALLBACKS: dict[str, Callable[..., torch.Tensor]] = {
    "proposal": lambda z_p, log_nucleus, params, seen: log_nucleus,
    "aligner": lambda z_p, log_nucleus, params, seen: warp(z_p, params, seen),
}


def next_token_law(
    proposal_logits_BV: torch.Tensor | None,
    aligner_logits_BV: torch.Tensor | None,
    params: PARParams,
    seen: torch.Tensor | None = None,
    eos_token_ids: Sequence[int] = (),
    candidates: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    kl: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> Law:
    """Return the law of the next token, with the fall-back mask and the divergence that decided it.

    Args:
        proposal_logits_BV, aligner_logits_BV: raw logits, computed with in float32, or float64 if they are
            float64. If one is None, the other model decodes alone, by its own settings.
        seen: (B, V) bool for the repetition penalties.
        candidates: (B, N) ids for snis.
        total, kl, gate: of the whole vocabulary, if the logits are some columns of it
            (`ram.decoding.columns`): the log-sum (B, 1) of the proposal at its temperature, KL(P_M || Q), and
            KL(Q || P_M) if it decides (B,).

    Raises:
        ValueError: if both logits are None, their shapes differ, or snis lacks candidates.
    """
    z_p, z_q = (None if z is None else wide(z) for z in (proposal_logits_BV, aligner_logits_BV))
    logits = z_q if z_p is None else z_p
    if logits is None:
        raise ValueError("both logits are None: give the proposal's, the aligner's, or both")
    never, zero = logits.new_zeros(len(logits), dtype=torch.bool), logits.new_zeros(len(logits))
    if z_p is None:
        return Law(warp(logits, params, seen), never, zero, None)
    if z_q is None:
        log_nucleus = propose(z_p, params, seen, total)
        return Law(log_nucleus, never, zero, log_nucleus)
    if z_p.shape != z_q.shape:
        shapes = f"{tuple(z_p.shape)} and {tuple(z_q.shape)}"
        raise ValueError(f"logits of shapes {shapes}: cut both models' to the tokenizer's length")

    log_nucleus = propose(z_p, params, None, total)
    law = SAMPLE_MODES[params.sample_mode](z_p, z_q, log_nucleus, params, seen, candidates)
    kl, fell_back = kl_divergence(z_p, z_q) if kl is None else kl, never
    if params.sample_mode == "par_kl":
        if params.kl_direction == "forward":
            gate = kl
        elif gate is None:
            gate = kl_divergence(z_q, z_p)
        fell_back = ~(gate <= params.div_threshold)
        fallback = KL_FALLBACKS[params.kl_fallback](z_p, log_nucleus, params, seen)
        law = torch.where(fell_back.unsqueeze(-1), fallback, law)
    if params.eos_priority and len(eos_token_ids):
        forced = torch.isin(z_p.argmax(dim=-1), torch.as_tensor(list(eos_token_ids), device=z_p.device))
        law = torch.where(forced.unsqueeze(-1), point_mass(z_p), law)
    if params.greedy:
        law, log_nucleus = (greedy(logprobs) for logprobs in (law, log_nucleus))
    return Law(law, fell_back, kl, log_nucleus)


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32, or unchanged if they are float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def checked(token: torch.Tensor, law: Law) -> torch.Tensor:
    """Return drawn tokens (B,), or -1 if their law is NaN: a draw from NaN gives a token, too."""
    own = law.logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    return torch.where((own + law.kl).isnan(), -1, token)


def seen_mask(context_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """Return (B, V) bool: the ids in `context_ids` (B, T). -100 is padding; ids beyond V do not count."""
    if context_ids is None:
        return None
    valid = (context_ids >= 0) & (context_ids < vocab_size)
    seen = torch.zeros(context_ids.shape[0], vocab_size + 1, dtype=torch.bool, device=context_ids.device)
    return seen.scatter(1, context_ids.masked_fill(~valid, vocab_size), True)[:, :vocab_size]


def token_logprobs(
    proposal_logits: torch.Tensor | None,
    aligner_logits: torch.Tensor | None,
    params: PARParams,
    context_ids: torch.Tensor | None = None,
    eos_token_ids: Sequence[int] = (),
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the log-probabilities (B, V) of `next_token_law`: normalised, -inf outside the support.

    Args:
        context_ids: (B, T) prompt and output so far, -100 = padding; only repetition penalties read it. The
            other arguments are those of `next_token_law`.
    """
    logits = proposal_logits if proposal_logits is not None else aligner_logits
    seen = None if logits is None else seen_mask(context_ids, logits.shape[-1])
    return next_token_law(proposal_logits, aligner_logits, params, seen, eos_token_ids, candidates).logprobs
