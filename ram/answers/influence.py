"""Measure how the aligner changed each token of finished answers, with one forward pass per model and answer.

    prompt and answer as token ids -> logits of both models at all positions -> par.next_token_law -> figures

Decoding computes the same next-token distributions one position at a time, so the figures agree with it up to
rounding. Whether a token fell back is not computed again, because decoding recorded it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ram.answers import answer_files
from ram.answers.jobs import AnswerJob
from ram.data.text import spelling
from ram.decoding import scoring
from ram.decoding.par import PARParams, align, next_token_law
from ram.decoding.rows import eos_token_ids
from ram.distributed import processes
from ram.log import log, progress
from ram.storage.files import fingerprint, only_run, read_rows
from ram.storage.parts import PartFiles
from ram.storage.provenance import is_made_from, write_marked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP = 4  # candidates of each model at every position


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


def finite(value: float) -> float | None:
    """Round a number to six digits for a file. Return None if it is infinite or NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---- the file of figures -----------------------------------------------------------------------------------


def figures_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.influence.jsonl")


def evenly_spread(n: int, count: int) -> list[int]:
    """Return at most n indices below `count` at about equal distances, the first and the last included."""
    n = min(n, count)
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def made_from(job: AnswerJob, earlier: bool = False) -> str:
    return fingerprint([fingerprint(job.earlier_made_from) if earlier else job.identity, TOP])


def figures_file(output: Path, job: AnswerJob, n: int, overwrite: bool) -> None:
    """Make the file of figures beside the finished answers in `output`, for n rows spread evenly over them.

    A finished file of the same answers and rows is kept, and an unfinished one is continued. If the answers
    were made by an older version, which stored no token ids, log that and make no file. All processes must
    call this together.
    """
    path = figures_path(output)
    rows = evenly_spread(n, len(job.prompts))
    with only_run(path):
        if not rows or processes.from_rank0(lambda: not overwrite and is_finished(path, job, rows)):
            return
        answers = answer_files.read_answers(output, job)
        if any("token_ids" not in answers[row] for row in rows):
            log.info(
                f"{job.label}: no influence per token, because these answers were stored without their token "
                "ids; generate them again (overwrite=true)"
            )
            return
        parts = PartFiles(path, fingerprint([made_from(job), rows]), overwrite)
        missing = [index for index in range(len(rows)) if index not in parts.done]
        share = missing[processes.rank() :: processes.count()]
        tokenizer, prompt_ids = job.encoded
        with processes.in_turn():  # one after the other, so that the host holds one copy of the weights
            proposal, aligner, _ = job.load() if share else (None, None, None)
        for index in progress(share, desc=f"{job.label}: influence", unit="row"):
            assert proposal is not None and aligner is not None, "influence is defined for pairs only"
            row = rows[index]
            figures = token_figures(
                proposal, aligner, tokenizer, prompt_ids[row], answers[row]["token_ids"], job.params
            )
            parts.add({"index": index, "row": row, **figures})
        parts.close()
        processes.barrier()
        if processes.is_rank0():
            write_marked(path, parts.collect(len(rows)), made_from(job))
            parts.remove()
        processes.barrier()
        log.info(f"saved    {path}")


def is_finished(path: Path, job: AnswerJob, rows: list[int]) -> bool:
    if not is_made_from(path, made_from(job), made_from(job, earlier=True)):
        return False
    return [figures["row"] for _, figures in read_rows(path)] == rows


def read_figures(output: Path, job: AnswerJob) -> dict[int, dict[str, Any]]:
    """Return `token_figures` by row. Empty if the file is missing or of other answers."""
    path = figures_path(output)
    if not is_made_from(path, made_from(job), made_from(job, earlier=True)):
        return {}
    return {figures["row"]: figures for _, figures in read_rows(path)}
