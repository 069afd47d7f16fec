"""Damage to a stopped run: the next start uses no damaged state and loses no complete one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import ROOT, run
from training_runs import RESUMABLE, path_of, resumed_run, stopped_run, trainer, weights

import train
from ram.errors import UserError, run_entry_point
from ram.models import checkpoints
from ram.storage.files import only_run, replacing
from ram.training import resume
from ram.training.metrics import rows_until

OVERRIDES = ("loss=ours_sft", *RESUMABLE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that was never stopped."""
    run = trainer(tmp_path_factory.mktemp("undisturbed"), *OVERRIDES)
    run.train()
    return run


@pytest.fixture(scope="module")
def stopped_folder(tmp_path_factory):
    """The folder of a run stopped after 5 of 6 updates, with states of updates 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    stopped_run(folder, 5, *OVERRIDES)
    return folder


def shard(state):
    return next(state.glob("__0_*"))


def truncate(state):
    shard(state).write_bytes(shard(state).read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_older_shard(state):
    other = state.with_name("000000002")
    shutil.copy(shard(other), shard(state))


def add_missing_shard(state):
    """Record a shard of a second process, as if that process had not finished writing."""
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace('"__0_0.distcp"', '"__0_0.distcp": "0", "__1_0.distcp"'))


# damage of the newest state -> (function, updates of the newest usable state)
DAMAGES = {
    "nothing": (lambda state: None, 5),
    "a truncated shard": (truncate, 4),
    "a flipped byte in a shard": (lambda state: flip(shard(state)), 4),
    "a flipped byte in the index": (lambda state: flip(state / ".metadata"), 4),
    "a missing shard": (lambda state: shard(state).unlink(), 4),
    "a missing index": (lambda state: (state / ".metadata").unlink(), 4),
    "a shard of another state": (replace_by_older_shard, 4),
    "a missing shard of another process": (add_missing_shard, 4),
    "a missing state.json": (lambda state: (state / "state.json").unlink(), 4),
    "a truncated state.json": (lambda state: (state / "state.json").write_text('{"updates": 5, "or'), 4),
    "an empty state.json": (lambda state: (state / "state.json").write_text(""), 4),
    "a partial state": (lambda state: state.rename(state.with_suffix(".aside")), 4),
    "no states": (lambda state: shutil.rmtree(state.parent), None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_usable_state_is_resumed(damage, stopped_folder, undisturbed, tmp_path):
    """Whatever the damage, the resumed run ends with the weights and the log of an uninterrupted one."""
    folder = tmp_path / "run"
    shutil.copytree(stopped_folder, folder)
    apply, updates = DAMAGES[damage]
    apply(folder / "states" / "000000005")
    state = resume.newest(folder, {"it": 1})
    assert (state and state["updates"]) == updates
    run, _ = resumed_run(folder, *OVERRIDES)
    assert path_of(run) == path_of(undisturbed)
    for name, weight in weights(undisturbed).items():
        assert torch.equal(weights(run)[name], weight), name


def test_newest_state_does_not_depend_on_file_times(stopped_folder, undisturbed, tmp_path, monkeypatch):
    """The newest state is the one with the most updates."""
    folder = tmp_path / "run"
    shutil.copytree(stopped_folder, folder)
    for age, state in enumerate(sorted(folder.glob("states/*"))):
        for path in (state, *state.iterdir()):
            os.utime(path, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run, state = resumed_run(folder, *OVERRIDES)
    assert state["updates"] == 5 and path_of(run) == path_of(undisturbed)


@pytest.mark.parametrize("line", [b"train,5,4", b"\xff\xfe\n", b"train,x,y,z\n"])
def test_damaged_log_keeps_its_complete_rows(line, stopped_folder, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped_folder, folder)
    with open(folder / "metrics.csv", "ab") as file:
        file.write(line)
    assert [row["updates"] for row in rows_until(folder / "metrics.csv", 2) if row["split"] == "train"] == [
        "1",
        "2",
    ]
    run, _ = resumed_run(folder, *OVERRIDES)
    assert path_of(run) == path_of(undisturbed)


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from training_runs import trainer
import utils
utils.setup_logging()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = trainer(Path(sys.argv[1]), *{overrides!r})
save = run.remember
def remember():
    if run.updates == 4:  # from here on no file may grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save()
    run.saver.wait()  # otherwise a file of the next update may fail first
run.remember = remember
utils.run_entry_point(run.train)
"""


def test_full_disk_is_one_line_and_keeps_the_last_state(tmp_path, undisturbed):
    """A failed write of a state ends the run with the file's name; the state before can be resumed."""
    code = FULL_DISK.format(paths=[str(ROOT), str(ROOT / "tests" / "helpers")], overrides=OVERRIDES)
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "states/000000004" in result.stderr and "disk full?" in result.stderr
    assert "Traceback" not in result.stderr
    assert resume.complete_states(tmp_path)[-1].name == "000000002"
    run = trainer(tmp_path, *OVERRIDES)
    run.train(resume.newest(tmp_path, run.origin))
    assert path_of(run) == path_of(undisturbed)


def test_unwritable_folder_is_refused_before_loading(tmp_path, monkeypatch, capsys):
    """No tokenizer or model is loaded if the run folder cannot be created."""
    (tmp_path / "out").write_text("a file where a folder should be")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "load_tokenizer", pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        run_entry_point(lambda: run(train, "experiment=demo", f"output_dir={tmp_path / 'out'}"))
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1
    assert str(tmp_path / "out") in errors and "fix that" in errors


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from ram.storage import files
from pathlib import Path
with files.only_run(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lock_and_leftovers_of_a_killed_process_are_ignored(tmp_path):
    path = tmp_path / "run"
    result = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT)), str(path)], timeout=60)
    assert result.returncode == -signal.SIGKILL and (tmp_path / ".run.lock").exists()
    with only_run(path), replacing(path) as partial:
        partial.write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_removed_lock_file_is_created_again(tmp_path):
    with only_run(tmp_path / "run"):
        (tmp_path / ".run.lock").unlink()
        with only_run(tmp_path / "run"), pytest.raises(UserError), only_run(tmp_path / "run"):
            pass
