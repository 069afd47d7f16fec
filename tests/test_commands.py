"""What a user types: the demo from end to end in small, restarts, every script, every command of the
README.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_model

import checkpoints
import evaluation
import judges
import pipeline
import recipes
import sampling
import train
import trainers
from files import write_json, write_jsonl
from utils import UserError, commit

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "world.entities=8",
    "world.general_rows=200",
    "world.aligned_rows=12",
    "stage.general_proposal.n_examples=128",
    "stage.general_aligner.n_examples=128",
    "stage.proposal.n_examples=16",
    "stage.proposal_sft.n_examples=32",
    "stage.aligner.n_examples=64",
    "stage.aligner_sft_only.n_examples=64",
    "stage.corrector_warmup.n_examples=64",
    "stage.corrector.n_examples=32",
    "evaluation.bootstrap=50",
    "evaluation.examples=2",
    "evaluation.verify_rows=3",
    "eval_every=64",
    "sampling.batch_size=5",
]
SYSTEMS = {
    "proposal",
    "proposal_sft",
    "aligner_sft_only",
    "proposal+aligner[par]",
    "proposal+aligner[par_kl]",
    "proposal+aligner[product]",
    "proposal_sft+aligner[par]",
    "proposal+aligner_sft_only[par]",
    "proposal+corrector",
}


def run(entry, *overrides):
    """What `python train.py OVERRIDES` does after its command line was read."""
    overrides = recipes.preflight(list(overrides))
    entry.run(recipes.compose(overrides), overrides)


def demo(folder, *overrides):
    for entry in (train, pipeline):
        run(entry, "experiment=demo", f"output_dir={folder}", *SMALL, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo(folder)
    return folder


def test_demo_leaves_results_leaderboard_and_report(finished):
    """results.json has every system and figure that others read; the leaderboard and the report show them."""
    found = json.loads((finished / "results.json").read_text())
    assert set(found["systems"]) == SYSTEMS
    for name, row in found["systems"].items():
        assert {"correct", "aligned", "both", "win_rate", "win_rate_ci95", "n"} <= set(row)
        assert row["n"] == 12 and row["win_rate_ci95"][0] <= row["win_rate"] <= row["win_rate_ci95"][1]
        assert ("fallback_fraction" in row) == name.endswith("]")  # a pair
    assert found["systems"]["proposal"]["win_rate"] == 0.5
    decoding = found["decoding"]
    assert decoding["identical_to_plain"] is True and set(decoding["tokens_per_second"]) == SYSTEMS
    assert 0 <= decoding["acceptance"] <= 1 and 0 <= decoding["fallback_fraction"] <= 1
    assert found["seconds"] > 0
    with open(finished / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["system"] for row in rows} == SYSTEMS
    for row in rows:
        assert (row["judge"], row["judge_settings"], row["commit"]) == ("exact", "", commit())
        assert row["settings"].startswith(("t", "base_t")) and row["generator"].endswith(
            f"#{row['settings']}"
        )
    for name in ("leaderboard.md", "leaderboard.tex"):
        assert len((finished / name).read_text().splitlines()) == len(SYSTEMS) + (1 + name.endswith("md"))
    page = (finished / "report.html").read_text()
    assert all(name in page for name in SYSTEMS) and not re.search("https?:", page)


def test_report_has_figures_of_pairs_and_is_made_again_alike(finished, tmp_path):
    """Every pair's tokens have figures for the rows asked for; `report=FOLDER` alone gives the same bytes."""
    made = [finished / name for name in ("report.html", "leaderboard.md", "leaderboard.tex")]
    saved = json.loads((finished / "report.json").read_text())["report"]
    assert [system["name"] for system in saved["systems"]] == [row["system"] for row in saved["board"]]
    for place, system in enumerate(saved["systems"]):
        with_figures = [i for i, row in enumerate(saved["rows"]) if "influence" in row["answers"][place]]
        assert with_figures == ([0, 11] if system["name"].endswith("]") else []) and system["note"] is None
        judged = (finished / system["judgements"]).read_text().splitlines()
        assert [json.loads(line) for line in judged] == [
            row["answers"][place]["judged"] for row in saved["rows"]
        ]
        assert (finished / system["folder"] / "output.json").is_file()
    gated = [row["answers"][4] for row in saved["rows"]]
    for answer in (answer for answer in gated if "influence" in answer):
        fell_back = [
            value for value, code in zip(answer["influence"], answer["codes"], strict=True) if code == "f"
        ]
        assert fell_back == pytest.approx([0.0] * len(fell_back), abs=1e-3)
    before = [path.read_bytes() for path in made]
    made[0].unlink()
    run(pipeline, f"report={finished}")
    assert [path.read_bytes() for path in made] == before
    with pytest.raises(UserError, match="no report.json there"):
        run(pipeline, f"report={tmp_path}")


