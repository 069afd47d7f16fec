"""Laws on the columns with the largest logits, for devices on which whole rows cost too much.

A nucleus has few tokens. On the columns that hold it, the law, the order of ties and the random numbers are
those of whole rows: only the log-sum and the divergence read the other columns. If a nucleus may reach beyond
the columns, its token is `UNCOVERED`, and the next round draws there from whole rows.

Shapes: N laws, C columns, V vocabulary.
"""

from typing import NamedTuple

import torch

from ram.decoding.noise import NEG_INF, Noise, gumbel_argmax
from ram.decoding.par import (
    PARParams,
    align,
    checked,
    kl_divergence,
    next_token_law,
    penalise_repetition,
    wide,
)

# Columns, and the least vocabulary that they pay for, by device; other devices use whole rows. With 128k
# tokens a round moves 1 GB instead of 9, for about 160 launches more.
COUNTS = {"cuda": (1024, 64_000)}
UNCOVERED = -2  # in place of a token


class Columns(NamedTuple):
    """The largest logits of rows.

    Args:
        tokens: (N, C) ascending, so that the first column has the first id among ties.
        total: (N, 1) log-sum of the whole vocabulary at the law's temperature.
    """

    tokens: torch.Tensor
    total: torch.Tensor

    def pick(self, values_NV: torch.Tensor) -> torch.Tensor:
        return values_NV.gather(-1, self.tokens)

    def token(self, index: torch.Tensor) -> torch.Tensor:
        """The ids (N,) of one column per row (N,)."""
        return self.tokens.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def largest(logits_NV: torch.Tensor, top_p: float, top_k: int, temperature: float) -> Columns | None:
    """Return the columns that hold a nucleus with these settings; None if whole rows are needed."""
    count, least = COUNTS.get(logits_NV.device.type, (0, 0))
    if not count or logits_NV.shape[-1] < least or top_k > 0 or (top_p == 1 and temperature != 0):
        return None
    scaled = logits_NV if temperature in (0, 1) else logits_NV / temperature
    tokens = scaled.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return Columns(tokens, scaled.logsumexp(dim=-1, keepdim=True))


def draw_draft(
    logits_NV: torch.Tensor,
    params: PARParams,
    seen: torch.Tensor | None,
    noise: Noise,
    rows: torch.Tensor | slice,
    column: int,
) -> torch.Tensor | None:
    """Draw an aligner's drafts (N,); None if whole rows are needed.

    A nucleus is cut at the columns: drafts are guesses, which decide no token.
    """
    if logits_NV.device.type not in COUNTS:
        return None
    logits = wide(logits_NV)
    ranked = penalise_repetition(logits, seen, params.repetition_penalty)
    columns = largest(ranked, params.top_p, params.top_k, params.temperature)
    if columns is None:
        return None
    own_seen = None if seen is None else columns.pick(seen)
    law = align(columns.pick(logits), params, own_seen, columns.total)
    return columns.token(gumbel_argmax(law, noise.at(columns.tokens, rows, column)))


def draw_laws(
    z_p: torch.Tensor | None,
    z_q: torch.Tensor | None,
    params: PARParams,
    seen: torch.Tensor | None,
    noise: Noise,
    rows: torch.Tensor | slice,
) -> dict[str, torch.Tensor] | None:
    """As `frames.draw_laws`, without log-probabilities; None if the law needs whole rows."""
    gate_is_closed = params.sample_mode == "par_kl" and params.kl_fallback == "proposal"
    fits = gate_is_closed or params.sample_mode in ("par", "product", "snis")
    if z_p is None or z_p.device.type not in COUNTS or params.greedy or params.eos_priority:
        return None
    if not fits if z_q is not None else params.base_repetition_penalty != 1:
        return None
    z_p = wide(z_p)
    columns = largest(z_p, params.base_top_p, params.base_top_k, params.base_temperature)
    if columns is None:
        return None
    p, q, kl, gate, candidates = columns.pick(z_p), None, None, None, None
    if z_q is not None:
        z_q = wide(z_q)
        q, kl = columns.pick(z_q), kl_divergence(z_p, z_q)
        if gate_is_closed and params.kl_direction == "reverse":
            gate = kl_divergence(z_q, z_p)
        seen = None if seen is None else columns.pick(seen)
        if params.sample_mode == "snis":
            nucleus = next_token_law(p, None, params, total=columns.total).logprobs
            streams = [noise.stream_of(stream, rows) for stream in range(1, 1 + (params.n_candidates or 0))]
            draws = [gumbel_argmax(nucleus, stream.at(columns.tokens)) for stream in streams]
            candidates = torch.stack(draws, dim=-1)
    law = next_token_law(p, q, params, seen, (), candidates, columns.total, kl, gate)
    nucleus = law.proposal_logprobs
    assert nucleus is not None
    gumbel = noise.at(columns.tokens, rows)
    index = gumbel_argmax(law.logprobs, gumbel)
    token = torch.where(checked(index, law) < 0, -1, columns.token(index))
    # Other columns may tie with the least one, so a nucleus that has it may go on.
    is_beyond = ((nucleus != NEG_INF) & (p <= p.amin(dim=-1, keepdim=True))).any(dim=-1)
    report = {"token": torch.where(is_beyond & (token >= 0), UNCOVERED, token)}
    if z_q is not None:
        as_proposal = gumbel_argmax(nucleus, gumbel) == index
        report |= {"fell_back": law.fell_back, "kl": law.kl, "as_proposal": as_proposal}
    return report
