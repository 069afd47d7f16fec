"""What can go wrong under a run that stopped: the next start uses nothing wrong and loses nothing that was
whole.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import ROOT, run
from test_processes import FLAT, go_on, stopped
from test_trainers import path_of, trainer, weights

import train
from ram.errors import UserError, run_entry_point
from ram.models import checkpoints
from ram.storage.files import only_run, replacing
from ram.training import resume
from ram.training.metrics import rows_until

GIVEN = ("loss=ours_sft", *FLAT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    run = trainer(tmp_path_factory.mktemp("whole"), *GIVEN)
    run.train()
    return run


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The folder of a run that was told to stop after 5 of 6 updates, with states of 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    stopped(folder, 5, *GIVEN)
    return folder


def shard(state):
    return next(state.glob("__0_*"))


def cut_short(state):
    shard(state).write_bytes(shard(state).read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_state(state):
    other = state.with_name("000000002")
    shutil.copy(shard(other), shard(state))


def other_world(state):
    """As if one process of two had not finished writing."""
    text = (state / "state.json").read_text()
    (state / "state.json").write_text(text.replace('"__0_0.distcp"', '"__0_0.distcp": "0", "__1_0.distcp"'))


DAMAGES = {  # of the newest state -> the updates that are left to go on from
    "nothing": (lambda state: None, 5),
    "a shard cut short": (cut_short, 4),
    "a flipped byte in a shard": (lambda state: flip(shard(state)), 4),
    "a flipped byte in the index": (lambda state: flip(state / ".metadata"), 4),
    "a shard missing": (lambda state: shard(state).unlink(), 4),
    "the index missing": (lambda state: (state / ".metadata").unlink(), 4),
    "a shard of another state": (of_another_state, 4),
    "a process's shard missing": (other_world, 4),
    "the mark missing": (lambda state: (state / "state.json").unlink(), 4),
    "the mark cut short": (lambda state: (state / "state.json").write_text('{"updates": 5, "or'), 4),
    "the mark empty": (lambda state: (state / "state.json").write_text(""), 4),
    "half a state aside": (lambda state: state.rename(state.with_suffix(".aside")), 4),
    "all states gone": (lambda state: shutil.rmtree(state.parent), None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_last_good_state_is_gone_on_from(damage, cut, whole, tmp_path):
    """Whatever happened to the newest state, the run ends with the weights and the log of an undisturbed
    one.
    """
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    harm, left = DAMAGES[damage]
    harm(folder / "states" / "000000005")
    state = resume.newest(folder, {"it": 1})
    assert (state and state["updates"]) == left
    run, _ = go_on(folder, *GIVEN)
    assert path_of(run) == path_of(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(run)[name], weight), name


def test_a_clock_that_jumps_changes_nothing(cut, whole, tmp_path, monkeypatch):
    """The newest state is that of the most updates, whatever the files' times and the clock say."""
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    for age, state in enumerate(sorted(folder.glob("states/*"))):
        for path in (state, *state.iterdir()):
            os.utime(path, (1e9 - 1e6 * age, 1e9 - 1e6 * age))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run, state = go_on(folder, *GIVEN)
    assert state["updates"] == 5 and path_of(run) == path_of(whole)


@pytest.mark.parametrize("line", [b"train,5,4", b"\xff\xfe\n", b"train,x,y,z\n"])
def test_a_damaged_log_keeps_its_whole_rows(line, cut, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    with open(folder / "metrics.csv", "ab") as file:
        file.write(line)
    assert [row["updates"] for row in rows_until(folder / "metrics.csv", 2) if row["split"] == "train"] == [
        "1",
        "2",
    ]
    run, _ = go_on(folder, *GIVEN)
    assert path_of(run) == path_of(whole)


FULL = """
import resource, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_trainers import trainer
import utils
utils.setup_logging()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = trainer(Path(sys.argv[1]), *{given!r})
save = run.remember
def remember():
    if run.updates == 4:  # from here on no file may grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save()
    run.saver.wait()  # or a file of the next update may fail first
run.remember = remember
utils.run_entry_point(run.train)
"""


def test_a_full_disk_is_one_line_and_the_last_state_stands(tmp_path, whole):
    """A state that cannot be written ends the run with the file's name; the one before is gone on from."""
    code = FULL.format(paths=[str(ROOT), str(ROOT / "tests")], given=GIVEN)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "states/000000004" in done.stderr and "the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert resume.complete_states(tmp_path)[-1].name == "000000002"
    run = trainer(tmp_path, *GIVEN)
    run.train(resume.newest(tmp_path, run.origin))
    assert path_of(run) == path_of(whole)


def test_a_folder_that_cannot_be_written_is_said_first(tmp_path, monkeypatch, capsys):
    """Nothing is loaded for a run whose folder cannot be made."""
    (tmp_path / "out").write_text("a file where a folder should be")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "load_tokenizer", pytest.fail)
    with pytest.raises(SystemExit) as stopped:
        run_entry_point(lambda: run(train, "experiment=demo", f"output_dir={tmp_path / 'out'}"))
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1
    assert str(tmp_path / "out") in errors and "mend that" in errors


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from ram.storage import files
from pathlib import Path
with files.only_run(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_stale_lock_and_leftovers_are_in_nobodys_way(tmp_path):
    """What a killed process had locked is free, and what it had half written is cleared."""
    path = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED.format(root=str(ROOT)), str(path)], timeout=60)
    assert done.returncode == -signal.SIGKILL and (tmp_path / ".run.lock").exists()
    with only_run(path), replacing(path) as aside:
        aside.write_text("x")
    assert [found.name for found in tmp_path.iterdir()] == ["run"]


def test_a_lock_that_another_run_has_just_removed_is_taken_anew(tmp_path):
    with only_run(tmp_path / "run"):
        (tmp_path / ".run.lock").unlink()
        with only_run(tmp_path / "run"), pytest.raises(UserError), only_run(tmp_path / "run"):
            pass
