"""Optimizers by name, and the learning rate of an update."""

import math

import torch

from ram.errors import pick

# What torch.optim has beside optimizers for a whole model: the base class, one that wants a closure, one for
# sparse gradients only, one for matrices only.
UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNFIT
}


def pick_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of a config; raises UserError for one that cannot train a model by default."""
    return pick(OPTIMIZERS, name, "optimizer")


def lr_factor(update: int, warmup: int, total: int, schedule: str) -> float:
    """What the learning rate is multiplied by: linear warm-up to 1, then constant, or a cosine to a tenth.

    update, warmup, total: counted in updates. schedule: constant | cosine.
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (update - warmup) / max(1, total - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def run_length(settings, size: int) -> tuple[int, int, int]:
    """Examples, updates and warm-up updates of a run over `size` training examples; each epoch ends with the
    batch that is left of it.
    """
    examples = int(settings.n_examples if settings.n_examples is not None else size * settings.n_epochs)
    epochs, rest = divmod(examples, size)
    updates = epochs * math.ceil(size / settings.batch_size) + math.ceil(rest / settings.batch_size)
    warmup = settings.warmup_steps
    return examples, updates, round(warmup * updates) if 0 < warmup < 1 else int(warmup)