def test_outputs_are_alpaca_rows(finished):
    """output.json has AlpacaEval's fields for every test row, in the order of the test file."""
    test = json.loads((finished / "data" / "seed0" / "test" / "toy_test.json").read_text())
    outputs = sorted(finished.glob("toy/facts/*/*/output.json"))
    assert len(outputs) == len(SYSTEMS)
    for path in outputs:
        rows = json.loads(path.read_text())
        assert [row["instruction"] for row in rows] == [row["instruction"] for row in test]
        assert all(
            row["generator"] == "/".join(path.parts[-3:-1]) and isinstance(row["output"], str) for row in rows
        )


def snapshot(folder):
    return {
        p: p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and "model" in p.parts or p.name == "output.json"
    }


def test_second_run_redoes_nothing(finished):
    before = snapshot(finished)
    demo(finished)
    assert snapshot(finished) == before


def test_what_a_change_reaches_is_made_anew(finished, tmp_path, caplog):
    """A changed setting has its stage and all that read it made again; what was there is kept aside."""
    folder = copy_of(finished, tmp_path)
    small = ["experiment=demo", f"output_dir={folder}", *SMALL]
    stages = "stages=[general_proposal,proposal,sample,aligner]"
    before = snapshot(folder)
    run(train, *small, stages, "stage.proposal.n_examples=320")
    said = [message for message in caplog.messages if "made anew" in message]
    assert len(said) == 3 and "(n_examples: 16 -> 320); kept as" in said[0]
    assert "(proposal: " in said[1] and "(data: " in said[2]
    assert any("general_proposal: done before" in message for message in caplog.messages)
    # Every file of the first run is still there, under its own name or as the old one.
    after = snapshot(folder)
    for path, written in before.items():
        parts = path.relative_to(folder).parts
        old = [folder.joinpath(*parts[:i], parts[i] + ".old", *parts[i + 1 :]) for i in range(len(parts))]
        assert written in [after.get(place) for place in (path, *old)], path
    caplog.clear()
    run(train, *small, stages, "stage.proposal.n_examples=320")
    assert not [message for message in caplog.messages if "made anew" in message]
    with pytest.raises(UserError, match="holds a toy world of other settings"):
        run(train, *small, "world.entities=9")


