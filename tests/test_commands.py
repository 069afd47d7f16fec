"""Commands as users type them: the scripts of bin/, the README, and common mistakes."""

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest
from small import ROOT, run
from tiny import byte_tokenizer, tiny_model

import pipeline
import train
from ram.errors import UserError, run_entry_point
from ram.models import checkpoints
from ram.settings import recipes
from ram.storage.files import write_json, write_jsonl
from utils import TABLES


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Tiny data files under the published names and tiny trained models under the published run names."""
    root = tmp_path_factory.mktemp("small")
    rows = [{"instruction": f"say {i}", "output": f"word {i}", "generator": "x"} for i in range(6)]
    train_dir, test_dir = root / "data" / "train", root / "data" / "test"
    write_json(train_dir / "ultrachat_round_one.json", rows)
    write_jsonl(train_dir / "openai_summarize_tldr.jsonl", rows)
    dialogue = "\n\nHuman: say {0}\n\nAssistant: "
    pairs = [{"chosen": dialogue.format(i) + "yes", "rejected": dialogue.format(i) + "no"} for i in range(6)]
    write_jsonl(train_dir / "hh" / "helpful-base.jsonl", pairs)
    for tasks in pipeline.test_files.values():
        for name in tasks.values():
            hh = name.startswith("hh")
            text = [{**row, "instruction": dialogue.format(i)} if hh else row for i, row in enumerate(rows)]
            write_json(test_dir / name, text)
    tokenizer = byte_tokenizer()
    for recipe in ("llama_uc", "llama_summ", "llama_hh", "qwen_uc", "qwen_summ", "qwen_hh"):
        for stage in recipes.resolve([f"experiment={recipe}", f"output_dir={root / 'out'}"], TABLES):
            if stage.kind == "train":
                model = tiny_model(len(tokenizer), seed=len(stage.name))
                checkpoints.export_model(model, tokenizer, stage.weights, "float32", {"add_bos": False})
    return root


def script(name, *arguments, python=sys.executable):
    """Run a script of bin/ offline, with this Python interpreter or a replacement for it."""
    env = os.environ | {"PYTHON": str(python), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bin" / name), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, timeout=300
    )


def fake_python(folder, cases):
    """Create a program for PYTHON that logs its arguments to folder/calls and runs a shell `case`."""
    path = folder / "python"
    lines = f'#!/usr/bin/env bash\necho "$*" >> {folder}/calls\ncase "$*" in\n{cases}\nesac\n'
    path.write_text(lines)
    path.chmod(0o755)
    return path


LAUNCHER = ["-m", "ram.distributed.launch"]
TRAINING = sorted(path.name for path in (ROOT / "bin").glob("train_*.sh"))


@pytest.mark.parametrize("name", TRAINING)
def test_training_script_starts_its_recipe(name, small_world, caplog):
    """Each script passes its arguments on; the recipe resolves, finds its data, and lists its outputs."""
    overrides = ["dry_run=true", f"data_dir={small_world / 'data'}", f"output_dir={small_world / 'new'}"]
    result = script(name, *overrides, python="echo")
    module, launcher, entry, *arguments = result.stdout.split()
    assert result.returncode == 0 and [module, launcher, entry] == [*LAUNCHER, "train.py"]
    assert arguments == [f"experiment={name.removeprefix('train_').removesuffix('.sh')}", *overrides]
    run(train, *arguments)
    assert "everything else they need is there" in caplog.text and "ours_sft_" in caplog.text
    assert "weights of meta-llama/" in caplog.text or "weights of Qwen/" in caplog.text
    assert "cannot be reached: HF_HUB_OFFLINE is set" in caplog.text
    assert not (small_world / "new").exists()


def test_training_script_dry_run(small_world):
    overrides = ["dry_run=true", f"data_dir={small_world / 'data'}", f"output_dir={small_world / 'new'}"]
    result = script(TRAINING[0], *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "everything else they need is there" in result.stdout and "ours_sft_" in result.stdout
    assert not (small_world / "new").exists()


@pytest.mark.slow
def test_eval_ours_evaluates_the_eight_settings(small_world, tmp_path):
    """All published settings on tiny models: one recipe runs in the script, the others in this process."""
    common = [
        f"data_dir={small_world / 'data'}",
        f"output_dir={small_world / 'out'}",
        "sampling.max_length=60",
        "sampling.max_prompt_length=50",
        "evaluation.bootstrap=20",
    ]
    python = fake_python(tmp_path, f'*experiment=llama_uc*) exec "{sys.executable}" "$@" ;;')
    result = script("eval_ours.sh", *common, python=python)
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[:3] + call[4:] for call in calls] == [[*LAUNCHER, "pipeline.py", *common]] * 6
    for _, _, _, *arguments in calls[1:]:
        run(pipeline, *arguments)
    with open(small_world / "out" / "all_systems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = {
        (row["generator"].split("/")[0], row["dataset"], row["task"]) for row in rows if "+" in row["system"]
    }
    assert len(settings) == 8 and {row["judge"] for row in rows} == {"dummy"}
    for row in rows:
        assert 0 <= float(row["win_rate_low"]) <= float(row["win_rate"]) <= float(row["win_rate_high"]) <= 1
    # Tiny models judged by their length are not taken for the paper's.
    report, warning = (
        small_world / "out" / "report" / "llama_uc",
        "warning: judge=dummy prefers the longer answer",
    )
    assert warning in result.stdout and warning in (report / "report.html").read_text()
    assert (report / "leaderboard.md").read_text().startswith(warning)
    paper = (report / "paper_table.md").read_text()
    assert "not comparable: the published figures" in paper and "judged by dummy" in paper
    assert "W.Up 8B |" not in paper and "is published as W.Up 8B" in paper


def test_untrained_pairs_are_named_and_skipped(small_world, tmp_path):
    """An untrained pair ends with exit code 2; the script continues and names the pair at the end."""
    cases = f'*experiment=llama_uc*) exec "{sys.executable}" "$@" ;;\n*experiment=qwen_summ*) exit 2 ;;'
    python = fake_python(tmp_path, cases)
    overrides = [f"data_dir={small_world / 'data'}", f"output_dir={tmp_path}"]
    result = script("eval_ours.sh", *overrides, python=python)
    assert result.returncode == 1 and len((tmp_path / "calls").read_text().splitlines()) == 6
    assert "no model at" in result.stderr and "not evaluated: llama_uc qwen_summ (" in result.stderr


def test_missing_test_file_stops_its_own_task_alone(small_world, tmp_path, caplog):
    """It used to stop all tasks, also those that come before it."""
    (tmp_path / "test").mkdir()
    name = pipeline.test_files["hh"]["helpful"]
    (tmp_path / "test" / name).symlink_to(small_world / "data" / "test" / name)
    overrides = ["experiment=llama_hh", f"output_dir={small_world / 'out'}", f"data_dir={tmp_path}"]
    overrides += ["dry_run=true", "sampling.max_length=60", "sampling.max_prompt_length=50"]
    with pytest.raises(UserError, match=r"no test file: harmless \(.*harmless_test.*prepare_data.sh"):
        run(pipeline, *overrides)
    assert "helpful: proposal\n" in caplog.text and "harmless: proposal\n" not in caplog.text


MISTAKES = {
    "train.py lrr=1 model=llama1b": "error: unknown key 'lrr': did you mean 'lr'?",
    "train.py model=lama1b": "error: unknown model 'lama1b': did you mean 'llama1b'?",
    "train.py experiment=llama_uc data_dir=nowhere": "error: stage 'proposal' reads nowhere/train/ultra",
    "pipeline.py experiment=demo output_dir=nowhere": "error: no such file: nowhere/data/seed0/test/toy_test",
    "pipeline.py report=nowhere": "error: report=nowhere: no report.json there; give the folder",
    "pipeline.py": "error: evaluation.systems is empty: give experiment=NAME",
}


def check_mistake(command, code, errors, folder):
    assert code == 2, errors
    assert errors.startswith(MISTAKES[command]) and errors.count("\n") == 1
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_end_in_one_line_and_exit_code_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entry, *arguments = shlex.split(command)
    with pytest.raises(SystemExit) as stopped:
        run_entry_point(lambda: run({"train.py": train, "pipeline.py": pipeline}[entry], *arguments))
    check_mistake(command, stopped.value.code, capsys.readouterr().err, tmp_path)


@pytest.mark.parametrize("command", ["train.py lrr=1 model=llama1b", "pipeline.py report=nowhere"])
def test_mistakes_in_whole_processes(command, tmp_path):
    """One error before Hydra and one inside it; stdin is not read."""
    entry, *arguments = shlex.split(command)
    result = subprocess.run(
        [sys.executable, str(ROOT / entry), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    check_mistake(command, result.returncode, result.stderr, tmp_path)


@pytest.mark.slow
def test_gpu_check_passes_in_tiny_shapes():
    """`bin/gpu_check.sh` ends with one JSON object and exit status 0, with or without a GPU."""
    done = script("gpu_check.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["failed"] == []
