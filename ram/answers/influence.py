"""How the aligner moved each token of finished answers, from one forward of each model over every answer.

    prompt and answer as token ids -> both models' logits at all positions -> par.next_token_law -> figures

The plain loop draws from the same laws one position at a time, so the figures are its own up to the rounding
of a longer forward. Whether a token fell back is not decided again here: decoding recorded it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ram.answers import answer_files
from ram.answers.jobs import Job
from ram.decoding.par import PARParams, next_token_law, seen_mask, warp
from ram.decoding.reference import eos_token_ids, wide
from ram.distributed import processes
from ram.log import log, progress
from ram.storage.files import fingerprint, only_run, read_rows
from ram.storage.parts import PartFiles
from ram.storage.provenance import is_made_from, write_marked

TOP = 4  # candidates kept of each model at every position
AT_ONCE = 2**22  # logits whose laws are computed together; bounds the memory, changes nothing


@torch.inference_mode()
def token_figures(
    proposal, aligner, tokenizer, prompt_ids: Sequence[int], answer_ids: Sequence[int], params: PARParams
) -> dict[str, list | None]:
    """What a pair's law said at each token of an answer, as lists of one entry per token.

    logp: log p of the token by the pair's law; None in place of the list for snis, whose law hangs on the
    candidates it draws. logp_proposal: by the proposal's own law at its settings, which is what fell-back and
    "agreed" mean; logp - logp_proposal is the aligner's influence. Both are nats, None where the token is
    outside the law. kl: KL(P_M || Q) in nats. candidates: [text, by the proposal's law, by the aligner's own
    law, by p] of the most likely tokens of either and of the token itself, the likeliest first, p None for
    snis.
    """
    if not answer_ids:
        return {"logp": [], "logp_proposal": [], "kl": [], "candidates": []}
    z_p = answer_logits(proposal, tokenizer, prompt_ids, answer_ids)
    z_q = answer_logits(aligner, tokenizer, prompt_ids, answer_ids).to(z_p.device)
    eos, fixed = eos_token_ids(tokenizer, proposal, aligner), params.sample_mode != "snis"
    known = params if fixed else replace(params, sample_mode="par")  # what is not p is the same in all modes
    drawn = torch.as_tensor(list(answer_ids), device=z_p.device)
    seen = seen_mask(torch.as_tensor([list(prompt_ids)], device=z_p.device), len(tokenizer))
    found: dict[str, list] = {"logp": [], "logp_proposal": [], "kl": [], "candidates": []}
    size = max(1, AT_ONCE // len(tokenizer))
    for start in range(0, len(drawn), size):
        part, tokens = slice(start, start + size), drawn[start : start + size]
        seen = seen.expand(len(tokens), -1).clone()
        for place, token in enumerate(tokens[:-1], start=1):
            seen[place:, token] = True
        law = next_token_law(z_p[part], z_q[part], known, seen, eos)
        laws = [law.proposal_logprobs, warp(wide(z_q[part]), params, seen), law.logprobs]
        at = [each.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist() for each in laws]
        found["logp_proposal"] += map(finite, at[0])
        found["logp"] += map(finite, at[2])
        found["kl"] += map(finite, law.kl.tolist())
        found["candidates"] += candidates(tokenizer, laws, tokens, fixed)
        seen = seen[-1:].index_fill(1, tokens[-1:], True)
    return found if fixed else found | {"logp": None}


def answer_logits(model, tokenizer, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> torch.Tensor:
    """(T, V): the logits that each of T answer tokens was drawn from, cut to the vocabulary."""
    ids = torch.as_tensor([[*prompt_ids, *answer_ids[:-1]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer_ids)).logits
    return logits[0, :, : len(tokenizer)]


def candidates(tokenizer, laws: list[torch.Tensor], tokens: torch.Tensor, fixed: bool) -> list[list[list]]:
    """`token_figures`' candidates from the three laws (R, V) of some positions and their tokens (R,)."""
    best = [law.topk(min(TOP, law.shape[-1]), dim=-1) for law in laws[:2]]
    ids = torch.cat([tokens.unsqueeze(-1), *(top.indices for top in best)], dim=-1)
    # Of a law with fewer than TOP tokens the rest of its best is arbitrary.
    inside = torch.cat([torch.ones_like(ids[:, :1]), *(top.values.isfinite() for top in best)], dim=-1)
    values = torch.stack([law.gather(-1, ids).exp() for law in laws], dim=-1)
    found = []
    for row, mask, triples in zip(ids.tolist(), inside.tolist(), values.tolist(), strict=True):
        known = {i: triple for i, keep, triple in zip(row, mask, triples, strict=True) if keep}
        order = sorted(known, key=lambda i: (known[i][2] * fixed, *known[i]), reverse=True)
        shown = [[word(tokenizer, i), *map(finite, known[i])] for i in order]
        found.append(shown if fixed else [[*candidate[:3], None] for candidate in shown])
    return found


def word(tokenizer, token_id: int) -> str:
    """A token by itself, as text; one that is no text of its own as the vocabulary writes it."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token_id))


def finite(value: float) -> float | None:
    """A number to six digits, for a file; None for one that is infinite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ---- the file of figures -----------------------------------------------------------------------------------


def figures_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.influence.jsonl")


def evenly_spread(n: int, count: int) -> list[int]:
    """At most n indices below `count`, the first and the last among them, at about equal distances."""
    n = min(n, count)
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def made_from(job: Job) -> str:
    return fingerprint([job.identity, TOP])


def figures_file(output: Path, job: Job, n: int, overwrite: bool) -> None:
    """Makes the file of figures beside the finished answers in `output`, for n rows spread evenly over them.

    A file of the same answers and rows is left alone; an unfinished one goes on where it stopped. Answers of
    older runs, which have no token ids, get a line in the log instead. All processes call it together.
    """
    path, picked = figures_path(output), evenly_spread(n, len(job.prompts))
    with only_run(path):
        if not picked or processes.from_first(lambda: not overwrite and is_finished(path, job, picked)):
            return
        answers = answer_files.read_answers(output, job)
        if any("token_ids" not in answers[row] for row in picked):
            log.info(
                f"{job.label}: no influence per token, for these answers were kept without their token ids; "
                "generate them again (overwrite=true) to have it"
            )
            return
        parts = PartFiles(path, fingerprint([made_from(job), picked]), overwrite)
        todo = [index for index in range(len(picked)) if index not in parts.done]
        mine = todo[processes.rank() :: processes.count()]
        tokenizer, prompt_ids = job.encoded
        with processes.in_turn():
            proposal, aligner, _ = job.load() if mine else (None, None, None)
        for index in progress(mine, desc=f"{job.label}: influence", unit="row"):
            row = picked[index]
            given = prompt_ids[row], answers[row]["token_ids"], job.params
            parts.add({"index": index, "row": row, **token_figures(proposal, aligner, tokenizer, *given)})
        parts.close()
        processes.wait()
        if processes.is_first():
            write_marked(path, parts.everything(len(picked)), made_from(job))
            parts.remove()
        processes.wait()
        log.info(f"saved    {path}")


def is_finished(path: Path, job: Job, picked: list[int]) -> bool:
    return is_made_from(path, made_from(job)) and [row["row"] for _, row in read_rows(path)] == picked


def read_figures(output: Path, job: Job) -> dict[int, dict[str, Any]]:
    """`token_figures` by row, of the rows that have them; none where the file is not of these answers."""
    path = figures_path(output)
    if not is_made_from(path, made_from(job)):
        return {}
    return {figures["row"]: figures for _, figures in read_rows(path)}
