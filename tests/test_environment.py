"""The interpreter that the scripts choose, and what a command says in one that cannot run it."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from small import ROOT

from ram import environment

# A Python whose version and packages are set by names of files beside it, and that logs what it runs.
STUB = """#!/usr/bin/env bash
here="$(dirname "$0")"
case "$*" in
"-m ram.environment"*) [ -e "$here/complete" ] ;;
"-c import ensurepip"*) [ ! -e "$here/old" ] ;;
"-m venv --clear .venv")
    rm -rf .venv
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    touch .venv/bin/made_by_"$(basename "$here")" ;;
"-m pip install"*) touch "$here/complete" ;;
*) echo "$(basename "$here") runs $*" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts, in a folder whose only programs are stubs and the shell's."""
    shutil.copytree(ROOT / "bin", tmp_path / "bin")
    (tmp_path / "system").mkdir()
    for name in ("bash", "env", "dirname", "basename", "cp", "mkdir", "rm", "touch"):
        (tmp_path / "system" / name).symlink_to(shutil.which(name) or name)
    return tmp_path


def stub(tree, folder, *marks, name="python"):
    path = tree / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUB)
    path.chmod(0o755)
    for mark in marks:
        (path.parent / mark).touch()
    return path


def bash(tree, script, *path, **variables):
    """Run a script with these folders first on the PATH."""
    env = {"PATH": ":".join(str(tree / folder) for folder in (*path, "system")), **variables}
    command = ["bash", str(tree / "bin" / script), "x=1"]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=30)


def test_complete_venv_beats_an_active_environment(tree):
    """A virtual or conda environment that was active used to be taken instead of the .venv of demo.sh."""
    stub(tree, ".venv/bin", "complete")
    stub(tree, "other", "complete")
    done = bash(tree, "serve.sh", "other", VIRTUAL_ENV=str(tree / "other"), CONDA_PREFIX=str(tree / "other"))
    assert (done.returncode, done.stdout) == (0, "bin runs serve.py x=1\n"), done.stderr


def test_python_in_the_environment_beats_all(tree):
    chosen = stub(tree, "chosen")
    stub(tree, ".venv/bin", "complete")
    for script, lines in (("serve.sh", 1), ("demo.sh", 4), ("train_llama_uc.sh", 1)):
        done = bash(tree, script, PYTHON=str(chosen))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("chosen runs ") == lines == done.stdout.count("\n")
    assert not (tree / ".venv" / "bin" / "made_by_chosen").exists()


def test_complete_active_environment_is_used_if_there_is_no_venv(tree):
    stub(tree, "conda", "complete")
    for script in ("serve.sh", "demo.sh"):
        done = bash(tree, script, "conda", CONDA_PREFIX=str(tree / "conda"))
        assert done.returncode == 0 and set(done.stdout.split(" runs")[0].split()) == {"conda"}, done.stderr
    assert not (tree / ".venv").exists()


def test_without_the_packages_a_script_says_in_one_line_what_to_do(tree):
    stub(tree, "conda")
    done = bash(tree, "train_llama_uc.sh", "conda", CONDA_PREFIX=str(tree / "conda"))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: neither .venv nor") and "bin/demo.sh" in done.stderr
    assert done.stderr.count("\n") == 1


def test_demo_finds_a_new_python_behind_an_old_one_and_replaces_an_old_venv(tree):
    stub(tree, ".venv/bin", "old", "left_over")
    stub(tree, "old", "old", name="python3")
    stub(tree, "new", name="python3.11")
    stub(tree, "newest", name="python3.12")
    done = bash(tree, "demo.sh", "old", "new", "newest")
    assert done.returncode == 0, done.stderr
    assert (tree / ".venv/bin/made_by_newest").exists() and not (tree / ".venv/bin/left_over").exists()
    assert "bin runs train.py experiment=demo" in done.stdout


def test_demo_completes_a_venv_that_is_new_enough(tree):
    """An installation that was interrupted."""
    stub(tree, ".venv/bin")
    done = bash(tree, "demo.sh")
    assert done.returncode == 0 and "bin runs train.py experiment=demo" in done.stdout, done.stderr


def test_without_a_new_python_demo_says_so(tree):
    stub(tree, "old", "old", name="python3")
    done = bash(tree, "demo.sh", "old")
    assert done.returncode == 2 and not (tree / ".venv").exists()
    assert done.stderr.startswith("error: no Python 3.11 or newer") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["train.py", "pipeline.py", "serve.py", "-m ram.data.prepare", "-m ram.distributed.launch train.py"],
)
def test_command_without_packages_ends_in_one_line(command, tmp_path):
    """Without the folders of packages, as in an environment that is not the project's."""
    done = subprocess.run([sys.executable, "-S", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert " lacks torch, transformers, datasets and " in done.stderr and "run `" in done.stderr


@pytest.mark.parametrize("file", ["train.py", "pipeline.py", "serve.py", "ram/environment.py"])
def test_older_pythons_can_read_what_refuses_them(file):
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    assert " is Python 3.10.12: expected 3.11 or newer; " in environment.refusal()


def test_other_versions_are_noted_and_are_not_complete(monkeypatch):
    """A build's suffix does not count: torch 2.13.0+cpu is 2.13.0."""
    real = environment.pins()
    versions = real | {"torch": real["torch"] + "+cpu", "numpy": "1.0"}
    monkeypatch.setattr(environment, "installed", versions.get)
    assert environment.refusal() is None and environment.differing() == {"numpy": "1.0"}
    assert environment.note() == f"not the tested versions: numpy 1.0 instead of {real['numpy']}"
    assert set(environment.differing("dev")) >= {"numpy", "pytest", "ruff", "playwright"}


def test_this_environment_is_checked_without_imports():
    code = "import sys, ram.environment as e; e.check(); print(len(sys.modules.keys() & {'torch', 'hydra'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == "0\n", done.stderr


def test_scripts_find_their_folder_whatever_cdpath_says(tmp_path):
    """With it, `cd bin/..` would go to a folder of that name elsewhere."""
    (tmp_path / "bin").mkdir()
    command = ["bash", "-c", "source bin/env.sh; pwd"]
    environment = os.environ | {"CDPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(ROOT)