def copy_of(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_evaluation_refuses_weights_of_other_settings(finished):
    """pipeline.py with settings that the run folder was not trained with: refused, and nothing written."""
    before = snapshot(finished)
    with pytest.raises(
        UserError, match=r"trained with other settings \(max_grad_norm: 1.0 -> 2.0\); give those"
    ):
        run(pipeline, "experiment=demo", f"output_dir={finished}", *SMALL, "max_grad_norm=2.0")
    assert snapshot(finished) == before


def test_a_stage_alone_refuses_what_other_settings_made(finished, tmp_path):
    """stages=[...] checks what it reads: samples of another temperature, weights of another schedule."""
    small = ["experiment=demo", f"output_dir={copy_of(finished, tmp_path)}", *SMALL]
    with pytest.raises(
        UserError,
        match=r"_sampling_toy-large.jsonl was made from other inputs \(base_temperature: 1.0 -> 0.7\)",
    ):
        run(train, *small, "stages=[aligner]", "stage.sample.sampling.base_temperature=0.7")
    with pytest.raises(UserError, match=r"stage 'proposal': .* other settings \(lr: 5e-05 -> 0.01\)"):
        run(
            train,
            *small,
            "stages=[sample]",
            "stage.proposal.lr=0.01",
            "stage.proposal.exp_name=" + (next((tmp_path / "copy" / "model").glob("wu_*")).name),
        )
    run(train, *small, "stages=[aligner]")


def test_judging_alone_refuses_answers_to_other_rows(finished, tmp_path):
    """Answers are judged only where they answer these rows by these weights, and are as they were written."""
    folder = copy_of(finished, tmp_path)
    small = ["experiment=demo", f"output_dir={folder}", *SMALL, "evaluation.steps=[judge]"]
    run(pipeline, *small)
    test = folder / "data" / "seed0" / "test" / "toy_test.json"
    rows = json.loads(test.read_text())
    write_json(test, [rows[0] | {"instruction": "What is the dish of Nobody?"}, *rows[1:]])
    with pytest.raises(UserError, match=r"output.json was made from other inputs \(rows: "):
        run(pipeline, *small)
    write_json(test, rows)
    trace = next(folder.glob("toy/facts/*/*/output.trace.jsonl"))
    trace.write_text(trace.read_text().replace('"text": "', '"text": "!', 1))
    with pytest.raises(UserError, match="trace.jsonl was changed or cut short after it was written"):
        run(pipeline, *small)


@pytest.mark.parametrize(
    "override, message",
    [
        ("evaluation.reference=proposa", "unknown evaluation.reference .* did you mean 'proposal'"),
        ("evaluation.steps=[jugde]", "unknown step 'jugde': did you mean 'judge'"),
        ("evaluation.systems.proposal.limit=3", "compared on the same rows; set sampling.limit"),
        ("evaluation.systems.proposal.temprature=3", "unknown sampling key 'temprature'"),
        ("evaluation.tasks.facts.temperature=hot", "sampling.temperature='hot': expected float"),
    ],
)
def test_evaluation_is_refused_before_it_decodes(finished, override, message):
    before = snapshot(finished)
    with pytest.raises(UserError, match=message):
        run(pipeline, "experiment=demo", f"output_dir={finished}", *SMALL, override)
    assert snapshot(finished) == before


def contents(folder):
    """Everything that must not depend on interruptions: weights, samples, answers, figures."""
    found = {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors") if "cache" not in p.parts
    }
    found |= {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*sampling*.jsonl")}
    for path in folder.glob("toy/facts/*/*/output.json"):
        answers = [row["output"] for row in json.loads(path.read_text())]
        found[path.parts[-3]] = sorted(
            [*found.get(path.parts[-3], []), answers]
        )  # the folder's hash knows the path
    systems = json.loads((folder / "results.json").read_text())["systems"]
    for row in systems.values():
        row.pop("mean_kl", None)  # rounded as the batch's shape has it, unlike every token
    return found | {"systems": systems}


def test_interrupted_anywhere_the_same_command_finishes_alike(finished, tmp_path, monkeypatch):
    """Ctrl-C in training, in sampling and in generation: started again, everything ends as if
    uninterrupted.
    """
    update, add = trainers.BasicTrainer.update, sampling.PartFiles.add

    def stop_at_fourth(original, wanted):
        calls = iter(range(1000))

        def call(self, *args):
            if wanted(self) and next(calls) == 3:
                raise KeyboardInterrupt
            return original(self, *args)

        return call

    stops = [
        (
            trainers.BasicTrainer,
            "update",
            stop_at_fourth(update, lambda trainer: "sft_toy_" in trainer.run_dir.name),
        ),
        (sampling.PartFiles, "add", stop_at_fourth(add, lambda part: "sampling" in part.path.name)),
        (sampling.PartFiles, "add", stop_at_fourth(add, lambda part: "output.json" in part.path.name)),
    ]
    for owner, name, call in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, call)
            demo(tmp_path)
    demo(tmp_path)
    assert contents(tmp_path) == contents(finished)


def test_dry_run_writes_nothing(tmp_path, caplog):
    run(train, "experiment=demo", f"output_dir={tmp_path / 'x'}", "dry_run=true")
    assert "10 stages: everything they need is there" in caplog.text and "n_examples 32000" in caplog.text
    assert list(tmp_path.iterdir()) == []


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
        for stage in recipes.resolve([f"experiment={recipe}", f"output_dir={root / 'out'}"]):
            if stage.kind == "train":
                model = tiny_model(len(tokenizer), seed=len(stage.name))
                checkpoints.export_model(model, tokenizer, stage.weights, "float32", {"add_bos": False})
    return root


def script(name, *arguments, check=True, **environment):
    """Runs a script of bin/ as a user would, with this interpreter and without a hub."""
    env = os.environ | {
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        ["bash", str(ROOT / "bin" / name), *arguments],
        capture_output=True,
        text=True,
        env=env,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "bin").glob("train_*.sh")))
def test_training_scripts_dry_run(name, small_world):
    """Each script resolves, finds its data, and says what it would write."""
    out = script(
        name, "dry_run=true", f"data_dir={small_world / 'data'}", f"output_dir={small_world / 'new'}"
    ).stdout
    assert "everything they need is there" in out and "ours_sft_" in out
    assert not (small_world / "new").exists()


