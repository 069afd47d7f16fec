"""Make and read whole files of answers. A run can be stopped at any time and continued later.

    rows + settings -> answers, appended to FILE.part as they finish -> one file in the order of the input

Each process answers its share of the rows. The text of a row depends only on (seed, row id), so restarts and
the number of processes do not change the file.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ram.answers import endpoints, served_pairs
from ram.answers.jobs import AnswerJob, without_rows
from ram.data.text import token_texts
from ram.distributed import processes
from ram.errors import UserError
from ram.log import log, progress
from ram.storage.files import file_sha256, fingerprint, only_run, read_rows, write_jsonl
from ram.storage.parts import ROW, PartFiles, write_part
from ram.storage.provenance import (
    Manifest,
    finished,
    marker,
    read_manifest,
    read_marker,
    verify,
    write_marked,
)
from ram.storage.records import Form, read_record, write_record

# ---- making a file -----------------------------------------------------------------------------------------


def answer_file(output: Path, job: AnswerJob, overwrite: bool) -> bool:
    """Make the file `output`: every record with its answer under `job.key`, in the order of the input.

    A finished file of the same job is kept, a file of another job is renamed to `NAME.old`, and an unfinished
    file is continued. Details of the answers go to OUTPUT.trace.jsonl. All processes must call this together.

    Returns:
        Whether there was anything to do.
    """
    with only_run(output):
        return _answer_file(output, job, overwrite)


def _answer_file(output: Path, job: AnswerJob, overwrite: bool) -> bool:
    def is_finished() -> bool:
        if not overwrite and (reused := answers_of_other_rows(output, job)):
            write_part(output, job.answer_identity, reused.values())
            log.info(f"{job.label}: {len(reused)} answers of a file of other rows are used again")
        return finished(output, job.made_from, overwrite, job.label, job.earlier_made_from)

    if processes.from_rank0(is_finished):
        return False
    _ = job.encoded  # raises if the job cannot work, before anything is written
    earlier = [fingerprint(job.made_from), fingerprint(job.earlier_made_from)]
    parts = PartFiles(output, job.answer_identity, overwrite, job.row_keys, earlier)
    answer_all(job, parts)
    processes.barrier()
    if processes.is_rank0():
        answers = parts.collect(len(job.prompts))
        write_jsonl(trace_path(output), answers)
        rows = [
            {**record, job.key: answer["text"], **job.extra} | cut_mark(job, answer)
            for record, answer in zip(job.records, answers, strict=True)
        ]
        write_marked(output, rows, job.made_from, trace_path(output))
        parts.remove()
    processes.barrier()
    log.info(f"saved    {output}")
    return True


def cut_mark(job: AnswerJob, answer: dict[str, Any]) -> dict[str, str]:
    """Return what a written row says of an answer that was cut at the length limit."""
    is_cut = job.cut_key and answer.get("finish_reason") == "length"
    return {job.cut_key: "length"} if job.cut_key and is_cut else {}


def answers_of_other_rows(output: Path, job: AnswerJob) -> dict[int, dict[str, Any]]:
    """Return answers by index from finished files that differ from the job in their rows only.

    `sampling.limit` changes which rows are answered, but no answer. The file set aside last counts, too.
    """
    answers: dict[int, dict[str, Any]] = {}
    index_of = {key: index for index, key in enumerate(job.row_keys)}
    if not output.is_file() or not marker(output).is_file():
        return answers
    if not read_marker(output).changes(job.made_from, job.earlier_made_from):
        return answers  # it is the finished file itself
    for suffix in (".old", ""):
        meta, trace = (path.with_name(path.name + suffix) for path in (marker(output), trace_path(output)))
        if not (meta.is_file() and trace.is_file()):
            continue
        with contextlib.suppress(UserError):  # damaged: made again
            manifest, record = read_manifest(meta, "made_from", "sha256", "")
            rest = Manifest(without_rows(manifest.made_from), {})
            if rest.changes(without_rows(job.made_from), without_rows(job.earlier_made_from)):
                continue
            if manifest.files.get(trace_path(output).name) != file_sha256(trace):
                continue
            rows = [row for _, row in read_rows(trace)]
            if record["made_from"].get("rows") == job.rows_until(len(rows)):
                # Earlier versions stored no ROW.
                rows = [row | {ROW: key} for row, key in zip(rows, job.row_keys, strict=False)]
            answers |= {index_of[row[ROW]]: row for row in rows if row.get(ROW) in index_of}
    return {index: answer | {"index": index} for index, answer in answers.items()}


def answer_all(job: AnswerJob, parts: PartFiles) -> None:
    """Make this process's share of the answers that are not in `parts` yet.

    An answer is a dict with index, text, finish_reason, n_tokens and stats. The answer of a pair also has
    tokens, token_ids and events.

    Raises:
        UserError: Some rows got no answer. The other answers are kept.
    """
    missing = [index for index in range(len(job.prompts)) if index not in parts.done]
    if not missing:
        return
    if parts.done:
        log.info(f"{job.label}: resuming after {len(parts.done)} of {len(job.prompts)} answers")
    share = missing[processes.rank() :: processes.count()]
    start = time.monotonic()
    n_tokens = 0
    failures: list[dict[str, Any]] = []
    make_answers = decode_locally
    if job.settings.backend == "endpoint":
        make_answers = served_pairs.answers if job.pair.is_pair else endpoints.answers
    with progress(total=len(share), desc=job.label, unit="row") as bar:
        for answer in make_answers(job, share):
            bar.update()
            if "failed" in answer:
                failures.append({"row": job.row_ids[answer["index"]], "reason": answer["failed"]})
                continue
            parts.add(answer)
            n_tokens += answer["n_tokens"]
    parts.close()
    all_failures = [failure for process in processes.all_gather(failures) for failure in process]
    report_failures(job, parts, all_failures)
    total_tokens = int(processes.all_sum({"tokens": n_tokens})["tokens"])
    seconds = max(processes.all_gather(time.monotonic() - start))
    tokens_per_second = total_tokens / seconds
    if processes.is_rank0():
        write_speed(parts, total_tokens, seconds)
    log.info(
        f"{job.label}: {len(missing)} answers, {total_tokens:,} tokens in {seconds:.1f} s, "
        f"{tokens_per_second:,.0f} tokens/s"
    )


def write_speed(parts: PartFiles, tokens: int, seconds: float) -> None:
    """Write the tokens and seconds of all sessions that made a file.

    Args:
        parts: the file's answers; those of earlier sessions count with the time that they took.
        tokens: of this session.
        seconds: of this session.
    """
    tokens += parts.tokens
    seconds += parts.seconds
    speed = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    write_record(speed_path(parts.output), speed)


def read_speed(output: Path) -> dict[str, Any] | None:
    """Return the tokens and seconds that a file took; None if that is unknown."""
    path = speed_path(output)
    if not path.is_file():
        return None
    form: Form = dict.fromkeys(("tokens", "seconds", "tokens_per_second"), int | float)
    try:
        return read_record(path, form, "the time of these answers is left out")
    except UserError as error:
        log.warning(str(error))
        return None


def report_failures(job: AnswerJob, parts: PartFiles, failures: list[dict[str, Any]]) -> None:
    """Write the rows without an answer to OUTPUT.failed.jsonl, and raise UserError if there are any."""
    path = parts.output.with_name(f"{parts.output.name}.failed.jsonl")
    if processes.is_rank0():
        path.unlink(missing_ok=True)
        if failures:
            write_jsonl(path, sorted(failures, key=lambda failure: failure["row"]))
    if failures:
        raise UserError(
            f"{job.label}: {len(failures)} of {len(job.prompts)} rows got no answer, listed in {path}; "
            "the other answers are kept: run the same command again to retry these rows"
        )


def decode_locally(job: AnswerJob, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the answers to some prompts of a job, decoded by the job's models in this process."""
    from ram.decoding import generation

    tokenizer, prompt_ids = job.encoded
    with processes.in_turn():  # one after the other, so that the host holds one copy of the weights
        proposal, aligner, drafter = job.load() if indices else (None, None, None)
    if not indices:
        return
    generations = generation.generate_iter(
        proposal,
        aligner,
        tokenizer,
        [prompt_ids[i] for i in indices],
        job.params,
        max_new_tokens=job.max_new_tokens,
        seed=job.seed,
        row_ids=[job.row_ids[i] for i in indices],
        stop=job.stops(tokenizer),
        batch_size=job.settings.batch_size,
        speculative=job.settings.speculative,
        drafter=drafter,
        cuda_graphs=job.settings.cuda_graphs,
    )
    for position, generated in generations:
        answer = {
            "index": indices[position],
            "text": generated.text,
            "finish_reason": generated.finish_reason,
            "n_tokens": len(generated.token_ids),
            "stats": generated.stats,
        }
        if generated.events is not None:
            answer["tokens"] = token_texts(tokenizer, generated.token_ids, marks=True)
            answer["token_ids"] = generated.token_ids
            answer["events"] = generated.events
        yield answer


# ---- reading a file ----------------------------------------------------------------------------------------


def read_answers(output: Path, job: AnswerJob) -> list[dict[str, Any]]:
    """Return the answers that `answer_file` made for this job, in the order of the input.

    Raises:
        UserError: The file is missing, unfinished, changed, or of another job.
    """
    if not output.is_file():
        raise UserError(f"{job.label}: no answers in {output.parent}: run evaluation.steps=[generate] first")
    if not marker(output).is_file():
        raise UserError(
            f"{job.label}: {output} was not made by this program; move it away, or set overwrite=true"
        )
    verify(output, job.made_from, job.label, job.earlier_made_from)
    return [answer for _, answer in read_rows(trace_path(output))]


def speed_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.speed.json")


def trace_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.trace.jsonl")
