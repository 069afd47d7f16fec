"""Whole-file generation that can be stopped and started again.

    rows + settings -> answers appended to FILE.part as they come -> one file in the order of the input

A part file begins with the fingerprint of everything that decides its answers; one with another fingerprint
is never continued. Because a row's text depends only on (seed, row id), a restart gives the file an
uninterrupted run gives.
"""

import functools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoints
import decoding
import prompts
from par import PARParams
from preference_datasets import get_dataset
from tokenization import encode_prompts
from utils import (
    BadRows,
    UserError,
    file_sha256,
    fingerprint,
    hub_cache,
    log,
    naming,
    pick_device,
    progress,
    read_json,
    read_rows,
    replacing,
    write_json,
    write_jsonl,
)


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
        found = asdict(params)
        if self.proposal and self.aligner:
            return found
        prefix = "base_" if self.proposal else ""
        keys = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {f"{prefix}{key}": found[f"{prefix}{key}"] for key in keys}

    def load(self):
        """(proposal, aligner) on the device."""
        device, paths = pick_device(), (self.proposal, self.aligner)
        return tuple(path and checkpoints.load_model(path, self.dtype, device) for path in paths)


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

    @property
    def stop(self) -> list[str]:
        return [self.settings.stop_str] if self.settings.stop_str else []

    @functools.cached_property
    def identity(self) -> str:
        """Equal exactly where two jobs give the same file."""
        pair, settings = self.pair, self.settings
        return fingerprint(
            [
                self.records,
                self.prompts,
                self.row_ids,
                pair.law(self.params),
                pair.dtype,
                self.seed,
                pair.tokenizer_path,
                pair.fingerprint(),
                self.add_bos,
                settings.max_length,
                settings.max_prompt_length,
                settings.stop_str,
                self.key,
                self.extra,
            ]
        )

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


class PartFile:
    """Finished answers of an unfinished file: a header line, then one JSON line per answer, in any order."""

    def __init__(self, path: Path, identity: str, overwrite: bool) -> None:
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        good = self._read(identity, overwrite) if path.is_file() else 0
        if not self.done:
            path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        else:
            os.truncate(path, good)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as answers come)

    def _read(self, identity: str, overwrite: bool) -> int:
        """Takes over the finished answers and returns how many bytes of the file hold them.

        From the first damaged line on, as a cut leaves one, answers are dropped and will be decoded again.
        """
        header, good = None, 0
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    value = None
                if not isinstance(value, dict) or ("index" not in value) == (header is not None):
                    break
                good += len(line)
                if header is None:
                    header = value
                else:
                    self.done[value["index"]] = value
        if self.done and header.get("identity") != identity:
            self.done = {}
            if not overwrite:
                raise UserError(
                    f"{self.path} was begun with other settings, weights or prompts: "
                    "finish that run, or set overwrite=true to begin again"
                )
        return good

    def add(self, value: dict[str, Any]) -> None:
        self.done[value["index"]] = value
        with naming(self.path):
            self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
            self.file.flush()

    def remove(self) -> None:
        self.file.close()
        self.path.unlink()


