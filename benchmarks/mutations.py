"""Changes one expression of the code at a time and looks whether the tests notice.

    python benchmarks/mutations.py decoding evaluation --count 30 --log mutations.jsonl

A seeded sample of all possible changes is tried in a copy of the checkout: comparisons, arithmetic, `and`
and `or`, `not`, constants, ranges, returned values, in decorated functions as in others. Each test runs
once with a tracer, which notes the lines that it reaches. A change is tried with the tests that reach its
line, in a fork of a process that has imported and collected them all; the file on the disk is changed too,
for tests that start processes. A change survives if all of them pass. A test that takes too long has
noticed it. Each result is a line of the log; a run that was stopped continues there, even if other lines of
the code have changed. The survivors are for a person to read: a new test (`--again` tries them once more),
or an argument why nothing observable changed.
"""

import argparse
import ast
import compileall
import hashlib
import itertools
import json
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from forked_tests import Runner, Tracer

ROOT = Path(__file__).resolve().parents[1]
# Tests outside of a room that run its code. Those of pages in a browser are slow, so they are left out.
OTHERS = ("tests/test_*.py",)
LEFT_OUT = ("test_report_page.py", "test_packaging.py", "test_docs.py", "test_console.py")
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
    count: int  # earlier changes of this file with the same texts
    live: bool  # whether it is inside a function, whose code can be exchanged in a running process

    @property
    def key(self) -> str:
        """A name that stays the same if other lines change."""
        return f"{self.path}: {self.old} -> {self.new} #{self.count}"


