"""What every other file may use: user errors, records on disk, fingerprints, devices, progress."""

import contextlib
import difflib
import functools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

log = logging.getLogger("ram")


class UserError(Exception):
    """A mistake in what the user gave: says what was given, what was expected and what to do, in one line."""


def setup_logging(log_file: Path | None = None) -> None:
    """Sends the project's log to stdout, past any progress bar, and, where given, to a file too."""

    class TqdmHandler(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            line = self.format(record)
            if sys.stderr.isatty():
                tqdm.write(line, file=sys.stdout)
            else:
                sys.stdout.write(line + "\n")
            sys.stdout.flush()

    log.handlers[:] = [TqdmHandler()]
    log.handlers[0].setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        handler.handleError = lambda record: None  # a full disk: what it cannot write stands on the console
        log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    log.propagate = False
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # transformers draws a bar for every model it loads; ours say what takes long.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_transformers() -> None:
    """Silences transformers' own progress bars and advice; call once before the first model is loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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


class _LineBar(tqdm):
    """A progress bar for logs that are no terminal: a line now and then instead of one that is redrawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            log.info(str(self))
        return True


def progress(iterable: Iterable | None = None, **kwargs: Any) -> tqdm:
    """A progress bar that appears only for what takes over two seconds and leaves no line behind; the first
    of several processes shows it.
    """
    if os.environ.get("RANK", "0") != "0":
        return tqdm(iterable, disable=True, **kwargs)
    if sys.stderr.isatty():
        return tqdm(iterable, delay=2.0, leave=False, dynamic_ncols=True, **kwargs)
    return _LineBar(
        iterable, delay=30.0, leave=False, mininterval=30.0, maxinterval=60.0, ncols=100, **kwargs
    )


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


def pick(table: dict[str, Any], name: str, what: str) -> Any:
    """table[name], or a UserError that names the nearest key."""
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: {nearest(str(name), table)}")
    return table[name]


PROJECT = Path(__file__).resolve().parent


@functools.cache
def commit(folder: Path = PROJECT) -> str:
    """The git commit of a checkout, with "+changes" where files differ from it or are new; empty where the
    folder is no checkout, or there is no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:  # a copy inside somebody else's checkout
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# ---- devices and seeds -------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; auto is this process's GPU where there is one. Raises UserError for one that is not
    there.
    """
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"device {name!r} cannot be used ({reason}); use auto, cpu or cuda:N") from None
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """torch dtype by name; 'auto' is bfloat16 where the device computes in it natively, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    return pick(names, name, "dtype")


def hub_cache(local_dirs: Sequence[str]) -> str | None:
    """The first of the folders that exists, as the cache of what comes from the hub; None for its default."""
    return next((str(path) for path in local_dirs if Path(path).is_dir()), None)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
