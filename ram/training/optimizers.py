"""Optimizers by name, the learning rate of an update, and the length of a run."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from ram.errors import UserError, pick
from ram.log import log

if TYPE_CHECKING:
    from ram.settings.schema import Settings

# Classes of torch.optim that cannot train a whole model by default: the base class, one that needs a closure,
# one for sparse gradients only, and one for matrices only.
UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNFIT
}


def pick_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer class of a name; raise UserError if it is not in `OPTIMIZERS`."""
    return pick(OPTIMIZERS, name, "optimizer")


def make_optimizer(settings: "Settings", parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer of a run; raise UserError if it cannot decay weights but should."""
    kind = pick_optimizer(settings.optimizer)
    if settings.weight_decay is None:
        return kind(parameters, lr=settings.lr)  # pyright: ignore[reportCallIssue]
    try:
        return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay)  # pyright: ignore
    except TypeError:
        raise UserError(
            f"weight_decay={settings.weight_decay}: optimizer={settings.optimizer} has none; use AdamW, or "
            "set it to null"
        ) from None


def lr_factor(update: int, warmup: int, total: int, schedule: str) -> float:
    """Return the factor of the learning rate: linear warm-up to 1, then constant or a cosine to 0.1.

    Args:
        update: Index of the update, from 0.
        warmup: Number of warm-up updates.
        total: Number of updates of the run.
        schedule: "constant" or "cosine".
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(1, total - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def batch_factor(settings: "Settings", size: int) -> float:
    """Return the factor of the learning rate for a batch of `size` examples."""
    return size / settings.batch_size if settings.last_batch == "scaled" else 1.0


def run_length(settings: "Settings", size: int) -> tuple[int, int, int]:
    """Return the examples, updates and warm-up updates of a run over `size` training examples.

    The last batch of an epoch is smaller if `batch_size` does not divide `size`. Warn if it is much smaller
    and takes a whole update, or if the warm-up takes the whole run.
    """
    n_examples = settings.n_examples
    if n_examples is None:
        assert settings.n_epochs is not None  # the check of the settings refuses a run without either
        n_examples = size * settings.n_epochs
    n_epochs, rest = divmod(n_examples, size)
    updates_per_epoch = math.ceil(size / settings.batch_size)
    n_updates = n_epochs * updates_per_epoch + math.ceil(rest / settings.batch_size)
    warmup = settings.warmup_steps
    # Below 1 it is a share of the run's updates, otherwise a number of updates.
    n_warmup = round(warmup * n_updates) if 0 < warmup < 1 else int(warmup)
    last = size % settings.batch_size
    if last and n_examples >= size and 8 * last <= settings.batch_size and settings.last_batch == "whole":
        log.info(
            f"the last batch of each epoch has {last} of {settings.batch_size} examples and takes a whole "
            "update; last_batch=scaled lowers its learning rate in proportion"
        )
    if n_warmup >= n_updates:
        log.warning(
            f"warmup_steps={warmup}: the run has {n_updates} updates, so the learning rate never reaches lr="
            f"{settings.lr:g}; lower it, or give a share below 1"
        )
    return n_examples, n_updates, n_warmup
