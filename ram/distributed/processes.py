"""The processes of a run: which one this is, sums over all of them, taking turns.

`torchrun` starts them and says so in the environment; without it there is one, and every function here is
trivial. Numbers and flags travel over gloo, tensors of a model over the device's own backend.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ram.errors import run_entry_point
from ram.log import pick_device

TIMEOUT = timedelta(days=2)  # one may let the others wait for long; torchrun notices a dead one
PATIENCE = 2.0  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(alone: bool = False) -> None:
    """Joins the group that torchrun's environment describes, once; without it there is none to join, but for
    who needs a group of one (`alone`).
    """
    torchrun = "WORLD_SIZE" in os.environ
    if dist.is_initialized() or not (torchrun or alone):
        return
    if torchrun:
        terminate_with_launcher()
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    one = {} if torchrun else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=TIMEOUT, **one)
    atexit.register(stop)


def run(main: Callable[[], Any]) -> None:
    """Runs the entry point of a script, and ends a process that was in a group without Python's finalisation.

    One of gloo's threads may still be about to let go of a tensor; in an interpreter that is being torn down
    that aborts the process, though its work is done.
    """
    code = 0
    try:
        run_entry_point(main)
    except SystemExit as error:
        if not dist.is_initialized():
            raise
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def terminate_with_launcher() -> None:
    """Has Linux send SIGTERM when torchrun dies, so that a process it can no longer watch does not stay."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop() -> None:
    """Leaves the group, once nobody needs it any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Whether this is the process that writes files and the log."""
    return rank() == 0


def barrier(group=None) -> None:
    """Until all processes are here. group: `new_cpu_group`'s, from a thread."""
    all_gather(None, group)


def new_cpu_group():
    """Another group of the same processes, on their CPUs, for a thread; None where there is one process."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if count() > 1 else None


def all_gather(value, group=None) -> list:
    """The values of all processes, in order of rank. group: `new_cpu_group`'s, from a thread."""
    found = [value]
    if count() > 1:
        found = [None] * count()
        dist.all_gather_object(found, value, group=group)
    return found


def all_sum(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, by key; one that lacks a key adds nothing to it."""
    found: dict[str, float] = defaultdict(float)
    for part in all_gather(dict(values)):
        for key, value in part.items():
            found[key] += value
    return found


def any_rank(flag: bool) -> bool:
    return any(all_gather(bool(flag)))


def from_rank0(make: Callable[[], Any]) -> Any:
    """What the first process makes, for all of them."""
    return all_gather(make() if is_rank0() else None)[0]


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """The first process does it while the others wait; then they do it, and find what it left."""
    if not is_rank0():
        barrier()
    try:
        yield
    finally:
        if is_rank0():
            barrier()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are put into instead of ending the process, so that work can be saved.

    Launchers send what they got on, so the same signal may come twice at once. Who presses Ctrl-C again some
    seconds later means it.
    """
    asked: list[int] = []
    first = 0.0

    def note(number: int, frame) -> None:
        nonlocal first
        if not asked:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > PATIENCE:
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
    mine = int(os.environ.get("LOCAL_RANK", 0))
    size = max(all_gather(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # machines may differ
    for turn in range(size):
        if turn == mine:
            yield
        barrier()
