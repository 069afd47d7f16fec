"""bin/real_example.sh, its quick way with a tiny model and made-up posts, from the data to the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chatty import chatml_tokenizer
from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quick_way_ends_with_a_report_and_continues(tmp_path):
    """A stopped run continues: the second call trains nothing again and prints the same table."""
    pytest.importorskip("gguf", reason="the extra `real` is not installed")
    pytest.importorskip("rouge_score", reason="the extra `real` is not installed")
    for name in ("bin", "config", "ram", *(path.name for path in ROOT.glob("*.py")), "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").unlink()
    shutil.copytree(ROOT / "bin", tmp_path / "bin")
    tokenizer = chatml_tokenizer()
    tiny_model(len(tokenizer), 0, layers=8).save_pretrained(tmp_path / "proposal")
    tokenizer.save_pretrained(tmp_path / "proposal")
    posts = [{"prompt": f"post {n} about {n % 7}", "label": f"{n % 7} in short"} for n in range(260)]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    command = [
        "bash",
        "bin/real_example.sh",
        "posts.jsonl",
        "quick=true",
        "max_length=160",
        "max_prompt_length=120",
    ]
    keys = {"PYTHON": sys.executable, "PROPOSAL": str(tmp_path / "proposal"), "HF_HUB_OFFLINE": "1"}

    def call() -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | keys, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    first = call()
    out = tmp_path / "_output" / "real_quick"
    assert "chosen on held-out posts: evaluation.systems={proposal+aligner_ratio\\[product\\]: " in first
    assert {path.name for path in (out / "report" / "smollm_summ").iterdir()} >= {
        "leaderboard.csv",
        "likelihood.md",
    }
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert len(weights) >= 8
    call()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == weights


STUB = """#!/bin/bash
case "$*" in *ram.evaluation.choices*) exit "${CHOICES:-0}" ;; esac
"""


@pytest.fixture
def example(tmp_path):
    """Call the script with a Python that does nothing, on a folder with models and data in it."""
    shutil.copytree(ROOT / "bin", tmp_path / "bin")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "label": "x"}}\n')
    for name in ("smollm", "smollm7", "data"):
        (tmp_path / "_output" / "real" / name).mkdir(parents=True)
    (tmp_path / "_output" / "real" / "data" / "text.jsonl").touch()
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)

    def call(name, **keys):
        environment = os.environ | {"PYTHON": str(python)} | keys
        command = ["bash", "bin/real_example.sh", name]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return call


def test_other_data_are_not_taken_for_the_same(example):
    """Nothing would be made again: the results would be those of the first file."""
    assert example("a.jsonl").returncode == 0 and example("a.jsonl").returncode == 0
    for name, keys in (("b.jsonl", {}), ("a.jsonl", {"FIELDS": "x,y"}), ("a.jsonl", {"TEXT": "b.jsonl"})):
        done = example(name, **keys)
        assert done.returncode == 2 and "was made from other data" in done.stderr


def test_failed_choice_ends_the_script(example):
    """Otherwise the evaluation would go on with settings that nothing has chosen."""
    assert example("a.jsonl", CHOICES="1").returncode == 1
