"""Whole-file generation that can be stopped and started again.

    rows + settings -> answers, appended to FILE.part as they come -> one file in the order of the input

Every process answers its share of the rows. Because a row's text depends only on (seed, row id), a restart,
and any number of processes, give the file that one uninterrupted process gives.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ram.answers import endpoints
from ram.data import prompts
from ram.data.tokenization import encode_prompts
from ram.decoding.par import PARParams
from ram.distributed import processes
from ram.errors import UserError
from ram.log import log, pick_device, progress
from ram.models import checkpoints
from ram.storage.files import fingerprint, only_run, read_rows, write_json, write_jsonl
from ram.storage.parts import PartFiles
from ram.storage.provenance import finished, marker, verify, write_marked


@dataclass(frozen=True)
class Pair:
    """The models of one system by where they lie; either may be None."""

    proposal: str | None
    aligner: str | None
    dtype: str = "auto"
    tokenizer_path: str | None = None

    def fingerprint(self) -> list[str | None]:
        return [path and checkpoints.weights_fingerprint(path) for path in (self.proposal, self.aligner)]

    def law(self, params: PARParams) -> dict[str, Any]:
        """The settings that this pair's law reads: one model alone reads only its own."""
        found = params.identity()
        if self.proposal and self.aligner:
            return found
        prefix = "base_" if self.proposal else ""
        keys = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {f"{prefix}{key}": found[f"{prefix}{key}"] for key in keys}


@dataclass(frozen=True)
class Job:
    """A file of answers before it is made: everything that decides them.

    records: the input rows, written back beside the answers, which go under `key`; extra: what else each
    written row gets. settings: the `sampling` keys. label: for the log.
    """

    label: str
    pair: Pair
    params: PARParams
    settings: Any
    records: list[dict[str, Any]]
    prompts: list[str]
    row_ids: list[int]
    seed: int
    add_bos: bool
    key: str
    extra: dict[str, Any]

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_length - self.settings.max_prompt_length

    @property
    def drafter(self) -> str | None:
        """The small model that drafts where one model decodes alone; it changes no text."""
        alone = self.pair.proposal is None or self.pair.aligner is None
        return checkpoints.find_model(self.settings.drafter) if alone and self.settings.drafter else None

    def load(self):
        """(proposal, aligner, drafter), each on the device that the settings give it, or None."""
        devices = (self.settings.proposal_device, self.settings.aligner_device)
        devices = [pick_device(device) for device in devices]
        devices.append(devices[0] if self.pair.proposal else devices[1])
        paths = (self.pair.proposal, self.pair.aligner, self.drafter)
        return tuple(
            path and checkpoints.load_model(path, self.pair.dtype, device)
            for path, device in zip(paths, devices, strict=True)
        )

    @property
    def stop(self) -> list[str]:
        return [self.settings.stop_str] if self.settings.stop_str else []

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Everything that decides the answers; equal exactly where two jobs give the same file."""
        pair, settings = self.pair, self.settings
        weights = dict(zip(("proposal", "aligner"), pair.fingerprint(), strict=True))
        if settings.backend == "endpoint":
            server = settings.endpoint
            weights |= {"endpoint": server.model or list(server.urls), "endpoint.send": server.send}
        return {
            **weights,
            **pair.law(self.params),
            "rows": fingerprint([self.records, self.prompts, self.row_ids]),
            "dtype": pair.dtype,
            "tokenizer_path": pair.tokenizer_path,
            "seed": self.seed,
            "add_bos": self.add_bos,
            "max_length": settings.max_length,
            "max_prompt_length": settings.max_prompt_length,
            "stop_str": settings.stop_str,
            "key": self.key,
            **self.extra,
        }

    @property
    def identity(self) -> str:
        return fingerprint(self.made_from)

    @functools.cached_property
    def encoded(self):
        """The tokenizer and all prompts as ids; raises UserError where the pair does not fit together."""
        tokenizer, trained_bos = checkpoints.load_pair(
            self.pair.proposal, self.pair.aligner, self.pair.tokenizer_path, self.drafter
        )
        for path in (self.pair.proposal, self.pair.aligner, self.drafter):
            checkpoints.check_context(path, self.settings.max_length)
        add_bos = self.add_bos if trained_bos is None else trained_bos
        if add_bos != self.add_bos:
            log.info(f"{self.label}: add_bos={str(add_bos).lower()}, as the models were trained")
        ids, cut = encode_prompts(tokenizer, self.prompts, self.settings.max_prompt_length, add_bos)
        if empty := [row for row, given in zip(self.row_ids, ids, strict=True) if not given]:
            raise UserError(
                f"{self.label}: the prompt of row {empty[0]} is empty; a model needs a first token"
            )
        settings = self.settings
        if cut and settings.template != prompts.TEMPLATE and not settings.multiround:
            raise UserError(
                f"{self.label}: {cut} prompts are longer than "
                f"max_prompt_length={settings.max_prompt_length}, and only "
                f"those of template {prompts.TEMPLATE!r} can be cut without losing a header: raise the length"
            )
        if cut:
            log.info(
                f"{self.label}: {cut} of {len(ids)} prompts cut to {self.settings.max_prompt_length} tokens"
            )
        return tokenizer, ids


def answer_all(job: Job, parts: PartFiles) -> None:
    """Makes this process's share of the answers that the parts lack.

    An answer is a dict of index, text, finish_reason, n_tokens, stats and, for a pair, tokens, token_ids and
    events.
    """
    todo = [index for index in range(len(job.prompts)) if index not in parts.done]
    if not todo:
        return
    if parts.done:
        log.info(f"{job.label}: going on after {len(parts.done)} of {len(job.prompts)} answers")
    mine = todo[processes.rank() :: processes.count()]
    start, tokens, failed = time.monotonic(), 0, []
    answer = endpoints.answers if job.settings.backend == "endpoint" else decoded
    with progress(total=len(mine), desc=job.label, unit="row") as bar:
        for value in answer(job, mine):
            bar.update()
            if "failed" in value:
                failed.append({"row": job.row_ids[value["index"]], "reason": value["failed"]})
                continue
            parts.add(value)
            tokens += value["n_tokens"]
    parts.close()
    report_failed(job, parts, [row for part in processes.all_gather(failed) for row in part])
    tokens = int(processes.all_sum({"tokens": tokens})["tokens"])
    seconds = max(processes.all_gather(time.monotonic() - start))
    if processes.is_rank0():
        speed = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        write_json(speed_path(parts.output), speed)
    log.info(
        f"{job.label}: {len(todo)} answers, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} "
        "tokens/s"
    )


def report_failed(job: Job, parts: PartFiles, failed: list[dict[str, Any]]) -> None:
    """Lists the rows that no answer came to, and raises UserError where there are any."""
    path = parts.output.with_name(f"{parts.output.name}.failed.jsonl")
    if processes.is_rank0():
        path.unlink(missing_ok=True)
        if failed:
            write_jsonl(path, sorted(failed, key=lambda row: row["row"]))
    if failed:
        raise UserError(
            f"{job.label}: {len(failed)} of {len(job.prompts)} rows got no answer, listed in {path}; the "
            "others are kept, the same command asks for these again"
        )


def decoded(job: Job, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Answers to some rows of a job by its models, here."""
    from ram.decoding import generation

    tokenizer, ids = job.encoded
    with processes.in_turn():
        proposal, aligner, drafter = job.load() if rows else (None, None, None)
    if not rows:
        return
    answers = generation.generate_iter(
        proposal,
        aligner,
        tokenizer,
        [ids[i] for i in rows],
        job.params,
        max_new_tokens=job.max_new_tokens,
        seed=job.seed,
        row_ids=[job.row_ids[i] for i in rows],
        stop=job.stop,
        batch_size=job.settings.batch_size,
        speculative=job.settings.speculative,
        drafter=drafter,
        cuda_graphs=job.settings.cuda_graphs,
    )
    for position, answer in answers:
        value = {"index": rows[position], "text": answer.text, "finish_reason": answer.finish_reason}
        value |= {"n_tokens": len(answer.token_ids), "stats": answer.stats}
        if answer.events is not None:
            value |= {"tokens": pieces(tokenizer, answer.token_ids), "token_ids": answer.token_ids}
            value |= {"events": answer.events}
        yield value


