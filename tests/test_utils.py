"""Hints for misspelt names, exit codes, devices, progress bars, the recorded commit."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ram.data import catalogue
from ram.errors import UserError, nearest, pick, run_entry_point
from ram.log import pick_device, pick_dtype, progress
from ram.storage import provenance

ROOT = Path(__file__).resolve().parents[1]


# ---- commit ------------------------------------------------------------------------------------------------


def test_commit_marks_changed_files(tmp_path, monkeypatch):
    """Only the top folder of a checkout has a commit; a subfolder, or a machine without git, has none."""

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


def test_nearest_suggests_one_name_and_lists_all():
    assert nearest("dop", ["sft", "ipo", "dpo"]) == "did you mean 'dpo'? Known: dpo, ipo, sft"
    assert nearest("zzz", ["sft", "ipo"]) == "Known: ipo, sft"


def test_nearest_does_not_list_long_tables():
    assert nearest("name7x", [f"name{i}" for i in range(60)]) == "did you mean 'name7'?"


def test_hint_is_never_empty():
    """If no name in a long table is close, the message still has text after its colon."""
    with pytest.raises(UserError, match=r"[^:\s]\s*\Z"):
        pick({f"name{i}": i for i in range(60)}, "zzz", "template")


def test_pick_returns_the_value_or_suggests_a_key():
    assert pick({"a": 0}, "a", "letter") == 0
    with pytest.raises(UserError, match=r"\Aunknown loss 'dop': did you mean 'dpo'\? Known: dpo, sft\Z"):
        pick({"sft": 1, "dpo": 2}, "dop", "loss")


@pytest.mark.parametrize("name", [None, 3])
def test_pick_refuses_names_that_are_not_text(name):
    """An empty or numeric YAML value is an unknown name."""
    with pytest.raises(UserError, match=f"unknown loss {name}"):
        pick({"sft": 1}, name, "loss")


REMEDY = "fix that (exists? writable? disk full?), then run the same command again to continue"


# ---- exits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("no such file: x; make it"), 2, ["error: no such file: x; make it"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "_output/x"),
            2,
            [f"error: _output/x: No space left on device; {REMEDY}"],
        ),
        (OSError(errno.EACCES, "No", ".x.1.partial", None, "x"), 2, [f"error: x: No; {REMEDY}"]),
        (OSError("the hub is unreachable\nat line 3"), 2, [f"error: the hub is unreachable; {REMEDY}"]),
        (
            KeyboardInterrupt(),
            130,
            ["stopped: finished work is kept; run the same command again to continue"],
        ),
    ],
)
def test_errors_and_ctrl_c_end_in_one_line_and_a_code(capsys, error, code, lines):

    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_entry_point(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == code and out == "" and err.strip().splitlines() == lines


def test_entry_point_returns_results_and_keeps_tracebacks():
    assert run_entry_point(lambda: "value") == "value"
    with pytest.raises(ZeroDivisionError):
        run_entry_point(lambda: 1 / 0)


def test_user_error_of_a_process_has_no_traceback():
    code = "import utils\ndef main(): raise utils.UserError('bad')\nutils.run_entry_point(main)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr, result.stdout) == (2, "error: bad\n", "")


@pytest.mark.parametrize("entry", [["train.py"], ["pipeline.py"], ["-m", "ram.data.prepare"]])
def test_ctrl_c_during_imports_has_no_traceback(tmp_path, entry):
    (tmp_path / "torch.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, *entry],
        cwd=ROOT,
        env=env,
        capture_output=True,
        timeout=60,
        # The tests may run in the background, and children of background jobs inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (result.returncode, result.stderr, result.stdout) == (-2, b"", b"")


def test_unwritable_log_folder_is_one_line(tmp_path):
    (tmp_path / "_log").touch()
    command = [sys.executable, ROOT / "train.py", "experiment=llama_uc", "dry_run=true"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (2, f"error: _log: File exists; {REMEDY}\n")


# ---- devices, folders, progress ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [("cpu", True, torch.float32), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float32)],
)
def test_auto_dtype_is_bfloat16_only_with_native_support(monkeypatch, device, native, expected):
    """CPUs, and GPUs that emulate bfloat16, get float32."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    assert pick_dtype("auto", torch.device(device)) == expected


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_native_dtype_is_bfloat16_on_cpus_with_the_instructions(monkeypatch, flags):
    """Only the processor's own flags decide, so a busy machine gives the same numbers as an idle one."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: flags[0])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: flags[1])
    cpu = torch.device("cpu")
    assert pick_dtype("native", cpu) == (torch.bfloat16 if any(flags) else torch.float32)
    assert pick_dtype("auto", cpu) == torch.float32


def test_processes_of_a_machine_do_not_share_a_gpu(monkeypatch):
    """`sampling.proposal_device=cuda:0` gave every process the same GPU."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device 'cuda:0': 2 processes would share this GPU; use auto"):
        pick_device("cuda:0")
    assert pick_device("cpu") == torch.device("cpu")


def test_dtype_by_name():
    for name in ("float32", "bfloat16", "float64"):
        assert pick_dtype(name, torch.device("cuda")) == getattr(torch, name)
    with pytest.raises(UserError, match="unknown dtype 'bf16': .*bfloat16"):
        pick_dtype("bf16", torch.device("cpu"))


def test_hub_cache_is_the_first_existing_folder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (tmp_path / "file").touch()
    assert catalogue.hub_cache([str(tmp_path / "none"), str(tmp_path / "file"), str(two), str(one)]) == str(
        two
    )
    assert catalogue.hub_cache([]) is None and catalogue.hub_cache([str(tmp_path / "none")]) is None


def test_progress_is_silent_for_short_work(capsys, caplog):
    assert list(progress(range(5), desc="work")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "") and caplog.text == ""


def test_progress_in_a_log_is_plain_lines(capsys, caplog):
    with progress(total=10, desc="work", unit="row") as bar:
        bar.start_t -= 100  # as if 100 seconds had passed
        bar.last_print_t -= 100
        bar.update(3)
        bar.update(1)  # 30 seconds have not passed since that line
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("work:  30%") and "3/10" in line and "\r" not in line
    assert capsys.readouterr().err.strip() == ""
