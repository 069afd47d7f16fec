"""Finished answers of a file that is not finished, one part per process: FILE.part, FILE.part-1, ...

A part is a header that says what its answers are made from, then one JSON line per answer in any order. A run
goes on from all parts it finds, by however many processes they were written.
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
    """The parts of one file; `done` holds, by index, the answers of earlier runs and of this process.

    Parts of other inputs are set aside, or removed where they may be overwritten. All processes make one
    together. Raises UserError where another run is writing the same file.
    """

    def __init__(self, output: Path, identity: str, overwrite: bool) -> None:
        self.output, self.identity, self.done = output, identity, {}
        output.parent.mkdir(parents=True, exist_ok=True)
        with processes.rank0_first():
            if processes.is_rank0():
                self._make_room(overwrite)
            for path in self._paths():
                good = self._read(path)
                if path == self.path:
                    os.truncate(path, good)
        processes.barrier()  # nobody adds an answer while another still reads what is there
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as answers come)
        if not self.file.tell():
            self._write({"identity": identity})

    @property
    def path(self) -> Path:
        """This process's own part."""
        later = f"-{processes.rank()}" if processes.rank() else ""
        return self.output.with_name(f"{self.output.name}.part{later}")

    def _paths(self) -> list[Path]:
        name = re.compile(re.escape(f"{self.output.name}.part") + r"(-\d+)?")
        return sorted(path for path in self.output.parent.iterdir() if name.fullmatch(path.name))

    def _make_room(self, overwrite: bool) -> None:
        for path in self._paths():
            header, answers, _ = read_part(path)
            if answers and header.get("identity") != self.identity and not overwrite:
                set_aside(path, "begun with other settings, weights or prompts")
            elif not answers or header.get("identity") != self.identity:
                path.unlink()

    def _read(self, path: Path) -> int:
        _, answers, good = read_part(path)
        self.done |= answers
        return good

    def _write(self, value: dict[str, Any]) -> None:
        with path_in_errors(self.path):
            self.file.write(json.dumps(value, ensure_ascii=False) + "\n")
            self.file.flush()

    def add(self, value: dict[str, Any]) -> None:
        """Keeps an answer, a dict with its `index`."""
        self.done[value["index"]] = value
        self._write(value)

    def collect(self, count: int) -> list[dict[str, Any]]:
        """The `count` answers of all processes, in order; raises UserError where one is missing."""
        self.close()
        for path in self._paths():
            self._read(path)
        if missing := [index for index in range(count) if index not in self.done]:
            raise UserError(
                f"{self.output}: {len(missing)} of {count} answers are missing from its parts, the first is "
                f"number {missing[0]}; the same command makes them"
            )
        return [self.done[index] for index in range(count)]

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        self.close()
        for path in self._paths():
            path.unlink()


def read_part(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """A part's header, its answers by index, and how many bytes of the file hold them.

    From the first damaged line on, as a cut leaves one, answers are dropped and will be made again.
    """
    header, answers, good = None, {}, 0
    with open(path, "rb") as file:
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
                answers[value["index"]] = value
    return header or {}, answers, good
