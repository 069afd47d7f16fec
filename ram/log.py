"""The project's log, its progress bars, and devices by name."""

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ram.errors import UserError, pick

log = logging.getLogger("ram")


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
