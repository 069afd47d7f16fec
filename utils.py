"""Shared by the commands: their start, seeds, and the tables that recipes are resolved with."""

import random
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preference_datasets import DATASETS
from ram import environment
from ram.distributed import processes
from ram.errors import Preempted, UserError, nearest, pick, run_entry_point
from ram.evaluation.judges.base import load_judges
from ram.log import log, pick_device, pick_dtype, progress, quiet_transformers, setup_logging
from ram.settings import compose
from ram.settings.schema import Tables
from ram.training.losses import LOSSES
from ram.training.optimizers import pick_optimizer
from trainers import pick_trainer

__all__ = [
    "Preempted", "TABLES", "UserError", "log", "nearest", "pick", "pick_device", "pick_dtype", "progress",
    "quiet_transformers", "run_entry_point", "seed_everything", "setup_logging", "start",
]  # fmt: skip

TABLES = Tables(
    datasets=DATASETS,
    losses=LOSSES,
    judges=load_judges(),
    pick_trainer=pick_trainer,
    pick_optimizer=pick_optimizer,
)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start(command: str, main: Callable[..., Any]) -> None:
    """Run a command: restore Ctrl-C, check the command line, open the log file, call `main`.

    With --help it prints the manual instead.

    Args:
        command: its name, which begins the log file's name in _log.
        main: the function that Hydra wraps.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def checked() -> None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            sys.stdout.write(f"{sys.modules['__main__'].__doc__}\n{compose.manual('config')}")
            return
        sys.argv[1:] = compose.preflight(sys.argv[1:])
        setup_logging(Path("_log") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}.log")
        if note := environment.note():
            log.warning(note)
        main()

    processes.run(checked)
