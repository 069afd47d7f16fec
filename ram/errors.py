"""Errors that users see, hints for unknown names, and how an entry point ends."""

import contextlib
import difflib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave: says what was given, what was expected and what to do, in one line."""


PREEMPTED = 75  # exit code of a run that was told to stop (SIGTERM): the same command goes on


class Preempted(BaseException):
    """Somebody told the run to stop; what it needs to go on is saved."""


def _preempt(number: int, frame) -> None:
    raise Preempted(number)


def _give_way(seconds: float) -> None:
    """Lets torchrun end this process quietly, where another one has said what is wrong."""
    try:
        time.sleep(seconds)
    except Preempted:
        raise SystemExit(PREEMPTED) from None


def run_entry_point(main: Callable[[], Any]) -> Any:
    """Runs an entry point: a UserError or OSError becomes one line and exit code 2, Ctrl-C one line and 130,
    SIGTERM one line and PREEMPTED.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, _preempt)
    try:
        return main()
    except UserError as error:
        later = int(os.environ.get("RANK", 0))
        if later:  # of many with the same error the first process says it, then torchrun ends the others
            _give_way(3)
        print(f"error: {error}" + f" (process {later})" * bool(later), file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        place = f"{error.filename2 or error.filename}: " if error.filename is not None else ""
        reason = str(error.strerror or error).strip().split("\n")[0]
        advice = "mend that (is it there, may it be written, is there space?), then the same command goes on"
        print(f"error: {place}{reason}; {advice}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if "RANK" not in os.environ or "peer" not in str(error):
            raise
        _give_way(10)
        print("error: another process ended", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, Preempted) as error:
        ended = isinstance(error, Preempted) and error.args != (signal.SIGINT,)
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped: what is finished stands, the same command goes on from there", file=sys.stderr)
        raise SystemExit(PREEMPTED if ended else 130) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"{hint}Known: {', '.join(known)}"
        if len(known) <= 40
        else hint.rstrip() or f"{len(known)} others are known"
    )


def require_in(settings: object, interval: str, *keys: str) -> None:
    """Raise ValueError if a setting is outside an interval such as "[1, inf)". None is accepted.

    Args:
        settings: an object with the keys as attributes.
        interval: round brackets exclude an end.
        keys: names of numbers.
    """
    low, high = map(float, interval[1:-1].split(", "))
    for key in keys:
        value = getattr(settings, key)
        if value is None:
            continue
        is_above = value > low or (value == low and interval[0] == "[")
        is_below = value < high or (value == high and interval[-1] == "]")
        if not (is_above and is_below):
            raise ValueError(f"{key}={value}: expected a number in {interval}")


def pick(table: dict[str, Any], name: str, what: str) -> Any:
    """table[name], or a UserError that names the nearest key."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: {nearest(str(name), table)}")
    return table[name]
