"""Partial results of an output file, one part file per process: FILE.part, FILE.part-1, ...

A part file is a header with the identity of its inputs, then one JSON line per answer in any order. Each line
has a digest, so that a damaged one is made again. A resumed run reads all parts, however many processes wrote
them.
"""

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ram.distributed import processes
from ram.errors import UserError
from ram.log import log
from ram.storage.files import fingerprint, path_in_errors, set_aside, write_jsonl
from ram.storage.json_text import BadJSON, dumps, loads
from ram.storage.records import is_of

CHECK = "check"  # key of a line's digest
ELAPSED = "elapsed"  # key of the seconds since its process began; it falls where another session begins
ROW = "row_key"  # key of the digest of an answer's input row, if the answers can be told apart by it


@dataclass
class Part:
    """The content of a part file up to its first damaged line."""

    header: dict[str, Any] = field(default_factory=dict)  # empty if there is none
    answers: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of all sessions that wrote it
    valid_bytes: int = 0


class PartFiles:
    """The part files of one output file.

    Every process of a run creates one at the same time: the constructor contains barriers. Parts with
    another identity are renamed to NAME.old, or removed if `overwrite` is set.

    Args:
        output: the output file.
        identity: digest of everything that decides an answer besides its row.
        overwrite: begin anew.
        rows: a digest of each row. An answer is then found by its row, also if rows were added or removed
            since. None finds it by its index.
        earlier: other identities to accept, whose answers are found by index.

    Attributes:
        done: The answers of earlier runs and of this process, by index.
        seconds, tokens: The time that earlier sessions took, of the process that took longest, and the
            `n_tokens` of their answers.
    """

    def __init__(
        self,
        output: Path,
        identity: str,
        overwrite: bool,
        rows: Sequence[str] | None = None,
        earlier: Sequence[str] = (),
    ) -> None:
        self.output, self.identity, self.earlier = output, identity, earlier
        self.rows = rows
        self.index_of = {row: index for index, row in enumerate(rows or ())}
        self.done: dict[int, dict[str, Any]] = {}
        self.seconds, self.tokens = 0.0, 0
        output.parent.mkdir(parents=True, exist_ok=True)
        with processes.rank0_first():
            if processes.is_rank0():
                self._remove_unusable_parts(overwrite)
            for path in self._paths():
                part = self._read(path)
                if part.seconds:
                    self.seconds = max(self.seconds, part.seconds)
                    self.tokens += sum(answer.get("n_tokens", 0) for answer in part.answers)
                if path == self.path:
                    # Drop a line that was cut off when an earlier run was killed, then append.
                    os.truncate(path, part.valid_bytes)
        # No process may add answers while another one still reads: their shares of the work would differ.
        processes.barrier()
        self.start = time.monotonic()
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        if not self.file.tell():
            self._write(header(identity))

    @property
    def path(self) -> Path:
        """The part file of this process."""
        suffix = f"-{processes.rank()}" if processes.rank() else ""
        return self.output.with_name(f"{self.output.name}.part{suffix}")

    def _paths(self) -> list[Path]:
        name = re.compile(re.escape(f"{self.output.name}.part") + r"(-\d+)?")
        return sorted(path for path in self.output.parent.iterdir() if name.fullmatch(path.name))

    def _remove_unusable_parts(self, overwrite: bool) -> None:
        for path in self._paths():
            part = read_part(path)
            is_usable = bool(self._answers(part))
            if part.answers and not is_usable and not overwrite:
                set_aside(path, "begun with other settings, weights or prompts")
            elif not is_usable:
                path.unlink()

    def _read(self, path: Path) -> Part:
        """Add the answers of a part to `done`; return the part."""
        part = read_part(path)
        self.done |= self._answers(part)
        return part

    def _answers(self, part: Part) -> dict[int, dict[str, Any]]:
        """Return a part's answers to the rows of this file, by index."""
        identity = part.header.get("identity")
        if self.rows is not None and identity == self.identity:
            found = [(self.index_of.get(str(answer.get(ROW))), answer) for answer in part.answers]
        elif identity in (self.identity, *self.earlier):
            found = [(answer["index"], answer) for answer in part.answers]
        else:
            found = []
        return {index: answer | {"index": index} for index, answer in found if index is not None}

    def _write(self, value: dict[str, Any]) -> None:
        with path_in_errors(self.path):
            self.file.write(dumps(value) + "\n")
            self.file.flush()

    def add(self, value: dict[str, Any]) -> None:
        """Store one answer, a dict with its `index`."""
        if self.rows is not None:
            value = value | {ROW: self.rows[value["index"]]}
        self.done[value["index"]] = value
        self._write(checked(value | {ELAPSED: round(time.monotonic() - self.start, 3)}))

    def collect(self, count: int) -> list[dict[str, Any]]:
        """Return the `count` answers of all processes in order; raises UserError if one is missing."""
        self.close()
        for path in self._paths():
            self._read(path)
        missing = [index for index in range(count) if index not in self.done]
        if missing:
            raise UserError(
                f"{self.output}: {len(missing)} of {count} answers are missing from its parts, the first is "
                f"number {missing[0]}; run the same command again to create them"
            )
        return [self.done[index] for index in range(count)]

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        """Delete the parts of all processes."""
        self.close()
        for path in self._paths():
            path.unlink()


def write_part(output: Path, identity: str, answers: Iterable[dict[str, Any]]) -> None:
    """Write a part with answers that are known already, each with its `index` and ROW.

    No process has a part of this name: the first one's has no number.
    """
    lines = [header(identity), *(checked(answer) for answer in answers)]
    write_jsonl(output.with_name(f"{output.name}.part-0"), lines)


def header(identity: str) -> dict[str, Any]:
    """Return the first line of a part file. Earlier versions wrote no CHECK in any line."""
    return {"identity": identity, CHECK: True}


def checked(value: dict[str, Any]) -> dict[str, Any]:
    """Return a line of a part file with its digest."""
    stored = loads(dumps(value))
    return stored | {CHECK: fingerprint(stored)[:16]}


def read_part(path: Path) -> Part:
    """Read a part file up to its first damaged line; a killed run may leave a truncated one."""
    part, elapsed = Part(), 0.0
    with open(path, "rb") as file:
        for line in file:
            value = _value_of(line)
            if not part.header:
                # A header has no index. Without a valid header the whole part is unusable.
                if value is None or "index" in value:
                    break
                part.header = value
            else:
                check = value.pop(CHECK, None) if value else None
                is_unchecked = check is None and CHECK not in part.header  # of an earlier version
                if (
                    value is None
                    or not (is_unchecked or check == fingerprint(value)[:16])
                    or not is_of(value.get("index"), int)
                ):
                    log.warning(f"{path}: damaged or cut short; answers from there on are made again")
                    break
                now = value.pop(ELAPSED, elapsed)
                part.seconds += now - elapsed if now >= elapsed else now
                elapsed = now
                part.answers.append(value)
            part.valid_bytes += len(line)
    return part


def _value_of(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line, None if it is cut short, damaged or something else."""
    try:
        value = loads(line) if line.endswith(b"\n") else None
    except BadJSON:
        return None
    return value if isinstance(value, dict) else None
