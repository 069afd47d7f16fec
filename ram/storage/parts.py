"""Partial results of an output file, one part file per process: FILE.part, FILE.part-1, ...

A part file is a header with the identity of its inputs, then one JSON line per answer in any order. A resumed
run reads all parts, however many processes wrote them.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from ram.distributed import processes
from ram.errors import UserError
from ram.storage.files import path_in_errors, set_aside


class PartFiles:
    """The part files of one output file.

    Every process of a run creates one at the same time: the constructor contains barriers. Parts with
    another identity are renamed to NAME.old, or removed if `overwrite` is set.

    Attributes:
        done: The answers of earlier runs and of this process, by index.
    """

    def __init__(self, output: Path, identity: str, overwrite: bool) -> None:
        self.output = output
        self.identity = identity
        self.done: dict[int, dict[str, Any]] = {}
        output.parent.mkdir(parents=True, exist_ok=True)
        with processes.rank0_first():
            if processes.is_rank0():
                self._remove_unusable_parts(overwrite)
            for path in self._paths():
                valid_bytes = self._read(path)
                if path == self.path:
                    # Drop a line that was cut off when an earlier run was killed, then append.
                    os.truncate(path, valid_bytes)
        # No process may add answers while another one still reads: their shares of the work would differ.
        processes.barrier()
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        if not self.file.tell():
            self._write({"identity": identity})

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
            header, answers, _ = read_part(path)
            same_inputs = header.get("identity") == self.identity
            if answers and not same_inputs and not overwrite:
                set_aside(path, "begun with other settings, weights or prompts")
            elif not answers or not same_inputs:
                path.unlink()

    def _read(self, path: Path) -> int:
        """Add the answers of a part to `done`; return the number of its valid bytes."""
        _, answers, valid_bytes = read_part(path)
        self.done |= answers
        return valid_bytes

    def _write(self, value: dict[str, Any]) -> None:
        with path_in_errors(self.path):
            self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
            self.file.flush()

    def add(self, value: dict[str, Any]) -> None:
        """Store one answer, a dict with its `index`."""
        self.done[value["index"]] = value
        self._write(value)

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


def read_part(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """Read a part file up to its first damaged line; a killed run may leave a truncated one.

    Returns:
        The header (empty if there is none), the answers by index, and the number of valid bytes.
    """
    header: dict[str, Any] | None = None
    answers: dict[int, dict[str, Any]] = {}
    valid_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict):
                break
            if header is None:
                # A header has no index. Without a valid header the whole part is unusable.
                if "index" in value:
                    break
                header = value
            elif "index" in value:
                answers[value["index"]] = value
            else:
                break
            valid_bytes += len(line)
    return header or {}, answers, valid_bytes
