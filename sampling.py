"""Whole-file generation that can be stopped and started again.

    rows + settings -> answers appended to FILE.part as they come -> one file in the order of the input

A part file begins with the fingerprint of everything that decides its answers; one with another fingerprint
is never continued. Because a row's text depends only on (seed, row id), a restart gives the file an
uninterrupted run gives.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkpoints
import decoding
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
    pick_device,
    progress,
    read_json,
    replacing,
    write_json,
)


@dataclass(frozen=True)
class Pair:
    """The models of one system by where they lie; either may be None. Loaded only when something is to be
    decoded.
    """

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
        device = pick_device()
        return tuple(
            path and checkpoints.load_model(path, self.dtype, device)
            for path in (self.proposal, self.aligner)
        )


class PartFile:
    """Finished answers of an unfinished file: a header line, then one JSON line per answer, in any order."""

    def __init__(self, path: Path, identity: str, overwrite: bool) -> None:
        self.path, self.done = path, {}
        if path.is_file() and not overwrite:
            self._read(identity)
        if not self.done:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as answers come)

    def _read(self, identity: str) -> None:
        """Takes over the finished answers; a last line that was cut short is dropped and decoded again."""
        good = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except json.JSONDecodeError:
                    value = None
                if value is None:
                    break
                if number == 0 and value.get("identity") != identity:
                    raise UserError(
                        f"{self.path} was begun with other settings, weights or prompts: "
                        "finish that run, or set overwrite=true to begin again"
                    )
                if number:
                    self.done[value["index"]] = value
                good += len(line)
        with open(self.path, "r+b") as file:
            file.truncate(good)

    def add(self, value: dict[str, Any]) -> None:
        self.done[value["index"]] = value
        self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.file.flush()

    def remove(self) -> None:
        self.file.close()
        self.path.unlink()


def generate_file(
    part_path: Path,
    pair: Pair,
    prompts: Sequence[str],
    row_ids: Sequence[int],
    params: PARParams,
    settings,
    *,
    seed: int,
    add_bos: bool,
    overwrite: bool,
    label: str,
) -> tuple[list[dict[str, Any]], PartFile]:
    """Answers all prompts, going on from the part file; returns them in order of the prompts.

    settings: the `sampling` keys max_length, max_prompt_length, stop_str, batch_size, speculative. Each
    answer is a dict of text, finish_reason, stats and, for a pair, tokens and events. The caller removes the
    part file once it has written its result. Raises UserError for tokenizers that differ, before weights are
    read.
    """
    tokenizer, trained_bos = checkpoints.load_pair(pair.proposal, pair.aligner, pair.tokenizer_path)
    if trained_bos is not None and trained_bos != add_bos:
        log.info(f"{label}: add_bos={str(trained_bos).lower()} as the models were trained")
        add_bos = trained_bos
    stop = [settings.stop_str] if settings.stop_str else []
    max_new_tokens = settings.max_length - settings.max_prompt_length
    part = PartFile(
        part_path,
        fingerprint(
            [
                list(prompts),
                list(row_ids),
                pair.law(params),
                stop,
                max_new_tokens,
                seed,
                add_bos,
                pair.dtype,
                settings.max_prompt_length,
                pair.fingerprint(),
            ]
        ),
        overwrite,
    )
    todo = [index for index in range(len(prompts)) if index not in part.done]
    if part.done and todo:
        log.info(f"{label}: going on after {len(part.done)} of {len(prompts)} answers")
    if todo:
        ids, cut = encode_prompts(tokenizer, [prompts[i] for i in todo], settings.max_prompt_length, add_bos)
        if cut:
            log.info(
                f"{label}: {cut} of {len(todo)} prompts cut to max_prompt_length={settings.max_prompt_length}"
            )
        proposal, aligner = pair.load()
        start, tokens = time.monotonic(), 0
        with progress(total=len(prompts), initial=len(part.done), desc=label, unit="row") as bar:
            answers = decoding.generate_iter(
                proposal,
                aligner,
                tokenizer,
                ids,
                params,
                max_new_tokens=max_new_tokens,
                seed=seed,
                row_ids=[row_ids[i] for i in todo],
                stop=stop,
                batch_size=settings.batch_size,
            )
            for position, answer in answers:
                value = {"index": todo[position], "text": answer.text, "finish_reason": answer.finish_reason}
                value["n_tokens"], value["stats"] = len(answer.token_ids), answer.stats
                if answer.events is not None:
                    value["tokens"], value["events"] = pieces(tokenizer, answer.token_ids), answer.events
                part.add(value)
                tokens += len(answer.token_ids)
                bar.update()
        seconds = time.monotonic() - start
        write_json(
            part_path.with_suffix(".speed.json"), {"tokens_per_second": tokens / seconds, "tokens": tokens}
        )
        log.info(
            f"{label}: {len(todo)} answers, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} "
            "tokens/s"
        )
    return [part.done[index] for index in range(len(prompts))], part


def pieces(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """The text that each token adds; what spans several tokens (a split character) stands with the last of
    them.
    """
    found, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found


def sample_training_set(stage, overwrite: bool) -> None:
    """The sample stage: answers every training prompt once with the proposal, beside the rows, key
    `sampling`.

    A finished file of the same inputs is left alone; one of other inputs raises UserError unless overwrite.
    """
    config, output = stage.config, stage.output
    name, settings = config.datasets[0], config.sampling
    bad = BadRows(config.on_bad_row)
    examples = get_dataset(
        name, "all", data_dir=config.data_dir, cache_dir=hub_cache(config.local_dirs), bad=bad
    )
    if settings.limit is not None:
        examples = examples[: settings.limit]
    params = PARParams(**{key: settings[key] for key in PARParams.field_names()})
    pair = Pair(
        proposal=checkpoints.find_model(stage.source),
        aligner=None,
        dtype=settings.dtype,
        tokenizer_path=settings.tokenizer_path,
    )
    inputs = fingerprint(
        [
            [(e.row, e.prompt) for e in examples],
            pair.law(params),
            settings.stop_str,
            config.seed,
            settings.max_length,
            settings.max_prompt_length,
            pair.fingerprint(),
        ]
    )
    if finished(output, inputs, overwrite, f"stage {stage.name}"):
        return
    bad.report(output.with_name(output.name + ".bad_rows.jsonl"))
    answers, part = generate_file(
        output.with_name(output.name + ".part"),
        pair,
        [e.prompt for e in examples],
        [e.row for e in examples],
        params,
        settings,
        seed=config.seed,
        add_bos=config.add_bos,
        overwrite=overwrite,
        label=f"sample {name}",
    )
    rows = [{**e.record, "sampling": a["text"]} for e, a in zip(examples, answers, strict=True)]
    write_marked(output, rows, inputs)
    part.remove()
    log.info(f"saved    {output}")


# ---- files that say what they were made from ---------------------------------------------------------------


def marker(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def finished(path: Path, inputs: str, overwrite: bool, what: str) -> bool:
    """Whether `path` is complete and made from the same inputs; raises UserError where it is somebody
    else's.
    """
    if not path.is_file() or overwrite:
        return False
    meta = read_json(marker(path)) if marker(path).is_file() else {}
    if not meta:
        log.info(f"{what}: {path} was not made here and is used as it is (overwrite=true makes it anew)")
        return True
    if meta.get("inputs") != inputs:
        raise UserError(
            f"{what}: {path} was made from other settings, weights or rows; set overwrite=true to make it "
            "anew, or change data_dir or output_dir to keep both"
        )
    if meta.get("sha256") != file_sha256(path):
        raise UserError(
            f"{what}: {path} was changed or cut short after it was written; set overwrite=true to remake it"
        )
    log.info(f"{what}: done before, {path}")
    return True


def write_marked(path: Path, rows: Sequence[dict[str, Any]], inputs: str) -> None:
    """Writes rows as .json or .jsonl with a marker of what they were made from; the marker comes first.

    A file without a marker counts as the user's own, so at no moment may ours be without.
    """
    with replacing(path) as aside:
        with open(aside, "w", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(list(rows), file, indent=1, ensure_ascii=False)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_json(marker(path), {"inputs": inputs, "rows": len(rows), "sha256": file_sha256(aside)})
