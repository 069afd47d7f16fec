"""Measure how the aligner changed each token of finished answers, with one forward pass per model and answer.

    prompt and answer as token ids -> logits of both models at all positions -> par.next_token_law -> figures

Decoding computes the same next-token distributions one position at a time, so the figures agree with it up to
rounding. Whether a token fell back is not computed again, because decoding recorded it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ram.data.text import spelling
from ram.decoding import scoring
from ram.decoding.par import PARParams, align, next_token_law
from ram.decoding.rows import eos_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAGE = Path(__file__).parent / "page"
# The look of a token on a page, and its figures under the pointer; for the report and the server's page.
SCRIPT, STYLE = ((PAGE / f"influence.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
TOP = 4  # candidates of each model at every position
# A pair answers almost as its proposal alone if fewer of its tokens were changed, or more fell back.
LEAST_CHANGED, MOST_FALLEN = 0.01, 0.5


def is_little(fallen: float, changed: float) -> bool:
    """Return whether an aligner changes next to nothing, from the shares of its tokens."""
    return fallen > MOST_FALLEN or changed < LEAST_CHANGED


def remark(n_tokens: int, stats: Mapping[str, float]) -> str | None:
    """Return a line about a pair's answer if its aligner changed next to nothing of it.

    Args:
        n_tokens: of the answer.
        stats: as in `rows.Generation`.
    """
    fallen, changed = stats["fallback_fraction"], stats["changed_fraction"]
    if not n_tokens or not is_little(fallen, changed):
        return None
    count = round(changed * n_tokens)
    text = f"the aligner changed {count or 'none'} of the {n_tokens} tokens"
    if fallen > 0:
        text += f", and {fallen:.0%} of them fell back to the proposal: try sample_mode=par"
    return text


@torch.inference_mode()
def token_figures(
    proposal: "PreTrainedModel",
    aligner: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    params: PARParams,
) -> dict[str, Any]:
    """Compute the figures of a pair at each token of an answer.

    Returns:
        A dict of lists with one entry per token. Log-probabilities are in nats, and None if the token has
        probability 0.

        logp: Log-probability of the token under the pair. The whole list is None for snis, whose distribution
            depends on the candidates that it draws.
        logp_proposal: Log-probability under the proposal with its own sampling settings.
            `logp - logp_proposal` is the influence of the aligner.
        kl: KL(P_M || Q) in nats.
        candidates: The most likely tokens of either model and the token itself, most likely first. Each is
            [text, probability under the proposal, under the aligner, under the pair (None for snis)].
    """
    figures: dict[str, Any] = {"logp": [], "logp_proposal": [], "kl": [], "candidates": []}
    eos = eos_token_ids(tokenizer, proposal, aligner)
    has_pair_law = params.sample_mode != "snis"
    # All other figures are the same in every mode, so par stands in for snis.
    law_params = params if has_pair_law else replace(params, sample_mode="par")
    models = {"proposal": proposal, "aligner": aligner}
    for positions in scoring.positions_of(models, tokenizer, [scoring.Row(prompt_ids, answer_ids)]):
        z_p, z_q = positions.logits["proposal"], positions.logits["aligner"]
        law = next_token_law(z_p, z_q, law_params, positions.seen, eos)
        assert law.proposal_logprobs is not None
        aligner_logprobs = align(z_q, params, positions.seen)
        figures["logp"] += logps_of(law.logprobs, positions.tokens)
        figures["logp_proposal"] += logps_of(law.proposal_logprobs, positions.tokens)
        figures["kl"] += map(finite, law.kl.tolist())
        figures["candidates"] += candidates(
            tokenizer,
            [law.proposal_logprobs, aligner_logprobs, law.logprobs],
            positions.tokens,
            has_pair_law,
        )
    if answer_ids and not has_pair_law:
        figures["logp"] = None
    return figures


def logps_of(logprobs: torch.Tensor, tokens: torch.Tensor) -> list[float | None]:
    """Return the entries of `logprobs` (R, V) at `tokens` (R,), None for an impossible token."""
    return [finite(value) for value in logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()]


def candidates(
    tokenizer: "PreTrainedTokenizerBase", laws: list[torch.Tensor], tokens: torch.Tensor, has_pair_law: bool
) -> list[list[list]]:
    """Return the `candidates` of `token_figures` for R positions.

    Args:
        laws: Log-probabilities (R, V) of the proposal, the aligner and the pair.
        tokens: (R,) the tokens of the answer.
        has_pair_law: Whether to show and order by the pair's probabilities.
    """
    best = [law.topk(min(TOP, law.shape[-1]), dim=-1) for law in laws[:2]]
    ids = torch.cat([tokens.unsqueeze(-1), *(top.indices for top in best)], dim=-1)
    # If a distribution has fewer than TOP tokens, the remaining indices are arbitrary.
    valid = torch.cat([torch.ones_like(ids[:, :1]), *(top.values.isfinite() for top in best)], dim=-1)
    values = torch.stack([law.gather(-1, ids).exp() for law in laws], dim=-1)
    positions, words = [], spelling(tokenizer)
    for row, mask, triples in zip(ids.tolist(), valid.tolist(), values.tolist(), strict=True):
        probabilities = {i: triple for i, keep, triple in zip(row, mask, triples, strict=True) if keep}
        order = sorted(
            probabilities.items(),
            key=lambda item: (item[1][2] if has_pair_law else 0.0, *item[1]),
            reverse=True,
        )
        position = []
        for i, triple in order:
            p_proposal, p_aligner, p_pair = map(finite, triple)
            text = words.word(i)
            text = words.name(i) if any(text == other for other, *_ in position) else text
            position.append([text, p_proposal, p_aligner, p_pair if has_pair_law else None])
        positions.append(position)
    return positions


def finite(value: float | None) -> float | None:
    """Round a number to six digits for a file. Return None if it is infinite or NaN, or None already."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def shown(figures: Mapping[str, Any]) -> dict[str, list]:
    """Return the figures of an answer as a page shows them, one entry per token.

    Returns:
        `influence`: log p - log P_M in nats, "outside" if the proposal's own distribution excludes the
        token, None if there is no p; `kl` and `candidates` as in `token_figures`. Numbers are rounded.
    """
    logps = figures["logp"] or [None] * len(figures["kl"])
    return {
        "influence": [
            None if p is None else "outside" if own is None else rounded(p - own)
            for p, own in zip(logps, figures["logp_proposal"], strict=True)
        ],
        "kl": [rounded(value) for value in figures["kl"]],
        "candidates": [
            [[word, *map(rounded, shares)] for word, *shares in kept] for kept in figures["candidates"]
        ],
    }


def rounded(value: float | None) -> float | None:
    """Return a number with the digits that a page shows."""
    return None if value is None else float(f"{value:.3g}")
