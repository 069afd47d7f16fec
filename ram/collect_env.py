"""Print what a report of a fault needs: versions, devices, the commit, the settings of the environment.

    python -m ram.collect_env

It imports nothing that may be missing, and prints no key or token.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

from ram import environment

PREFIXES = (
    "RAM_",
    "HF_",
    "CUDA_",
    "NCCL_",
    "OMP_",
    "TORCH",
    "PYTORCH_",
    "WANDB_MODE",
    "NPROC",
    "NNODES",
    "SLURM_NNODES",
)
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def output_of(*command: str) -> str:
    """Return what a program prints, "" if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=environment.ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def torch_lines() -> Iterator[str]:
    """Yield torch's build and its devices."""
    try:
        import torch
    except Exception as error:  # a damaged installation raises anything
        yield f"torch: cannot be imported ({type(error).__name__}: {str(error)[:200]})"
        return
    yield f"torch build: {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def shown(name: str, value: str) -> str:
    """Return an environment variable for the report; of a secret only whether it is set."""
    return f"{name}={'(set)' if any(word in name for word in SECRETS) else value}"


def lines() -> Iterator[str]:
    """Yield the report line by line."""
    commit = output_of("git", "rev-parse", "--short", "HEAD") or "not a git checkout"
    changes = output_of("git", "status", "--porcelain")
    yield f"commit: {commit}{f', {len(changes.splitlines())} files differ' if changes else ''}"
    yield f"system: {platform.platform()}, {os.cpu_count()} cores"
    yield f"python: {platform.python_version()} at {sys.executable}"
    yield f"active: {os.environ.get('VIRTUAL_ENV') or os.environ.get('CONDA_PREFIX') or 'no environment'}"
    yield f"free disk: {shutil.disk_usage(environment.ROOT).free / 2**30:.0f} GiB"
    for name, pin in environment.pins().items():
        version = environment.installed(name) or "missing"
        note = "" if version.partition("+")[0] == pin else f"   (requirements.txt: {pin})"
        yield f"{name}: {version}{note}"
    yield from torch_lines()
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        yield f"NVIDIA driver: {driver.splitlines()[0]}"
    yield from (shown(name, value) for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES))


if __name__ == "__main__":
    for line in lines():
        sys.stdout.write(f"{line}\n")
