"""Tests of a checkout, imported and collected once, that run in forks: traced, or with changed code."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol


class Tracer:
    """A plugin of pytest that notes the lines of `ram/` which each test reaches, while `hits` is a dict."""

    def __init__(self, root: Path) -> None:
        self.root = f"{root}/ram/"
        self.hits: dict[str, set[tuple[str, int]]] | None = None
        self.current: set[tuple[str, int]] = set()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename.startswith(self.root):
            return self.trace_lines
        return None

    def trace_lines(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.current.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace_lines

    @contextlib.contextmanager
    def tracing(self, name: str) -> Iterator[None]:
        if self.hits is not None:
            self.current = self.hits[name]
            threading.settrace(self.trace)
            sys.settrace(self.trace)
        yield
        sys.settrace(None)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        # What a fixture of the module reaches, every test of the file may depend on.
        with self.tracing(item.nodeid.split("::")[0]):
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with self.tracing(item.nodeid):
            yield

    def lines(self) -> dict[str, list[str]]:
        hits = self.hits or {}
        return {
            name: sorted(f"{path.removeprefix(self.root)}:{line}" for path, line in lines)
            for name, lines in hits.items()
        }


class Result(NamedTuple):
    """Results of some tests: the seconds of each, those that failed, and the lines that they reached."""

    seconds: dict[str, float]
    failed: list[str]
    hits: dict[str, list[str]]


def functions_by_file() -> dict[str, list[FunctionType]]:
    """Return all functions of this process by the file of their code."""
    gc.unfreeze()
    found: dict[str, list[FunctionType]] = defaultdict(list)
    for value in gc.get_objects():
        if isinstance(value, FunctionType):
            found[value.__code__.co_filename].append(value)
    gc.freeze()  # so that a collection in a fork copies no pages
    return found


def codes_of(path: Path, text: str) -> dict[tuple[str, int], CodeType]:
    """Return the code of each function in a file, by its name and its number among those of one name."""

    def inside(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield constant
                yield from inside(constant)

    counts: Counter[str] = Counter()
    found = {}
    for code in sorted(set(inside(compile(text, str(path), "exec"))), key=lambda code: code.co_firstlineno):
        found[code.co_qualname, counts[code.co_qualname]] = code
        counts[code.co_qualname] += 1
    return found


def exchange(path: Path, functions: Sequence[FunctionType]) -> bool:
    """Give every function of a changed file its new code; return whether that was possible."""
    new = codes_of(path, path.read_text(encoding="utf-8"))
    old = codes_of(path, path.with_suffix(".whole").read_text(encoding="utf-8"))
    names = {code: name for name, code in old.items()}
    try:
        for function in functions:
            if (name := names.get(function.__code__)) is not None:
                function.__code__ = new[name]
    except (ValueError, KeyError):  # another number of free variables
        return False
    return True


class Fresh:
    """A plugin that notes what failed in a session of its own."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus not in (0, 1, 5):
            self.failed.append(f"exit status {exitstatus}")


def processor_seconds(process: int | None) -> float:
    """Return the seconds that a process has computed; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Runner:
    """Runs collected tests in forks of this process."""

    def __init__(self, folder: Path, items: Sequence[pytest.Item], tracer: Tracer) -> None:
        self.folder, self.tracer = folder, tracer
        self.items = {item.nodeid: item for item in items}
        self.functions = functions_by_file()
        self.sound: dict[str, bool] = {}

    def run(
        self,
        tests: Sequence[str],
        seconds: float,
        lines: bool = False,
        changed: Path | None = None,
        live: bool = False,
    ) -> Result:
        """Run tests in a fork; `failed` of the result is empty if all passed.

        Args:
            seconds: Limit of the time that it computes, and of the time that it waits.
            lines: Note the lines that each test reaches.
            changed: A file that has changed; beside it NAME.whole has its text before.
            live: Whether the change is inside a function.
        """
        receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self._in_fork, args=(tests, lines, changed, live, sender))
        process.start()
        sender.close()
        result, last = Result({}, ["too slow"], {}), (time.monotonic(), 0.0)
        while (used := processor_seconds(process.pid)) < seconds:
            if receiver.poll(1):
                try:
                    result = receiver.recv()
                except EOFError:
                    result = Result({}, ["the process ended"], {})
                break
            if used > last[1] + 0.2:  # on a busy machine it may be slow
                last = time.monotonic(), used
            elif time.monotonic() - last[0] > seconds:  # it waits for something that never comes
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return result

    def passes(self, test: str) -> bool:
        """Return whether a test passes without any change; it runs once."""
        if test in self.items and test not in self.sound:
            self.sound[test] = not self.run([test], 600).failed
        return self.sound.get(test, True)

    def _in_fork(
        self, tests: Sequence[str], lines: bool, changed: Path | None, live: bool, pipe: Any
    ) -> None:
        os.setsid()  # so that the processes that tests start end with this one
        with open(os.devnull, "r+b") as nothing:
            for number in range(3):
                os.dup2(nothing.fileno(), number)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        try:
            if changed is not None and not (live and exchange(changed, self.functions[str(changed)])):
                result = self._afresh(tests)
            else:
                result = self._protocols(tests, lines)
        except BaseException as error:  # an entry point may end the process
            result = Result({}, [f"{type(error).__name__} outside of a test"], {})
        pipe.send(result)
        os._exit(0)

    def _protocols(self, tests: Sequence[str], lines: bool) -> Result:
        seconds: dict[str, float] = defaultdict(float)
        failed: list[str] = []
        self.tracer.hits = defaultdict(set) if lines else None
        # In the order of collection, so that fixtures of a module are made once.
        chosen = set(tests)
        items = [item for name, item in self.items.items() if name in chosen]
        for item, following in itertools.zip_longest(items, items[1:]):
            for report in runtestprotocol(item, log=False, nextitem=following):
                seconds[item.nodeid] += report.duration
                if report.failed:
                    failed.append(item.nodeid)
            if failed and not lines:
                break
        return Result(dict(seconds), failed, self.tracer.lines())

    def _afresh(self, tests: Sequence[str]) -> Result:
        """Import everything again, for a change of what runs while a module is imported."""
        sys.dont_write_bytecode = True
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{self.folder}/"):
                del sys.modules[name]
        recorder = Fresh()
        options = ["-xq", "-p", "no:cacheprovider", "--tb=no", f"--rootdir={self.folder}"]
        pytest.main([*options, *tests], plugins=[recorder])
        return Result({}, recorder.failed, {})
