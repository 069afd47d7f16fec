"""The processes of a run: which one this is, sums over all of them, taking turns.

`torchrun` starts them and says so in the environment; without it there is one, and every function here is
trivial. Numbers and flags travel over gloo, tensors of a model over the device's own backend.
"""

import contextlib
import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

import utils

TIMEOUT = timedelta(
    days=2
)  # one process may let the others wait while it samples; torchrun notices a dead one


def start(alone: bool = False) -> None:
    """Joins the group that torchrun's environment describes, once; without it there is none to join, but for
    who needs a group of one (`alone`).
    """
    torchrun = "WORLD_SIZE" in os.environ
    if dist.is_initialized() or not (torchrun or alone):
        return
    device = utils.pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    one = {} if torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **one)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and the log."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.all_gather_object([None] * count(), None)


def everyones(value) -> list:
    """The values of all processes, in order of rank."""
    found = [value]
    if count() > 1:
        found = [None] * count()
        dist.all_gather_object(found, value)
    return found


def total(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, by key; one that lacks a key adds nothing to it."""
    found: dict[str, float] = defaultdict(float)
    for part in everyones(dict(values)):
        for key, value in part.items():
            found[key] += value
    return found


def any_of(flag: bool) -> bool:
    return any(everyones(bool(flag)))


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process does it while the others wait; then they do it, and find what it left."""
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are put into instead of ending the process; a second one ends it."""
    asked: list[int] = []

    def note(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """One process of a machine after the other, for what needs a machine's memory once."""
    mine, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for turn in range(size):
        if turn == mine:
            yield
        if count() > 1:
            wait()
