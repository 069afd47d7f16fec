"""Process groups: rank, collectives over all processes of a run, and signals.

torchrun starts the processes and describes them in the environment. Without torchrun there is one process
and the functions here are trivial. Python objects travel over gloo, tensors of a model over the backend of
their device.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ram.distributed.launch import STORE
from ram.distributed.worker import end_with_launcher
from ram.errors import run_entry_point
from ram.log import pick_device

T = TypeVar("T")

# Rank 0 may work for hours while the others wait (sampling, judging). torchrun detects dead processes.
TIMEOUT = timedelta(days=2)
# All processes reach the collectives of a model's tensors at about the same time: nobody waits long for them.
TENSOR_TIMEOUT = timedelta(minutes=20)
# "group": the gloo group of all processes for Python objects, which may wait for TIMEOUT; None if alone.
_waiting: dict[str, dist.ProcessGroup | None] = {"group": None}
PATIENCE = 2.0  # seconds after the first Ctrl-C from which a second one interrupts at once


def start(alone: bool = False) -> None:
    """Join the process group that torchrun's environment describes; do nothing if already joined.

    Args:
        alone: Without torchrun, create a group of one process, as FSDP requires a group.
    """
    torchrun = "WORLD_SIZE" in os.environ
    if dist.is_initialized() or not (torchrun or alone):
        return
    if torchrun:
        end_with_launcher()
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if torchrun and (path := os.environ.get(STORE)):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend, timeout=TENSOR_TIMEOUT, init_method=f"file://{path}", rank=rank, world_size=size
        )
    elif torchrun:
        dist.init_process_group(backend, timeout=TENSOR_TIMEOUT)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, timeout=TENSOR_TIMEOUT, store=store, rank=0, world_size=1)
    _waiting["group"] = new_cpu_group()
    atexit.register(stop)


def run(main: Callable[[], Any]) -> None:
    """Run a script's entry point; if it joined a group, exit without Python's finalisation.

    A gloo thread may still hold a tensor when main returns. Tearing down the interpreter then aborts the
    process although its work is done, so the exit handlers are called here, followed by os._exit.
    A process that failed does not leave its group: NCCL would let it wait for ranks that wait for it.
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
        if code:
            atexit.unregister(stop)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop() -> None:
    """Leave the process group; call it only when no process needs the group any more."""
    if dist.is_initialized():
        dist.destroy_process_group()
        _waiting["group"] = None


def count() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank0() -> bool:
    """Return whether this process is the one that writes files and the log."""
    return rank() == 0


def new_cpu_group() -> dist.ProcessGroup | None:
    """Create a second gloo group of all processes for use in a thread; None if there is one process.

    Collectives of a thread need a group of their own: in a shared group their messages could be matched
    with those of the main thread.
    """
    if count() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=TIMEOUT)  # pyright: ignore[reportReturnType]


def waiting_group() -> dist.ProcessGroup | None:
    """Return the gloo group of all processes whose collectives may wait for TIMEOUT; None for one process."""
    return _waiting["group"]


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait until all processes have arrived.

    Args:
        group: In a thread, the group from `new_cpu_group`.
    """
    all_gather(None, group)


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather a picklable value from every process, ordered by rank.

    Args:
        value: This process's value.
        group: In a thread, the group from `new_cpu_group`.
    """
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=group or waiting_group())
    return values


def all_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Sum over all processes, key by key; a missing key counts as 0."""
    sums: dict[str, float] = defaultdict(float)
    for part in all_gather(dict(values)):
        for key, value in part.items():
            sums[key] += value
    return sums


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true in any process."""
    return any(all_gather(bool(flag)))


def from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only and return its result in every process."""
    return all_gather(make() if is_rank0() else None)[0]  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def rank0_first() -> Iterator[None]:
    """Run the block on rank 0 first; the other ranks run it afterwards and find rank 0's results."""
    if not is_rank0():
        barrier()
    try:
        yield
    finally:
        if is_rank0():
            barrier()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and Ctrl-C in a list instead of ending the process, so that work can be saved.

    Launchers forward signals, so one signal may arrive twice at once. A Ctrl-C that comes PATIENCE
    seconds after the first signal raises KeyboardInterrupt. Outside the main thread, which alone may set
    signal handlers, the list stays empty.
    """
    received: list[int] = []
    first_time = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first_time
        if not received:
            first_time = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first_time > PATIENCE:
            raise KeyboardInterrupt
        received.append(number)

    numbers = ()
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Run the block in one process of a machine after the other, to limit the peak of host memory."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    # Machines may have different numbers of processes, but every process must pass as many barriers.
    turns = max(all_gather(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    for turn in range(turns):
        if turn == local_rank:
            yield
        barrier()