def pieces(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; a character split over tokens stands with the last of them."""
    found, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(token_ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found


def answer_file(output: Path, job: Job, overwrite: bool) -> None:
    """Makes `output`: every record with its answer under `job.key`, in order of the input.

    A finished file of the same job is left alone, one of another job is set aside, an unfinished one goes on
    where it stopped. The answers' figures go to OUTPUT.trace.jsonl. All processes call it together.
    """
    with only_run(output):
        _answer_file(output, job, overwrite)


def _answer_file(output: Path, job: Job, overwrite: bool) -> None:
    if processes.from_rank0(lambda: finished(output, job.made_from, overwrite, job.label)):
        return
    _ = job.encoded  # what cannot work is said before anything is written
    parts = PartFiles(output, job.identity, overwrite)
    answer_all(job, parts)
    processes.barrier()
    if processes.is_rank0():
        answers = parts.collect(len(job.prompts))
        write_jsonl(trace_path(output), answers)
        rows = [
            {**row, job.key: answer["text"], **job.extra}
            for row, answer in zip(job.records, answers, strict=True)
        ]
        write_marked(output, rows, job.made_from, trace_path(output))
        parts.remove()
    processes.barrier()
    log.info(f"saved    {output}")


def read_answers(output: Path, job: Job) -> list[dict[str, Any]]:
    """What `answer_file` kept of every answer; raises UserError where the file is not this job's,
    finished.
    """
    if not output.is_file():
        raise UserError(f"{job.label}: no answers in {output.parent}: run evaluation.steps=[generate] first")
    if not marker(output).is_file():
        raise UserError(f"{job.label}: {output} was not made here; move it away, or set overwrite=true")
    verify(output, job.made_from, job.label)
    return [answer for _, answer in read_rows(trace_path(output))]


def speed_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.speed.json")


def trace_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.trace.jsonl")
