"""Changes one expression of the code at a time and looks whether the tests of its room notice.

    python benchmarks/mutations.py decoding evaluation --count 30 --log mutations.jsonl

A seeded sample of all possible changes is tried in a copy of the checkout: comparisons, arithmetic, `and` and
`or`, `not`, constants, ranges, returned values, in decorated functions as in others. The test files that name
the changed module run first. A change survives if all tests pass. A test that takes too long has noticed it.
Each result is a line of the log; a run that was stopped continues there. The survivors are for a person to
read: a new test, or an argument why nothing observable changed.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
EXCHANGED: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class Mutation(NamedTuple):
    """One change: the text from `start` to `end` (in bytes) of a file becomes `new`."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line}: {self.old} -> {self.new}"


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """Yield what an expression is replaced by."""
    match node:
        case ast.Compare(left, [op, *ops], comparators) if type(op) in EXCHANGED:
            yield ast.Compare(left, [EXCHANGED[type(op)](), *ops], comparators)
        case ast.BinOp(left, op, right) if type(op) in EXCHANGED:
            yield ast.BinOp(left, EXCHANGED[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(EXCHANGED[type(op)](), values)
        case ast.UnaryOp(ast.Not(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Call(ast.Name("range") as function, [*first, last], keywords):
            yield ast.Call(function, [*first, ast.BinOp(last, ast.Sub(), ast.Constant(1))], keywords)


def mutations(path: Path) -> list[Mutation]:
    """Return all changes of a file. Annotations stay as they are."""
    text = path.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree, found = ast.parse(text), []
    annotations: set[ast.AST] = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if (given := getattr(node, field, None)) is not None:
                annotations.update(ast.walk(given))
        if isinstance(node, ast.JoinedStr):  # the text of messages
            annotations.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in annotations:
            continue
        if isinstance(node, ast.Return) and node.value is not None:
            pairs = [(node.value, ast.Constant(None))]
        else:
            pairs = [(node, new) for new in changed(node)]
        for old, new in pairs:
            assert isinstance(old, ast.expr) and old.end_lineno is not None
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + (old.end_col_offset or 0)
            texts = text[start:end].decode(), f"({ast.unparse(new)})"
            if texts[0] != "None":
                found.append(Mutation(str(path.relative_to(ROOT)), old.lineno, start, end, *texts))
    return found


def sample(room: str, count: int, seed: int) -> list[Mutation]:
    """Return `count` changes of a room of `ram/`; more are the same ones, then others."""
    possible = [
        mutation for path in sorted((ROOT / "ram" / room).rglob("*.py")) for mutation in mutations(path)
    ]
    random.Random(f"{room} {seed}").shuffle(possible)
    return possible[:count]


def copy_checkout(folder: Path) -> None:
    """Copy all files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def test_files(room: str, module: str) -> list[str]:
    """Return the test files of a room, those that name a module first."""
    files = sorted((ROOT / "tests" / room).glob("test_*.py"))
    names = {path: module in path.read_text(encoding="utf-8") or module in path.stem for path in files}
    return [str(path.relative_to(ROOT)) for path in sorted(files, key=lambda path: not names[path])]


def run_tests(folder: Path, files: list[str], seconds: float) -> str:
    """Run test files in a checkout; return "passed", the first test that failed, or "too slow"."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "--tb=no", *files]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "too slow"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "passed" if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rooms", nargs="+", help="folders of ram/ with tests of the same name")
    parser.add_argument("--count", type=int, default=100, help="of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("mutations.jsonl"))
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run of the tests")
    args = parser.parse_args()
    done = {}
    if args.log.is_file():
        rows = map(json.loads, args.log.read_text(encoding="utf-8").splitlines())
        done = {row["mutation"]: row["result"] for row in rows}
    survivors, total = [], 0
    with tempfile.TemporaryDirectory() as name, open(args.log, "a", encoding="utf-8") as log:
        folder = Path(name)
        copy_checkout(folder)
        for room in args.rooms:
            for mutation in sample(room, args.count, args.seed):
                total += 1
                if mutation.key not in done:
                    path, start = folder / mutation.path, time.monotonic()
                    text = path.read_bytes()
                    path.write_bytes(text[: mutation.start] + mutation.new.encode() + text[mutation.end :])
                    files = test_files(room, path.stem)
                    done[mutation.key] = run_tests(folder, files, args.seconds)
                    path.write_bytes(text)
                    row = {"mutation": mutation.key, "result": done[mutation.key]}
                    row["seconds"] = round(time.monotonic() - start, 1)
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                print(f"{done[mutation.key]:12}  {mutation.key}", flush=True)
                if done[mutation.key] == "passed":
                    survivors.append(mutation.key)
    print(f"\n{total - len(survivors)} of {total} changes were noticed; survivors:", *survivors, sep="\n  ")


if __name__ == "__main__":
    main()
