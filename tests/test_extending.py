"""Each walk of docs/extending.md, applied to a copy of the repository and run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from same_identities import identities
from small import ROOT

from ram.storage.files import write_json

SECTIONS = re.split(r"^## (.+)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
WALKS = {title: text for title, text in zip(SECTIONS[1::2], SECTIONS[2::2], strict=True) if "```diff" in text}
FILES = {"A decoding mode": 2, "A data set": 1, "A loss": 2, "A judge": 2, "A configuration key": 3}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository's files as they are now, without ignored ones."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: the files of the repository are unknown")
    folder = tmp_path / "copy"
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(command: list[str], folder: Path, script: str) -> str:
    """Run a command with `script` as its input; return its output."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        command, cwd=folder, input=script, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:] or result.stdout[-4000:]
    return result.stdout


def test_page_has_the_five_walks():
    assert set(WALKS) == set(FILES)


def apply_walk(text: str, copy: Path) -> list[str]:
    """Apply the diffs of a walk to a copy of the repository; return the files that they touch."""
    patch = "\n".join(diff.rstrip("\n") for diff in blocks(text, "diff")) + "\n"
    # Outside a repository `git apply` changes plain files.
    numbers = run(["git", "apply", "--numstat"], copy, patch).splitlines()
    run(["git", "apply"], copy, patch)
    return [line.split("\t")[2] for line in numbers]


@pytest.mark.parametrize("walk", FILES)
def test_walk_applies(walk: str, copy: Path):
    """It touches as many files as the page says, and none becomes too long."""
    text = WALKS[walk]
    files = apply_walk(text, copy)
    assert len(files) == len(blocks(text, "diff")) == FILES[walk]
    assert re.match(rf"\s*Files: {FILES[walk]}\b", text)
    for file in files:
        assert len((copy / file).read_text().splitlines()) <= 450, f"{file} is too long after this walk"


@pytest.mark.slow
@pytest.mark.parametrize("walk", FILES)
def test_walk_runs(walk: str, copy: Path, tmp_path: Path):
    """Its commands work in the copy, and finished work stays valid."""
    text = WALKS[walk]
    apply_walk(text, copy)
    commands = blocks(text, "bash")
    if "`INTRODUCED`" in text or "`OMITTED`" in text:  # the walk adds a key that decides results
        write_json(tmp_path / "before.json", identities())
        commands.append(f"python tests/helpers/same_identities.py '{tmp_path / 'before.json'}'\n")
    run(["bash", "-euo", "pipefail"], copy, "".join(commands))
