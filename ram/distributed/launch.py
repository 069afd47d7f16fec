"""Starts a script once per device, on one machine or on many.

    python -m ram.distributed.launch train.py experiment=llama_uc

torchrun does the work. This says how many processes it starts and ends with the exit code of the one that
ended first, so that a job that was told to stop is told from one that failed. Environment: NPROC, the
processes of this machine (its GPUs, or 1); NNODES and RDZV_ENDPOINT (host:port of one of the machines) where
the same command runs on several; torchrun's own PET_* variables for all else it can do.
"""

import logging
import os
import signal
import sys
from typing import NoReturn


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def devices() -> int:
    """The GPUs of this machine, or 1."""
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 1  # asking torch takes seconds
    import torch

    return max(torch.cuda.device_count(), 1)


def number(name: str) -> int | None:
    """A count from the environment; None where it is not set."""
    given = os.environ.get(name)
    if given and not (given.isdecimal() and int(given)):
        refuse(f"{name}={given}: expected a number of at least 1")
    return int(given) if given else None


def main() -> int:
    command = sys.argv[1:]
    if not command or not os.path.isfile(command[0]):
        example = "python -m ram.distributed.launch train.py key=value"
        refuse(f"ram.distributed.launch {' '.join(command)}: expected a script, as in `{example}`")
    each, machines = number("NPROC") or devices(), number("NNODES") or 1
    if each == machines == 1:
        os.execv(sys.executable, [sys.executable, *command])
    where = ["--standalone"]
    if machines > 1:
        endpoint = os.environ.get("RDZV_ENDPOINT")
        if not endpoint:
            refuse(f"NNODES={machines}, but no RDZV_ENDPOINT: give host:port of one of the machines")
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
        where += [f"--rdzv-id={os.environ.get('RDZV_ID', 'ram')}", f"--nnodes={machines}"]
    # Threads of one process; torchrun would say at length that it sets one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // each, 1)))
    # So long may saving take after a signal before the processes are killed.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

    # All this takes torch's seconds, which one process on its own should not wait for twice.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from ram.errors import PREEMPTED

    logging.disable(logging.ERROR)  # what torchrun says of a process's end, the process has said better
    try:
        run.main([*where, f"--nproc-per-node={each}", *command])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # nobody else says this
            name = signal.Signals(-failure.exitcode).name
            print(f"error: process {rank} was ended by {name}; the same command goes on", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (RendezvousError, ValueError) as error:
        refuse(f"the processes did not find each other: {error}")
    except SignalException as error:
        return PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