def test_eval_ours_evaluates_the_eight_settings(small_world):
    """generate, judge, leaderboard and report of all published settings on tiny models; then nothing is
    redone.
    """
    common = [
        f"data_dir={small_world / 'data'}",
        f"output_dir={small_world / 'out'}",
        "sampling.max_length=60",
        "sampling.max_prompt_length=50",
        "evaluation.bootstrap=20",
    ]
    for recipe in ("llama_summ", "llama_hh", "qwen_uc", "qwen_summ", "qwen_hh"):
        run(pipeline, f"experiment={recipe}", *common)
    script("eval_ours.sh", *common)
    with open(small_world / "out" / "all_systems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = {
        (row["generator"].split("/")[0], row["dataset"], row["task"]) for row in rows if "+" in row["system"]
    }
    assert len(settings) == 8 and {row["judge"] for row in rows} == {"dummy"}
    for row in rows:
        assert 0 <= float(row["win_rate_low"]) <= float(row["win_rate"]) <= float(row["win_rate_high"]) <= 1


def test_untrained_pairs_are_named_and_the_rest_runs(small_world, tmp_path):
    done = script("eval_ours.sh", f"data_dir={small_world / 'data'}", f"output_dir={tmp_path}", check=False)
    assert done.returncode == 1
    assert "no model at" in done.stderr and "not evaluated: llama_uc llama_summ" in done.stderr


MISTAKES = {
    "train.py lrr=1 model=llama1b": "error: unknown key 'lrr': did you mean 'lr'?",
    "train.py model=lama1b": "error: unknown model 'lama1b': did you mean 'llama1b'?",
    "train.py experiment=llama_uc data_dir=nowhere": "error: stage 'proposal' reads nowhere/train/ultra",
    "pipeline.py experiment=demo output_dir=nowhere": "error: no such file: nowhere/data/seed0/test/toy_test",
    "pipeline.py report=nowhere": "error: report=nowhere: no report.json there; give the folder",
    "pipeline.py": "error: evaluation.systems is empty: give experiment=NAME",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_end_in_one_line_and_exit_code_2(command, tmp_path):
    """From the shell: nothing on stdin is read, one line on stderr, exit code 2, no traceback, nothing
    written.
    """
    entry, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / entry), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(MISTAKES[command]) and done.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(bash bin/|python )", line)]


def test_readme_commands_are_real(small_world):
    """Every train.py, pipeline.py and bin/ command that the README shows resolves as it stands there."""
    commands = readme_commands()
    assert "bash bin/demo.sh" in commands and "bash bin/test.sh" in commands
    for command in commands:
        program, *arguments = shlex.split(command)
        target, *arguments = arguments
        assert (ROOT / target).is_file(), command
        overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
        if target.startswith("bin/train_"):
            overrides.insert(0, f"experiment={target.removeprefix('bin/train_').removesuffix('.sh')}")
        if target == "train.py" or target.startswith("bin/train_"):
            stages = recipes.resolve(recipes.preflight(overrides))
            recipes.select(stages, recipes.compose(recipes.preflight(overrides)).stages)
        elif target == "pipeline.py":
            recipes.preflight(overrides)


def test_readme_lists_every_file():
    """The README's file list names every Python file and every script."""
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(ROOT / "bin").glob("*.sh")]:
        assert path.name in text or path.name.startswith("train_"), path.name


def test_judges_and_bootstrap():
    """The dummy prefers length, ties half; the interval holds the mean, is seeded, and is exact for
    constants.
    """
    found = judges.dummy_judge([{}] * 3, ["aa", "a", "b"], ["a", "aa", "c"])
    assert [row["preference"] for row in found] == [1.0, 0.0, 0.5]
    values = [0.0, 1.0] * 50
    low, high = evaluation.bootstrap_interval(values, 1000, seed=0)
    assert (low, high) == evaluation.bootstrap_interval(values, 1000, seed=0)
    assert 0.37 < low < 0.43 and 0.57 < high < 0.63  # 0.5 +- 1.96 * 0.05
    assert evaluation.bootstrap_interval([0.25] * 9, 100, seed=1) == (0.25, 0.25)
    with pytest.raises(UserError, match="judge=exact needs the toy world's rows"):
        judges.exact_judge([{"instruction": "x"}], ["a"], ["b"])
