"""Training states that a stopped run resumes from: weights, optimizer state and counters, sharded by DCP.

A state is written to a temporary folder, then the hashes of its files, then the folder is renamed. A folder
that has the marker file is therefore complete. Any number of processes can read it. States are temporary and
private to the run; other programs load the export.
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

import torch
from torch import nn

from ram.distributed import processes
from ram.errors import UserError
from ram.log import log
from ram.storage.files import file_sha256
from ram.storage.provenance import Manifest, completed, digests_in
from ram.storage.records import Form, read_record, write_record

STATES = "states"  # folder of all states in a run folder
MARK = "state.json"  # marker file of a complete state: counters, origin, and hashes of the other files
FACTS: Form = {
    **dict.fromkeys(("origin", "files"), dict),
    **dict.fromkeys(("updates", "examples", "tokens"), int),
    "best": list | None,
}


class Saver:
    """Save states in the background: copy to the host's memory at once, then write from a thread.

    At most one state is written at a time. All processes must use their savers together. An error in the
    thread is raised by the next call.

    Args:
        keep: Number of newest states to keep.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.keep = keep
        # The thread has its own group, because its messages must not mix with those of training.
        self.group = processes.new_cpu_group()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
        """Start to write a state. It is named after `facts["updates"]`.

        Args:
            facts: The run's counters, and `origin`: the settings, data and weights that the run is made from.
        """
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.wait()
        weights, moments = _state_of(model, optimizer)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        state = stager.stage({"model": weights, "optimizer": moments})
        self.thread = threading.Thread(target=self._write, args=(state, facts), daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raise the error of the thread, if there is one."""
        if self.error is not None:
            error = self.error
            self.error = None
            raise error

    def wait(self) -> None:
        """Wait until the state is written, and raise the error of the thread, if there is one."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def _write(self, state: Any, facts: dict[str, Any]) -> None:
        try:
            write_state(self.run_dir, state, facts, self.keep, self.group)
        except BaseException as error:
            self.error = error


def write_state(run_dir: Path, state: Any, facts: dict[str, Any], keep: int, group: Any) -> None:
    """Write one state together with all processes, and delete all but the `keep` newest."""
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = run_dir / STATES / f"{facts['updates']:09d}"
    temporary = folder.with_suffix(".aside")
    if processes.is_rank0():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    processes.barrier(group)
    with dcp_errors_as_oserror(folder):
        save(state, checkpoint_id=temporary, process_group=group, no_dist=processes.count() == 1)
    # DCP names the files of a process __RANK_*; each process hashes its own.
    own_files = sorted(path for path in temporary.iterdir() if path.name.startswith(f"__{processes.rank()}_"))
    if processes.is_rank0():
        own_files.append(temporary / ".metadata")
    hashes = processes.all_gather({path.name: file_sha256(path) for path in own_files}, group)
    if processes.is_rank0():
        files = {name: digest for part in hashes for name, digest in part.items()}
        write_record(temporary / MARK, facts | {"files": files})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        for old_state in complete_states(run_dir)[:-keep]:
            shutil.rmtree(old_state)
    processes.barrier(group)
    log.info(f"saved    {folder} (training state)")


@contextlib.contextmanager
def dcp_errors_as_oserror(folder: Path) -> Iterator[None]:
    """Turn an exception of DCP into an OSError, and silence its warning about a single process."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause, *_ = next(iter(error.failures.values()))
        reason = str(getattr(cause, "strerror", None) or cause).strip().split("\n")[0]
        raise OSError(errno.EIO, f"DCP failed ({reason})", str(folder)) from None


def complete_states(run_dir: Path) -> list[Path]:
    """Return the folders of the run's complete states, oldest first."""
    folders = (mark.parent for mark in (run_dir / STATES).glob(f"[0-9]*/{MARK}"))
    return sorted(folder for folder in folders if not folder.suffix)


def newest(
    run_dir: Path,
    origin: dict[str, Any],
    earlier: dict[str, Any] | None = None,
    introduced: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the facts of the newest undamaged state, and its `folder`. Log why a state is not used.

    All processes must call this together; each checks its share of the files.

    Args:
        run_dir: the run folder.
        origin: what the run is made from.
        earlier: what an earlier version recorded for the same origin.
        introduced: settings that are younger than some states, with the values that those were trained with.

    Returns:
        None if there is no state, or if the newest one was not made from `origin`.
    """
    for folder in reversed(complete_states(run_dir)):
        try:
            facts = read_record(folder / MARK, FACTS, "")
            recorded = facts["origin"]
            if isinstance(recorded.get("settings"), dict):
                settings = completed(recorded["settings"], origin.get("settings", {}), introduced or {})
                recorded = recorded | {"settings": settings}
            manifest = Manifest(recorded, facts["files"])
        except UserError:
            manifest, facts = Manifest({}, {}), {}
        share = sorted(manifest.files)[processes.rank() :: processes.count()]
        is_damaged = not manifest.files or bool(manifest.damaged(digests_in(folder), share))
        if processes.any_rank(is_damaged):
            log.info(f"{folder}: damaged, skipped")
        elif manifest.changes(origin, earlier):
            log.info(
                f"{run_dir}: stopped with other settings, data or weights; training starts from the beginning"
            )
            return None
        else:
            return facts | {"folder": folder}
    return None


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a state into the model and the optimizer, for any number of processes that wrote it."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    from ram.training import state_reader

    weights, moments = _state_of(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    reader, planner = state_reader.SafeReader(folder), state_reader.SafePlanner()
    with dcp_errors_as_oserror(folder):
        state_dict_loader.load(
            state,
            storage_reader=reader,
            planner=planner,
            process_group=processes.waiting_group(),  # one process may read far longer than another
            no_dist=processes.count() == 1,
        )
    options = StateDictOptions(
        strict=len(weights) == len(model.state_dict())
    )  # frozen weights are not stored
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **parts, options=options)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], Any]:
    """Return the trained weights and the optimizer's moments; frozen weights come from the run's source."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))


def clear(run_dir: Path) -> None:
    """Delete all states of a run."""
    if processes.is_rank0():
        shutil.rmtree(run_dir / STATES, ignore_errors=True)
