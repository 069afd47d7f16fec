"""Errors for users, hints for unknown names, and the exit codes of entry points."""

import contextlib
import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the user's input; its one-line message has the value, what is expected, and a remedy."""


PREEMPTED = 75  # exit code of a run that was stopped by SIGTERM and can be resumed


class Preempted(BaseException):
    """The run was stopped by a signal after saving what it needs to resume."""


def _preempt(number: int, frame: FrameType | None) -> None:
    raise Preempted(number)


def _wait_for_torchrun(seconds: float) -> None:
    """Give torchrun time to end this process quietly after another rank has reported the error."""
    try:
        time.sleep(seconds)
    except Preempted:
        raise SystemExit(PREEMPTED) from None


def run_entry_point(main: Callable[[], T]) -> T:
    """Run an entry point; turn the user's errors and signals into one line on stderr and an exit code.

    Exit codes: 2 for UserError and OSError, 130 for Ctrl-C, PREEMPTED for SIGTERM, 1 if another process
    of the run ended. Any other exception keeps its traceback.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # signal handlers can be set in the main thread only
            signal.signal(signal.SIGTERM, _preempt)
    rank = os.environ.get("RANK", "0")
    try:
        return main()
    except UserError as error:
        source = ""
        if rank != "0":
            # Usually every rank has the same error: rank 0 reports it, then torchrun ends the others.
            _wait_for_torchrun(3)
            source = f" (process {rank})"
        print(f"error: {error}{source}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        place = f"{error.filename2 or error.filename}: " if error.filename is not None else ""
        reason = str(error.strerror or error).strip().split("\n")[0]
        advice = "fix that (exists? writable? disk full?), then run the same command again to continue"
        print(f"error: {place}{reason}; {advice}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        # gloo and NCCL raise "... closed by peer" if another rank is gone; that rank has the real error.
        if "RANK" not in os.environ or "peer" not in str(error):
            raise
        _wait_for_torchrun(10)
        print("error: another process ended", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, Preempted) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or error.args == (signal.SIGINT,)
        if rank == "0":
            print("\nstopped: finished work is kept; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130 if interrupted else PREEMPTED) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: the closest known name, then all names unless there are many."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if len(names) <= 40:
        return f"{hint}Known: {', '.join(names)}"
    return hint.rstrip() or f"{len(names)} others are known"


def pick(table: Mapping[str, T], name: str | None, kind: str) -> T:
    """Return table[name]; raises UserError with the nearest key if there is none.

    Args:
        table: The choices by name.
        name: The user's choice.
        kind: A word for the message, such as "loss".
    """
    if name is None or name not in table:
        raise UserError(f"unknown {kind} {name!r}: {nearest(str(name), table)}")
    return table[name]
