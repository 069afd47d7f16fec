"""Run a script as one process of a run that `ram.distributed.launch` started: SCRIPT [ARGUMENT ...].

It asks the system to end this process with its launcher before the script's imports, which take seconds.
"""

import ctypes
import os
import runpy
import signal
import sys

LAUNCHER = "RAM_LAUNCHER"  # environment variable: the launcher's process id
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Let Linux send this process SIGTERM if its launcher dies; exit if that has happened already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and os.getppid() != int(launcher):
        sys.exit(128 + signal.SIGTERM)


def main() -> None:
    end_with_launcher()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
