"""Start a script once per device, on one machine or on several.

    python -m ram.distributed.launch train.py experiment=llama_uc

A thin wrapper around torchrun: it picks the number of processes and exits with the code of the process that
ended first, so that a scheduler can tell a preempted job from a failed one. The processes of one machine find
each other through files in a private folder, so no port is open to others. Environment variables: NPROC, the
processes on this machine (default: its GPUs, or 1); NNODES and RDZV_ENDPOINT (host:port of one of the
machines) if the same command runs on several machines; torchrun's own PET_* variables for everything else.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import NoReturn

from ram import environment
from ram.distributed.worker import LAUNCHER

STORE = "RAM_STORE"  # environment variable: the file by which the processes of one machine find each other

NVIDIA = "/dev/nvidiactl"  # exists if Nvidia's driver is loaded
# Seconds that a process has to save its state after a signal before it is killed: less than the 300 that
# docs/distributed.md lets a scheduler wait before it kills the job.
SAVING = 240


def refuse(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def devices() -> int:
    """Return the number of GPUs of this machine, or 1 if it has none; refuse a torch that cannot see them."""
    if not any(os.path.exists(path) for path in (NVIDIA, "/dev/kfd", "/dev/dxg")):
        return 1  # no GPU driver: skip the import of torch, which takes seconds
    import torch

    count = torch.cuda.device_count()
    # The other drivers also run screens, so that torch may rightly find nothing to compute on.
    if not count and (os.path.exists(NVIDIA) or torch.version.hip):
        refuse(
            f"this machine has a GPU driver, but torch {torch.__version__} sees no GPU: check "
            "CUDA_VISIBLE_DEVICES, install a torch that fits the driver, or set NPROC=1 to use the CPU"
        )
    return max(count, 1)


def number(name: str) -> int | None:
    """Read a count of at least 1 from an environment variable; None if it is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        refuse(f"{name}={text}: expected a number of at least 1")
    return int(text)


def several(machines: int, endpoint: str | None) -> list[str]:
    """Return torchrun's arguments for a run on several machines, which meet at a port of one of them."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--nnodes={machines}"]
    return [*meeting, f"--rdzv-id={os.environ.get('RDZV_ID', 'ram')}"]


@contextlib.contextmanager
def one_machine() -> Iterator[list[str]]:
    """Yield torchrun's arguments for a run on this machine, without a port that others can reach.

    A store on a port would listen on every interface, and its readers unpickle what anybody wrote there. Here
    launcher and processes share files in a folder that is the user's alone, and tensors travel over loopback.
    """
    with tempfile.TemporaryDirectory(prefix="ram-") as folder:  # made with mode 0700
        os.environ[STORE] = os.path.join(folder, "processes")
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torchrun's own store, on a port
        loopback = "lo" if sys.platform == "linux" else "lo0"
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
        yield [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={os.path.join(folder, 'launcher')}",
            "--rdzv-conf=store_type=file",
            "--nnodes=1",
            "--rdzv-id=ram",
        ]


def main() -> int:
    command = sys.argv[1:]
    if not command or not os.path.isfile(command[0]):
        example = "python -m ram.distributed.launch train.py key=value"
        refuse(f"ram.distributed.launch {' '.join(command)}: expected a script, as in `{example}`")
    environment.check()
    processes = number("NPROC") or devices()
    machines = number("NNODES") or 1
    if processes == machines == 1:
        os.execv(sys.executable, [sys.executable, *command])
    endpoint = os.environ.get("RDZV_ENDPOINT")
    if machines > 1 and not endpoint:
        refuse(f"NNODES={machines}, but RDZV_ENDPOINT is not set: give host:port of one of the machines")
    # Without this, torchrun sets one thread per process and prints a long warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING))

    # Imported late: a single process, started by execv above, would otherwise load torch twice.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from ram.errors import PREEMPTED

    logging.disable(logging.ERROR)  # the process has already printed its own error in one line
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.pop(STORE, None)
    try:
        with (
            one_machine() if machines == 1 else contextlib.nullcontext(several(machines, endpoint)) as meeting
        ):
            run.main([*meeting, f"--nproc-per-node={processes}", "-m", "ram.distributed.worker", *command])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        # A process killed by a signal has printed nothing.
        name = signal.Signals(-failure.exitcode).name
        print(
            f"error: process {rank} was ended by {name}; run the same command again to continue",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    except (RendezvousError, ValueError) as error:
        refuse(f"the processes did not find each other: {error}")
    except SignalException as error:
        return PREEMPTED if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
