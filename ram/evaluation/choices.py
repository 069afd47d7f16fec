"""Print the settings with the highest likelihood in a sweep, as arguments for the evaluation of another file.

    mapfile -t CHOSEN < <(python -m ram.evaluation.choices REPORT/likelihood_sweep.csv)
    python pipeline.py experiment=NAME evaluation.test_file=OTHER.jsonl "${CHOSEN[@]}"

Only keys that likelihood may decide are printed, see docs/likelihood.md. The rows that choose must not be
those that are reported.
"""

import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ram.errors import UserError, run_entry_point
from ram.settings.overrides import system_override
from ram.storage.files import path_in_errors

COLUMNS = {"system", "key", "value", "nll", "chosen"}


def choices(path: Path) -> list[str]:
    """Return one override for each system and key of a sweep, with the value of the lowest nats per token.

    Raises:
        UserError: the file is missing, or no sweep.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: run pipeline.py with evaluation.likelihood_sweep first")
    with path_in_errors(path), open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or not set(lines[0]) >= COLUMNS:
        raise UserError(
            f"{path} is not a likelihood_sweep.csv: expected the columns {', '.join(sorted(COLUMNS))}"
        )
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for line in lines:
        groups.setdefault((line["system"], line["key"]), []).append(line)
    best = {
        place: min(group, key=lambda line: float(line["nll"]))
        for place, group in groups.items()
        if any(line["chosen"] for line in group)
    }
    quoted = [system_override(name, key, line["value"]) for (name, key), line in best.items()]
    return [shlex.split(argument)[0] for argument in quoted]


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    if len(arguments) != 1:
        raise UserError("expected: python -m ram.evaluation.choices REPORT/likelihood_sweep.csv")
    sys.stdout.write("".join(f"{line}\n" for line in choices(Path(arguments[0]))))


if __name__ == "__main__":
    run_entry_point(lambda: main(sys.argv[1:]))
