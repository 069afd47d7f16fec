"""The files of token-level figures (`influence`) beside finished answers."""

from pathlib import Path
from typing import Any

from ram.answers import answer_files, influence
from ram.answers.jobs import AnswerJob
from ram.distributed import processes
from ram.log import log, progress
from ram.storage.files import fingerprint, only_run, read_rows
from ram.storage.parts import PartFiles
from ram.storage.provenance import is_made_from, write_marked


def figures_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.influence.jsonl")


def evenly_spread(n: int, count: int) -> list[int]:
    """Return at most n indices below `count` at about equal distances, the first and the last included."""
    n = min(n, count)
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def made_from(job: AnswerJob, earlier: bool = False) -> str:
    return fingerprint([fingerprint(job.earlier_made_from) if earlier else job.identity, influence.TOP])


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
            figures = influence.token_figures(
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