def changed(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the replacements of an expression."""
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


def mutations(path: Path, root: Path) -> list[Mutation]:
    """Return all changes of a file. Annotations stay as they are."""
    text = path.read_bytes()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree, found, counts = ast.parse(text), [], Counter()
    annotations: set[ast.AST] = set()
    live: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            live.update(part for statement in node.body for part in ast.walk(statement))
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
                name = str(path.relative_to(root))
                found.append(Mutation(name, old.lineno, start, end, *texts, counts[texts], old in live))
                counts[texts] += 1
    return found


def sample(root: Path, room: str, count: int, seed: int) -> list[Mutation]:
    """Return `count` changes of a room of `ram/`; more are the same ones, then others."""
    possible = [change for path in (root / "ram" / room).rglob("*.py") for change in mutations(path, root)]
    possible.sort(key=lambda change: hashlib.sha256(f"{seed} {change.key}".encode()).digest())
    return possible[:count]


def copy_checkout(folder: Path) -> None:
    """Copy all files that git does not ignore, and compile them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # A hash, because a changed file may have the same size and time as the one before.
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(folder, quiet=2, invalidation_mode=mode)


# ---- choosing tests ----------------------------------------------------------------------------------------


def reached_lines(runner: Runner, path: Path) -> dict[str, dict[str, Any]]:
    """Return, per test file, what its tests reach; only files that changed since `path` was written run."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    files: dict[str, list[str]] = defaultdict(list)
    for name in runner.items:
        files[name.split("::")[0]].append(name)
    for name, tests in files.items():
        digest = hashlib.sha256((runner.folder / name).read_bytes()).hexdigest()
        if known.get(name, {}).get("digest") != digest:
            result = runner.run(tests, 900, lines=True)
            known[name] = result._asdict() | {"digest": digest}
            print(f"{sum(result.seconds.values()):6.1f} s  {name}", *result.failed, flush=True)
            path.write_text(json.dumps(known), encoding="utf-8")
    return {name: known[name] for name in files}


def tests_of(change: Mutation, reached: dict[str, dict[str, Any]], room: str) -> list[tuple[float, str]]:
    """Return (seconds, test) of the tests that reach a change, the most telling first."""
    place = f"{change.path.removeprefix('ram/')}:{change.line}"
    module = place.split(":")[0] + ":"
    chosen, stem = [], Path(change.path).stem
    for rule in (lambda hits: place in hits, lambda hits: any(hit.startswith(module) for hit in hits)):
        for file, record in reached.items():
            everywhere = rule(record["hits"].get(file, ()))
            for test, seconds in record["seconds"].items():
                if test not in record["failed"] and (everywhere or rule(record["hits"].get(test, ()))):
                    far = (stem not in file) + 2 * (f"tests/{room}/" not in file)
                    chosen.append(((1 + far) * (0.2 + seconds), seconds, test))
        if chosen:  # the second rule is for lines that run while a module is imported
            break
    return [(seconds, test) for _, seconds, test in sorted(chosen)]


def try_change(runner: Runner, change: Mutation, tests: list[tuple[float, str]], seconds: float) -> str:
    """Return "passed", or the first test that failed: at first a few quick ones run, then all."""
    path, done = runner.folder / change.path, 0
    text, before = path.read_bytes(), path.with_suffix(".whole")
    before.write_bytes(text)
    for end in (5, 30, len(tests)):
        part = tests[done:end]
        while part:
            path.write_bytes(text[: change.start] + change.new.encode() + text[change.end :])
            limit = min(seconds, 30 + 5 * sum(taken for taken, _ in part))
            names = [name for _, name in part]
            failed = runner.run(names, limit, changed=path, live=change.live).failed
            path.write_bytes(text)
            if failed and runner.passes(failed[0]):
                return failed[0]
            part = [test for test in part if failed and test[1] != failed[0]]
        done = max(done, end)
    before.unlink()
    return "passed" if tests else "not reached"


class Loop:
    """A plugin of pytest that tries changes in place of running the tests."""

    def __init__(self, folder: Path, args: argparse.Namespace, tracer: Tracer) -> None:
        self.folder, self.args, self.tracer = folder, args, tracer

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try_all(Runner(self.folder, session.items, self.tracer), self.args)
        return True


def try_all(runner: Runner, args: argparse.Namespace) -> None:
    """Try the changes that the log does not have yet, and list the survivors."""
    done: dict[str, str] = {}
    if args.log.is_file():
        rows = map(json.loads, args.log.read_text(encoding="utf-8").splitlines())
        done = {row["mutation"]: row["result"] for row in rows}
    reached = reached_lines(runner, args.log.with_suffix(".tests.json"))
    samples = [
        [(room, change) for change in sample(runner.folder, room, args.count, args.seed)]
        for room in args.rooms
    ]
    changes = [pair for pairs in itertools.zip_longest(*samples) for pair in pairs if pair is not None]
    with open(args.log, "a", encoding="utf-8") as log:
        for room, change in changes:
            survived = done.get(change.key) in ("passed", "not reached")
            if change.key not in done or (survived and args.again):
                start = time.monotonic()
                tests = tests_of(change, reached, room)
                done[change.key] = try_change(runner, change, tests, args.seconds)
                row = {"mutation": change.key, "line": change.line, "result": done[change.key]}
                row |= {"tests": len(tests), "seconds": round(time.monotonic() - start, 1)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(f"{done[change.key]:12}  {change.path}:{change.line}  {change.key}", flush=True)
    for room in args.rooms:
        own = [change for other, change in changes if other == room]
        left = [change for change in own if done[change.key] in ("passed", "not reached")]
        print(f"\n{room}: {len(own) - len(left)} of {len(own)} changes were noticed; survivors:")
        print(*(f"  {change.path}:{change.line}  {change.key}" for change in left), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rooms", nargs="+", help="folders of ram/ with tests of the same name")
    parser.add_argument("--count", type=int, default=100, help="of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("mutations.jsonl"))
    parser.add_argument("--again", action="store_true", help="try the changes that survived once more")
    parser.add_argument("--seconds", type=float, default=600, help="limit of one run of the tests")
    args = parser.parse_args()
    args.log = args.log.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy_checkout(folder)
        os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        os.chdir(folder)
        sys.path[:] = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)]
        patterns = [*(f"tests/{room}/test_*.py" for room in args.rooms), *OTHERS]
        files = dict.fromkeys(str(file) for pattern in patterns for file in sorted(folder.glob(pattern)))
        files = [file for file in files if Path(file).name not in LEFT_OUT]
        tracer = Tracer(folder)
        options = ["-qs", "-p", "no:cacheprovider", f"--rootdir={folder}"]
        pytest.main([*options, *files], plugins=[tracer, Loop(folder, args, tracer)])


if __name__ == "__main__":
    main()
