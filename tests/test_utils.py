"""Hints for misspelt names, exits, devices, progress."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ram.data import catalogue
from ram.errors import UserError, nearest, pick, run_entry_point
from ram.log import pick_dtype, progress
from ram.storage import provenance

ROOT = Path(__file__).resolve().parents[1]


# ---- commit ------------------------------------------------------------------------------------------------


def test_a_commit_is_told_with_whether_files_differ_from_it(tmp_path, monkeypatch):
    """The head of the folder's own checkout; none for a folder inside another's, without one, without git."""

    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(folder=tmp_path):
        provenance.commit.cache_clear()
        return provenance.commit(folder)

    (tmp_path / "inside").mkdir()
    assert commit() == ""
    git("init")
    assert commit() == ""  # nothing is committed yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40 and commit() == head and commit(tmp_path / "inside") == ""
    (tmp_path / "a.py").write_text("2")
    assert commit() == f"{head}+changes"
    git("commit", "-a", "-m", "y")
    (tmp_path / "b.py").write_text("3")
    assert commit() == f"{git('rev-parse', 'HEAD')}+changes" != f"{head}+changes"
    monkeypatch.setenv("PATH", str(tmp_path / "inside"))
    assert commit() == ""
    provenance.commit.cache_clear()


# ---- hints -------------------------------------------------------------------------------------------------


def test_a_near_name_is_suggested_and_all_are_listed():
    """The hint names the closest key, then every key in order."""
    assert nearest("dop", ["sft", "ipo", "dpo"]) == "did you mean 'dpo'? Known: dpo, ipo, sft"
    assert nearest("zzz", ["sft", "ipo"]) == "Known: ipo, sft"


def test_a_long_table_is_not_listed():
    """Among more than forty names only the closest is told."""
    assert nearest("name7x", [f"name{i}" for i in range(60)]) == "did you mean 'name7'?"


def test_an_error_never_ends_in_a_colon():
    """Where nothing is close in a long table, the message still says something after its colon."""
    with pytest.raises(UserError, match=r"[^:\s]\s*\Z"):
        pick({f"name{i}": i for i in range(60)}, "zzz", "template")


def test_pick_returns_the_value_or_says_what_was_meant():
    """A table's value by name, even a false one; else the kind of thing, what was given, what is near."""
    assert pick({"a": 0}, "a", "letter") == 0
    with pytest.raises(UserError, match=r"\Aunknown loss 'dop': did you mean 'dpo'\? Known: dpo, sft\Z"):
        pick({"sft": 1, "dpo": 2}, "dop", "loss")


@pytest.mark.parametrize("name", [None, 3])
def test_pick_survives_a_name_that_is_no_text(name):
    """A key left empty or given as a number in the YAML is an unknown name, not a crash."""
    with pytest.raises(UserError, match=f"unknown loss {name}"):
        pick({"sft": 1}, name, "loss")


MEND = "mend that (is it there, may it be written, is there space?), then the same command goes on"


# ---- exits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("no such file: x; make it"), 2, ["error: no such file: x; make it"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "_output/x"),
            2,
            [f"error: _output/x: No space left on device; {MEND}"],
        ),
        (OSError(errno.EACCES, "No", ".x.1.partial", None, "x"), 2, [f"error: x: No; {MEND}"]),
        (OSError("the hub is away\nat line 3"), 2, [f"error: the hub is away; {MEND}"]),
        (KeyboardInterrupt(), 130, ["stopped: what is finished stands, the same command goes on from there"]),
    ],
)
def test_a_mistake_and_ctrl_c_are_one_line_and_a_code(capsys, error, code, lines):
    """The user sees one line on stderr, nothing on stdout, and scripts see the exit code."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_entry_point(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == code and out == "" and err.strip().splitlines() == lines


def test_an_entry_point_changes_nothing_else():
    """What main returns is handed back, and a defect of the program keeps its traceback."""
    assert run_entry_point(lambda: "value") == "value"
    with pytest.raises(ZeroDivisionError):
        run_entry_point(lambda: 1 / 0)


def test_a_process_exits_without_a_traceback():
    """In a real process the line is all of stderr, and the code is the process's own."""
    code = "import utils\ndef main(): raise utils.UserError('bad')\nutils.run_entry_point(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: bad\n", "")


@pytest.mark.parametrize("entry", [["train.py"], ["pipeline.py"], ["-m", "ram.data.prepare"]])
def test_ctrl_c_during_the_imports_is_quiet(tmp_path, entry):
    """The seconds in which torch loads end like any others: without a traceback."""
    (tmp_path / "torch.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *entry], cwd=ROOT, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (-2, b"", b"")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "_log").touch()
    command = [sys.executable, ROOT / "train.py", "experiment=llama_uc", "dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, f"error: _log: File exists; {MEND}\n")


# ---- devices, folders, seeds, progress ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float32)],
)
def test_auto_is_bfloat16_only_where_a_gpu_has_it(monkeypatch, device, native, expected):
    """The CPU and GPUs that merely emulate bfloat16 get float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert pick_dtype("auto", torch.device(device)) == expected


def test_types_have_their_torch_names():
    """A named type is taken whatever the device; an unknown one says which there are."""
    for name in ("float32", "bfloat16", "float64"):
        assert pick_dtype(name, torch.device("cuda")) == getattr(torch, name)
    with pytest.raises(UserError, match="unknown dtype 'bf16': .*bfloat16"):
        pick_dtype("bf16", torch.device("cpu"))


def test_the_first_folder_that_exists_caches_the_hub(tmp_path):
    """Folders are tried in order; a file is none; without any the hub's own default stays."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir(), (tmp_path / "file").touch()
    assert catalogue.hub_cache([str(tmp_path / "none"), str(tmp_path / "file"), str(two), str(one)]) == str(
        two
    )
    assert catalogue.hub_cache([]) is None and catalogue.hub_cache([str(tmp_path / "none")]) is None


def test_progress_yields_every_item_and_no_line_for_short_work(capsys, caplog):
    """What is done at once shows nothing, neither on the terminal's streams nor in the log."""
    assert list(progress(range(5), desc="work")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "") and caplog.text == ""


def test_progress_in_a_log_is_a_line_and_not_a_redrawn_bar(capsys, caplog):
    """Long work in a file or pipe logs a plain line now and then, without carriage returns."""
    with progress(total=10, desc="work", unit="row") as bar:
        bar.start_t -= 100  # as if 100 seconds had passed
        bar.last_print_t -= 100
        bar.update(3)
        bar.update(1)  # 30 seconds have not passed since that line
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("work:  30%") and "3/10" in line and "\r" not in line
    assert capsys.readouterr().err.strip() == ""