def answer_all(job: Job, part: PartFile) -> list[dict[str, Any]]:
    """Decodes what the part file lacks; returns all answers in order of the prompts.

    An answer is a dict of index, text, finish_reason, n_tokens, stats and, for a pair, tokens and events.
    """
    todo = [index for index in range(len(job.prompts)) if index not in part.done]
    if not todo:
        return [part.done[index] for index in range(len(job.prompts))]
    if part.done:
        log.info(f"{job.label}: going on after {len(part.done)} of {len(job.prompts)} answers")
    tokenizer, ids = job.encoded
    proposal, aligner = job.pair.load()
    drafter = job.drafter and checkpoints.load_model(job.drafter, job.pair.dtype, pick_device())
    start, tokens = time.monotonic(), 0
    with progress(total=len(ids), initial=len(part.done), desc=job.label, unit="row") as bar:
        answers = decoding.generate_iter(
            proposal,
            aligner,
            tokenizer,
            [ids[i] for i in todo],
            job.params,
            max_new_tokens=job.max_new_tokens,
            seed=job.seed,
            row_ids=[job.row_ids[i] for i in todo],
            stop=job.stop,
            batch_size=job.settings.batch_size,
            speculative=job.settings.speculative,
            drafter=drafter,
            cuda_graphs=job.settings.cuda_graphs,
        )
        for position, answer in answers:
            value = {"index": todo[position], "text": answer.text, "finish_reason": answer.finish_reason}
            value |= {"n_tokens": len(answer.token_ids), "stats": answer.stats}
            if answer.events is not None:
                value |= {"tokens": pieces(tokenizer, answer.token_ids), "events": answer.events}
            part.add(value)
            tokens += len(answer.token_ids)
            bar.update()
    seconds = time.monotonic() - start
    speed = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    write_json(speed_path(part.path.with_suffix("")), speed)
    log.info(
        f"{job.label}: {len(todo)} answers, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} "
        "tokens/s"
    )
    return [part.done[index] for index in range(len(job.prompts))]


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

    A finished file of the same job is left alone; an unfinished one goes on where it stopped. The answers'
    figures go to OUTPUT.trace.jsonl. Raises UserError where the file is another job's and overwrite is not
    set.
    """
    if finished(output, job.identity, overwrite, job.label):
        return
    _ = job.encoded  # what cannot work is said before anything is written
    part = PartFile(output.with_name(f"{output.name}.part"), job.identity, overwrite)
    answers = answer_all(job, part)
    write_jsonl(trace_path(output), answers)
    rows = [
        {**row, job.key: answer["text"], **job.extra}
        for row, answer in zip(job.records, answers, strict=True)
    ]
    write_marked(output, rows, job.identity, trace_path(output))
    part.remove()
    log.info(f"saved    {output}")


def read_answers(output: Path, job: Job) -> list[dict[str, Any]]:
    """What `answer_file` kept of every answer; raises UserError where the file is not this job's,
    finished.
    """
    if not output.is_file():
        raise UserError(f"{job.label}: no answers in {output.parent}: run evaluation.steps=[generate] first")
    if not marker(output).is_file():
        raise UserError(f"{job.label}: {output} was not made here; move it away, or set overwrite=true")
    verify(output, job.identity, job.label)
    return [answer for _, answer in read_rows(trace_path(output))]


def speed_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.speed.json")


def trace_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.trace.jsonl")


def sample_job(stage) -> tuple[Job, BadRows]:
    """What a sample stage has to decode: every training prompt once, the answer under the key `sampling`."""
    config, settings = stage.config, stage.config.sampling
    name, bad = config.datasets[0], BadRows(config.on_bad_row)
    examples = get_dataset(
        name, "all", data_dir=config.data_dir, cache_dir=hub_cache(config.local_dirs), bad=bad
    )
    examples = examples[: settings.limit]
    job = Job(
        label=f"stage {stage.name}",
        pair=Pair(checkpoints.find_model(stage.source), None, settings.dtype, settings.tokenizer_path),
        params=PARParams(**{key: settings[key] for key in PARParams.field_names()}),
        settings=settings,
        records=[example.record for example in examples],
        prompts=[example.prompt for example in examples],
        row_ids=[example.row for example in examples],
        seed=config.seed,
        add_bos=config.add_bos,
        key="sampling",
        extra={},
    )
    return job, bad


def sample_training_set(stage, overwrite: bool) -> None:
    """The sample stage: answers every training prompt once with the proposal."""
    job, bad = sample_job(stage)
    bad.report(stage.output.with_name(f"{stage.output.name}.bad_rows.jsonl"))
    answer_file(stage.output, job, overwrite)


# ---- files that say what they were made from ---------------------------------------------------------------


def marker(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def finished(path: Path, inputs: str, overwrite: bool, what: str) -> bool:
    """Whether `path` is complete and made from the same inputs; raises UserError where it is somebody
    else's.
    """
    if not path.is_file() or overwrite:
        return False
    if not marker(path).is_file():
        log.info(f"{what}: {path} was not made here and is used as it is (overwrite=true makes it anew)")
        return True
    verify(path, inputs, what)
    log.info(f"{what}: done before, {path}")
    return True


def verify(path: Path, inputs: str, what: str) -> None:
    """Raises UserError where a marked file was made from other inputs, or is no longer what was written."""
    meta = read_json(marker(path))
    if not isinstance(meta, dict) or meta.get("inputs") != inputs or not isinstance(meta.get("sha256"), dict):
        raise UserError(
            f"{what}: {path} was made from other settings, weights or rows; set overwrite=true to make it "
            "anew, or change data_dir or output_dir to keep both"
        )
    for name, digest in meta["sha256"].items():
        file = path.with_name(name)
        if not file.is_file() or file_sha256(file) != digest:
            raise UserError(
                f"{what}: {file} was changed or cut short after it was written; set overwrite=true to "
                "remake it"
            )


def is_made_from(path: Path, inputs: str) -> bool:
    """Whether a marked file is there, whole, and made from these inputs."""
    if not (path.is_file() and marker(path).is_file()):
        return False
    try:
        verify(path, inputs, path.name)
    except UserError:
        return False
    return True


def write_marked(path: Path, rows: Sequence[dict[str, Any]], inputs: str, *beside: Path) -> None:
    """Writes rows as .json or .jsonl with a marker of what they, and the files `beside`, were made from.

    The marker comes first: a file without one counts as the user's own, so at no moment may ours be without.
    """
    with replacing(path) as aside:
        with open(aside, "w", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(list(rows), file, indent=1, ensure_ascii=False)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        digests = {path.name: file_sha256(aside)} | {other.name: file_sha256(other) for other in beside}
        write_json(marker(path), {"inputs": inputs, "rows": len(rows), "sha256": digests})
