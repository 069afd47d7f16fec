"""Logging, progress bars, and devices and dtypes by name.

The log file has every line. The console has every line too, or with `console=brief` the lines of level NOTICE
and above: one line per stage, warnings and results.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ram.errors import UserError, pick

log = logging.getLogger("ram")
# Seconds between the lines of a bar without a terminal, by whether the console is brief.
BAR_SECONDS = {False: 30.0, True: 60.0}
NOTICE = 25  # level of the lines that a brief console shows, between INFO and WARNING
# label: the stage that runs, for the progress bars of a brief console.
_console = {"brief": False, "label": ""}


def setup_logging(log_file: Path | None = None) -> None:
    """Log to stdout without breaking progress bars and, if `log_file` is given, to that file."""

    class TqdmHandler(logging.StreamHandler):
        def emit(self, record: logging.LogRecord) -> None:
            line = self.format(record)
            try:
                if sys.stderr.isatty():
                    tqdm.write(line, file=sys.stdout)
                else:
                    sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except BrokenPipeError:
                discard_stdout()
            except OSError:  # a full disk must not end a run because of its log
                pass

    log.handlers[:] = [TqdmHandler()]
    log.handlers[0].setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        # A full disk must not end a run because of its log: the console still has every line.
        handler.handleError = lambda record: None
        log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    log.propagate = False
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # transformers shows a bar for every model it loads; the project's own bars cover slow steps.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def discard_stdout() -> None:
    """Send what is still written to stdout nowhere: its reader has ended, but a run or a server goes on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def use_console(mode: str) -> None:
    """Choose the lines that the console shows; call after `setup_logging`.

    Args:
        mode: `brief`, `full`, or `auto`: brief if the output is a terminal.
    """
    is_brief = mode == "brief" or (mode == "auto" and sys.stdout.isatty())
    _console["brief"] = is_brief
    log.handlers[0].setLevel(NOTICE if is_brief else logging.INFO)
    form = "%(message)s" if is_brief else "%(asctime)s  %(message)s"
    log.handlers[0].setFormatter(logging.Formatter(form, "%H:%M:%S"))


def brief() -> bool:
    """Return whether the console is brief."""
    return bool(_console["brief"])


def notice(text: str) -> None:
    """Log a line that a brief console shows too."""
    log.log(NOTICE, text)


def log_path() -> str:
    """Return the path of the log file, "" if there is none."""
    files = [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
    return os.path.relpath(files[0].baseFilename) if files else ""


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """Name the progress bars of a block on a brief console, e.g. "stage 3 of 9  aligner"."""
    before, _console["label"] = _console["label"], label
    try:
        yield
    finally:
        _console["label"] = before


def redacted(text: str) -> str:
    """Return a text without the user names and passwords of the URLs in it."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def printable(text: str) -> str:
    """Return one line of text from elsewhere, with what could command a terminal replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def quiet_transformers() -> None:
    """Silence transformers' progress bars and advice; call before the first model is loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class _LineBar(tqdm):
    """A progress bar for output that is not a terminal: an occasional log line, never redrawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # tqdm passes an empty message to clear the bar at the end
            notice(str(self))


def progress(iterable: Iterable[Any] | None = None, main: bool = False, **kwargs: Any) -> tqdm:
    """Return a progress bar that appears only for slow work and disappears at the end.

    On a terminal it appears after 2 seconds. In a log file or pipe it becomes a line every 30 seconds, on a
    brief console every minute. Only rank 0 shows it.

    Args:
        iterable: The items to iterate over; None for a bar that is updated by hand.
        main: The bar of the whole stage: a brief console shows it at once, with the stage's name alone.
        kwargs: Further arguments of tqdm.
    """
    if os.environ.get("RANK", "0") != "0":
        return tqdm(iterable, disable=True, **kwargs)
    on_terminal, interval = sys.stderr.isatty(), BAR_SECONDS[brief()]
    if brief():
        label = _console["label"]
        kwargs["desc"] = label if main and label else f"{label}  {kwargs.get('desc', '')}".strip()
        bar = "|{bar:24}|" if on_terminal else ""
        kwargs["bar_format"] = f"{{desc}}  {{percentage:3.0f}} % {bar} {{remaining}} left{{postfix}}"
    if on_terminal:
        delay = 0.0 if main and brief() else 2.0
        return tqdm(iterable, delay=delay, leave=False, dynamic_ncols=True, **kwargs)
    return _LineBar(
        iterable,
        delay=interval,
        leave=False,
        mininterval=interval,
        maxinterval=2 * interval,
        ncols=100,
        **kwargs,
    )


def pick_device(name: str = "auto") -> torch.device:
    """Return a device by name; "auto" is this process's GPU if there is one, else the CPU.

    Raises:
        UserError: If the device does not exist or cannot be used, or several processes would share a GPU.
    """
    if name != "auto":
        n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if name.startswith("cuda:") and n_processes > 1:
            raise UserError(
                f"device {name!r}: {n_processes} processes would share this GPU; use auto, which gives each "
                "its own, or start one process with NPROC=1"
            )
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"device {name!r} cannot be used ({reason}); use auto, cpu or cuda:N") from None
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if (rank := os.environ.get("LOCAL_RANK")) is None:
        return torch.device("cuda")
    if int(rank) >= (count := torch.cuda.device_count()):
        raise UserError(f"process {rank} has no GPU: this machine has {count}; set NPROC to at most {count}")
    return torch.device(f"cuda:{rank}")


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16: AMX or AVX-512."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a dtype by name.

    "auto" is bfloat16 on GPUs that multiply it natively, else float32; "native" is the same on CPUs too. It
    asks the processor, and measures nothing: what a run computes in must not depend on how busy a machine is.
    """
    if name in ("auto", "native"):
        if device.type == "cuda":
            is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_native = name == "native" and device.type == "cpu" and multiplies_bf16()
        return torch.bfloat16 if is_native else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    return pick(names, name, "dtype")
