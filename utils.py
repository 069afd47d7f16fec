"""The parts that the commands share: the log, seeds, and the tables that recipes are resolved with."""

import random

import numpy as np
import torch

from preference_datasets import DATASETS
from ram.errors import Preempted, UserError, nearest, pick, run_entry_point
from ram.log import log, pick_device, pick_dtype, progress, quiet_transformers, setup_logging
from ram.settings.schema import Tables
from ram.training.losses import LOSSES
from ram.training.optimizers import pick_optimizer
from trainers import pick_trainer

__all__ = [
    "Preempted", "TABLES", "UserError", "log", "nearest", "pick", "pick_device", "pick_dtype", "progress",
    "quiet_transformers", "run_entry_point", "seed_everything", "setup_logging",
]  # fmt: skip

TABLES = Tables(datasets=DATASETS, losses=LOSSES, pick_trainer=pick_trainer, pick_optimizer=pick_optimizer)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
