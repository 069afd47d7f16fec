"""The interface of a judge, the cache of its answers, and the table of all judges.

Each other module here defines one judge and names it `JUDGE`; its settings are in config/judge/NAME.yaml.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ram.evaluation import judges
from ram.log import log
from ram.storage.files import path_in_errors
from ram.storage.json_text import BadJSON, dumps, loads
from ram.storage.records import is_sealed, sealed

# `preference` in [0, 1] for the system's answer (1/2 is a tie) and other values that a judge reports. If a
# judgement failed it has `failed`, the reason, instead of a preference.
Judgement = dict[str, Any]
Rows = Sequence[dict[str, Any]]
Texts = Sequence[str]


@dataclass(frozen=True)
class Judge:
    """Compares two answers to the same instruction. Its fields are the keys of its YAML file."""

    name: str
    warning = ""  # a line for the log, the tables and the report; no setting

    def for_task(self, task: str) -> Self:
        """Return the judge with settings that depend on the task's name filled in."""
        return self

    def check(self) -> None:
        """Raise UserError if the judge cannot work with its settings."""

    def identity(self) -> dict[str, Any]:
        """Return everything that decides a judgement. It is hashed into the keys of saved judgements."""
        key = getattr(self, "instruction_key", "instruction")  # the field that the judge is shown
        return {"name": self.name} | ({} if key == "instruction" else {"instruction_key": key})

    def earlier_identity(self) -> dict[str, Any]:
        """Return the identity by earlier versions, whose judgements are still used."""
        return self.identity()

    def describe(self) -> str:
        """Return model and criterion for the leaderboard, empty if the judge has neither."""
        return ""

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        """Return a judgement for each row.

        Args:
            rows: records of the test file.
            answers: the system's answers, in the order of the rows.
            references: the texts to compare them with.
            cache: file of the answers that this judge gave before; it may not exist yet.
        """
        raise NotImplementedError


def load_judges() -> dict[str, type[Judge]]:
    """Return all judges by name: the class `JUDGE` of each module in this folder."""
    names = [module.name for module in pkgutil.iter_modules(judges.__path__, f"{judges.__name__}.")]
    modules = map(importlib.import_module, names)
    return {module.JUDGE.name: module.JUDGE for module in modules if hasattr(module, "JUDGE")}


class Cache:
    """Answers of a judge by content, in an append-only file with one sealed record per line.

    A line that was cut short or changed is left out: the judge is asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        self.separator = ""
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            self.separator = "" if text.endswith("\n") else "\n"  # ends a line that was cut short
            damaged = 0
            for line in text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"):
                if (record := _record_of(line)) is None:
                    damaged += 1
                else:
                    self.known[record["key"]] = record["value"]
            if damaged:
                log.warning(f"{path}: {damaged} damaged or cut lines are left out; the judge is asked again")

    def add(self, key: str, value: Any) -> None:
        self.known[key] = value
        with path_in_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self.separator + dumps(sealed({"key": key, "value": value})) + "\n")
            self.separator = ""


def _record_of(line: str) -> dict[str, Any] | None:
    """Return the record in a line, None if it is cut short, changed or something else."""
    try:
        record = loads(line)
    except BadJSON:
        return None
    if not isinstance(record, dict) or not is_sealed(record):
        return None
    return record if isinstance(record.get("key"), str) and "value" in record else None
