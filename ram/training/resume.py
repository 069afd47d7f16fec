"""What a training run goes on from: weights, optimizer state and counters, sharded by torch's DCP.

A state is written aside, its files' hashes beside it last, then renamed: a folder with its mark is complete.
It can be read by any number of processes. It is the run's own and temporary; what others load is the export.
"""

import contextlib
import errno
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ram.distributed import processes
from ram.errors import UserError
from ram.log import log
from ram.storage.files import file_sha256, write_json
from ram.storage.provenance import Manifest, digests_in, read_manifest

STATES, MARK = "states", "state.json"


class Saver:
    """Saves states while training goes on: copied to the host's memory at once, written by a thread, one at a
    time.

    All processes use theirs together. keep: so many of the newest stay. What goes wrong in the thread is
    raised by the next call.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.group = processes.new_cpu_group()  # the thread's own: its messages must not meet training's
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, model, optimizer, facts: dict[str, Any]) -> None:
        """Begins to write a state named after facts["updates"].

        facts: the counters, and `origin`, what the run is made from.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict import get_state_dict

        self.wait()
        weights, moments = get_state_dict(model, optimizer)
        copies = DefaultStager(StagingOptions(False, False, False, False))
        state = copies.stage({"model": weights, "optimizer": moments})
        self.thread = threading.Thread(target=self._write, args=(state, facts), daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises what went wrong since the last call."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Until the state is written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def _write(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        try:
            write_state(self.run_dir, state, facts, self.keep, self.group)
        except BaseException as error:
            self.error = error


def write_state(run_dir: Path, state: dict[str, Any], facts: dict[str, Any], keep: int, group) -> None:
    import torch.distributed.checkpoint as dcp

    folder = run_dir / STATES / f"{facts['updates']:09d}"
    aside = folder.with_suffix(".aside")
    if processes.is_rank0():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    processes.barrier(group)
    with quiet_errors(folder):
        dcp.save(state, checkpoint_id=aside, process_group=group, no_dist=processes.count() == 1)
    mine = sorted(path for path in aside.iterdir() if path.name.startswith(f"__{processes.rank()}_"))
    if processes.is_rank0():
        mine.append(aside / ".metadata")
    hashes = processes.all_gather({path.name: file_sha256(path) for path in mine}, group)
    if processes.is_rank0():
        files = {name: value for part in hashes for name, value in part.items()}
        write_json(aside / MARK, facts | {"files": files})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
        for old in found(run_dir)[:-keep]:
            shutil.rmtree(old)
    processes.barrier(group)
    log.info(f"saved    {folder}, to go on from")


@contextlib.contextmanager
def quiet_errors(folder: Path) -> Iterator[None]:
    """Makes an OSError of what DCP raises, and drops its warning that one process is one process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = str(getattr(cause, "strerror", None) or cause).strip().split("\n")[0]
        raise OSError(errno.EIO, f"DCP failed ({reason})", str(folder)) from None


def found(run_dir: Path) -> list[Path]:
    """The run's complete states, oldest first."""
    folders = (mark.parent for mark in (run_dir / STATES).glob(f"[0-9]*/{MARK}"))
    return sorted(folder for folder in folders if not folder.suffix)


def newest(run_dir: Path, origin: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of the newest state that is whole and was made from `origin`, with its `folder`; None
    without.

    Says why a state is passed over. Files are read by all processes together, each its share.
    """
    for folder in reversed(found(run_dir)):
        try:
            manifest, facts = read_manifest(folder / MARK, "origin", "files", "")
        except UserError:
            manifest, facts = Manifest({}, {}), {}
        own = sorted(manifest.files)[processes.rank() :: processes.count()]
        damaged = not manifest.files or bool(manifest.damaged(digests_in(folder), own))
        if processes.any_rank(damaged):
            log.info(f"{folder}: damaged, passed over")
        elif manifest.changes(origin):
            log.info(f"{run_dir}: stopped with other settings, data or weights; training starts anew")
            return None
        else:
            return facts | {"folder": folder}
    return None


def load(folder: Path, model, optimizer) -> None:
    """Puts a state into the model and the optimizer, whatever number of processes wrote it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with quiet_errors(folder):
        dcp.load(state, checkpoint_id=folder, no_dist=processes.count() == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def clear(run_dir: Path) -> None:
    if processes.is_rank0():
        shutil.rmtree(run_dir / STATES, ignore_errors=True)
