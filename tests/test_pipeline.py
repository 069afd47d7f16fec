"""The demo from end to end in small: what it leaves, restarts, what a change reaches, what is refused."""

import contextlib
import csv
import io
import json
import random
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from damage import damage
from omegaconf import OmegaConf
from small import SMALL, run, settings

import pipeline
import train
import trainers
from ram import log
from ram.answers import answer_files
from ram.errors import UserError
from ram.models import publish, run_folder
from ram.settings import serving
from ram.storage.files import write_json
from ram.storage.provenance import commit
from utils import TABLES

SYSTEMS = {
    "proposal",
    "proposal_sft",
    "aligner_sft_only",
    "proposal+aligner[par]",
    "proposal+aligner[par_kl]",
    "proposal+aligner[product]",
    "proposal_sft+aligner[par]",
    "proposal+aligner_sft_only[par]",
    "proposal+aligner_sft_only[mixture]",
    "proposal+corrector",
}


def demo(folder, *overrides):
    for entry in (train, pipeline):
        run(entry, "experiment=demo", f"output_dir={folder}", *SMALL, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small demo; console.txt in it has what a brief console showed."""
    folder = tmp_path_factory.mktemp("demo")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        demo(folder, "console=brief")
    log.use_console("full")
    (folder / "console.txt").write_text(shown.getvalue())
    return folder


def test_brief_console_has_a_line_per_stage_and_a_table(finished):
    """It used to print a line every two seconds: 1,000 for the demo. The last lines can be pasted."""
    lines = (finished / "console.txt").read_text().splitlines()
    stages = [line for line in lines if line.startswith("stage ")]
    assert len(stages) == 10 and stages[0].split()[:5] == ["stage", "1", "of", "10", "world"]
    assert re.fullmatch(
        r"stage  3 of 10  general_aligner +sft of toy-small, held-out loss [\d.]+, \d+ s", stages[2]
    )
    assert sum(line.startswith(tuple(SYSTEMS)) for line in lines) == len(SYSTEMS)
    assert f"report      {finished}/report.html" in lines
    assert "facts: answers of 10 of 10 systems" in str(lines)
    assert len(lines) <= 34
    table = [line for line in lines if line.startswith("proposal+aligner_sft_only[par]")]
    assert len(table) == 1 and len(table[0]) <= 80
    (serve,) = [line.split("bash bin/serve.sh ")[1] for line in lines if line.startswith("serve it")]
    settings = serving.read_settings(shlex.split(serve), TABLES)
    assert list(settings.aligners) == ["aligner", "aligner_sft_only"]
    models = [settings.config.proposal, *settings.aligners.values()]
    assert all(model.startswith(f"{finished}/model/") for model in models)
    assert (settings.params.sample_mode, settings.params.base_temperature) == ("par", 0.5)
    assert settings.config.max_new_tokens == 12


def test_recipe_is_served_with_keys_of_the_command_line(finished):
    """Keys of serve.yaml win over the recipe; others are the recipe's; an untrained pair is refused."""
    recipe = ["experiment=demo", f"output_dir={finished}"]
    settings = serving.read_settings([*recipe, "sampling.top_p=0.5", "port=0", "seed=0"], TABLES)
    assert (settings.params.top_p, settings.params.temperature, settings.config.seed) == (0.5, 1.0, 0)
    with pytest.raises(
        UserError, match="no model at .*seed1.*; train it first with the same keys, `python tr"
    ):
        serving.read_settings([*recipe, "seed=1"], TABLES)
    with pytest.raises(UserError, match="unknown key 'prot': did you mean"):
        serving.read_settings([*recipe, "prot=1"], TABLES)


def test_run_is_found_by_folder_and_by_name(finished):
    run_dir = next(finished.glob("model/ours_sft_*"))
    weights = str(run_dir / "LATEST")
    for reference in (weights, str(run_dir)):
        assert run_folder.find_served(reference) == weights
    assert run_folder.find_served(run_dir.name, finished) == weights
    assert run_folder.find_served("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    with pytest.raises(UserError, match=f"did you mean '{re.escape(run_dir.name)}'"):
        run_folder.find_served(run_dir.name[:-1], finished)
    with pytest.raises(UserError, match="no model at 'x/y/z'"):
        run_folder.find_served("x/y/z")


def test_model_card_has_proposal_mode_settings_and_figures(finished):
    publish.main([str(next(finished.glob("model/ours_sft_*")))])
    card = (next(finished.glob("model/ours_sft_*")) / "LATEST" / "README.md").read_text()
    proposal = next(finished.glob("model/wu_sft_*")).name
    assert "It is a residual aligner: it decodes together with " in card and f", {proposal}." in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| proposal+aligner[")]
    assert [row[3] for row in rows] == ["par", "par_kl", "product"]
    assert all(row[1] == proposal and "base_temperature 0.5" in row[4] for row in rows)
    assert all(
        "exact, against proposal, toy/facts" in row[5] and "prompts 12, win rate 0." in row[6] for row in rows
    )
    assert "| loss.alpha | 0.01 |" in card and "bash bin/serve.sh chat proposal=PROPOSAL aligner=" in card
    with pytest.raises(UserError, match="no model 'nothing'"):
        publish.main(["nothing"])


class FakeHub:
    """huggingface_hub.HfApi without a network: keeps what is uploaded, or refuses as the hub does."""

    repositories: dict[str, dict[str, bytes]] = {}
    refusal: Exception | None = None

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.refusal is not None:
            raise self.refusal
        assert private and exist_ok
        self.repositories.setdefault(repo_id, {})

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = {str(path.relative_to(folder_path)): path.read_bytes() for path in files}
        self.repositories[repo_id] = kept | {"message": commit_message.encode()}


def test_push_uploads_weights_tokenizer_and_card(finished, monkeypatch, caplog):
    """Into a private repository, and only if asked; a refusal is one line that says how to log in."""
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "repositories", {})
    run_dir = next(finished.glob("model/ours_sft_*"))
    publish.main([str(run_dir)])
    assert FakeHub.repositories == {}
    publish.main([str(run_dir), "--push", "org/aligner"])
    ((name, files),) = FakeHub.repositories.items()
    weights = run_dir / "LATEST"
    assert name == "org/aligner" and files.pop("message") == f"Upload {run_dir.name}".encode()
    assert files == {path.name: path.read_bytes() for path in weights.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert card.split("\n---\n")[1].startswith("# org/aligner") and "aligner=org/aligner" in card
    assert "uploaded https://huggingface.co/org/aligner" in caplog.text
    monkeypatch.setattr(FakeHub, "refusal", OSError("401 Client Error\nRequest ID: x"))
    with pytest.raises(UserError, match=r"^org/b was not uploaded \(401 Client Error\): `hf auth login`\?$"):
        publish.main([str(run_dir), "--push", "org/b"])


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
        assert Path(row["test_file"]).is_file()
        assert row["settings"].startswith(("t", "base_t")) and row["generator"].endswith(
            f"#{row['settings']}"
        )
    for name in ("leaderboard.md", "leaderboard.tex"):
        assert len((finished / name).read_text().splitlines()) == len(SYSTEMS) + (1 + name.endswith("md"))
    page = (finished / "report.html").read_text()
    assert all(name in page for name in SYSTEMS) and not re.search("https?:", page)


def test_report_has_figures_of_pairs_and_is_rebuilt_identically(finished, tmp_path):
    """Every pair's tokens have figures for the rows asked for; `report=FOLDER` alone gives the same bytes."""
    made = [finished / name for name in ("report.html", "leaderboard.md", "leaderboard.tex")]
    saved = json.loads((finished / "report.json").read_text())["report"]
    assert [system["name"] for system in saved["systems"]] == [row["system"] for row in saved["board"]]
    about = {system["name"]: system for system in saved["about"]["systems"]}
    assert list(about) == [row["system"] for row in saved["board"]]
    assert about["proposal+aligner[par]"]["alpha"] == 0.01 and about["proposal"]["alpha"] is None
    assert about["proposal"]["proposal"].startswith("proposal, 0.8")
    command = shlex.split(about["proposal+aligner[par]"]["command"])
    settings = serving.read_settings(command[3:])
    assert command[:3] == ["bash", "bin/serve.sh", "chat"] and settings.params.sample_mode == "par"
    lead = saved["about"]["lead"]
    assert lead.startswith("6 pairs of a frozen proposal and a small aligner, 3 models alone"), lead
    outcome = r"No pair does better than proposal|wins [\d.]+ % of 12 prompts against proposal"
    assert re.search(outcome, lead), lead
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


def test_outputs_have_alpaca_format(finished):
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


def test_second_run_reuses_everything(finished):
    before = snapshot(finished)
    demo(finished)
    assert snapshot(finished) == before


def test_dry_run_of_a_finished_evaluation_writes_nothing(finished, monkeypatch):
    """It wrote the table of all systems anew, and so failed on a read-only mount."""
    monkeypatch.setattr(pipeline.tables, "merge_leaderboards", pytest.fail)
    before = snapshot(finished)
    run(pipeline, "experiment=demo", f"output_dir={finished}", *SMALL, "dry_run=true")
    assert snapshot(finished) == before


def test_changed_setting_remakes_dependent_outputs(finished, tmp_path, caplog):
    """A changed setting has its stage and all that read it made again; what was there is kept aside."""
    folder = copy_of(finished, tmp_path)
    small = ["experiment=demo", f"output_dir={folder}", *SMALL]
    stages = "stages=[general_proposal,proposal,sample,aligner]"
    before = snapshot(folder)
    run(train, *small, stages, "stage.proposal.n_examples=320")
    said = [message for message in caplog.messages if "created again" in message]
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
    assert not [message for message in caplog.messages if "created again" in message]
    with pytest.raises(UserError, match="holds a toy data set of other settings"):
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


def test_single_stage_refuses_inputs_of_other_settings(finished, tmp_path):
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


def test_judge_step_refuses_answers_to_other_rows(finished, tmp_path):
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
def test_wrong_settings_are_refused_before_decoding(finished, override, message):
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


def test_interrupted_run_finishes_identically(finished, tmp_path, monkeypatch):
    """A run interrupted in training, sampling and generation gives the files of an uninterrupted run."""
    update, add = trainers.BasicTrainer.update, answer_files.PartFiles.add

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
        (answer_files.PartFiles, "add", stop_at_fourth(add, lambda part: "sampling" in part.path.name)),
        (answer_files.PartFiles, "add", stop_at_fourth(add, lambda part: "output.json" in part.path.name)),
    ]
    for owner, name, call in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, call)
            demo(tmp_path)
    demo(tmp_path)
    assert contents(tmp_path) == contents(finished)


@pytest.mark.parametrize(
    "steps, executed",
    [
        (["report"], "likelihood judge verify leaderboard report"),
        (["judge", "generate"], "generate judge"),
        (["influence", "leaderboard"], "influence likelihood judge verify leaderboard"),
        (["verify"], "verify"),
        ([], ""),
    ],
)
def test_steps_run_in_order_with_those_they_need(monkeypatch, steps, executed):
    calls = []
    recorders = {name: lambda context, name=name: calls.append(name) for name in pipeline.STEPS}
    monkeypatch.setattr(pipeline, "STEPS", recorders)
    config = OmegaConf.create({"evaluation": {"steps": steps}})
    loaded = SimpleNamespace(drop=lambda: calls.append("drop"))
    pipeline.run_steps(SimpleNamespace(config=config, loaded=loaded))
    assert calls[::2] == executed.split()
    assert calls[1::2] == ["drop"] * len(calls[::2])  # no step keeps another's models in memory


def test_test_file_replaces_that_of_the_data_set():
    own = settings("experiment=demo", "evaluation.test_file=mine.jsonl")
    assert pipeline.test_file(own, "facts") == Path("mine.jsonl")
    assert pipeline.test_file(settings("experiment=demo"), "facts").name == "toy_test.json"


def test_dry_run_writes_nothing(tmp_path, caplog):
    run(train, "experiment=demo", f"output_dir={tmp_path / 'x'}", "dry_run=true")
    assert "10 stages: everything they need is there" in caplog.text and "n_examples 32000" in caplog.text
    assert list(tmp_path.iterdir()) == []


def run_on_damage(finished, tmp_path, count, seed):
    """Damage one file of a finished demo, run both commands on it, and count the outcomes.

    Either the results are those of the undamaged demo, or a command refuses the file in one line.
    """
    rng = random.Random(seed)
    outcomes = {"right": 0, "refused": 0}
    expected = contents(finished)
    for _ in range(count):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = copy_of(finished, tmp_path)
        path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        how = f"{damage(path, rng)} of {path.relative_to(folder)}"
        try:
            demo(folder)
        except UserError as error:
            assert "\n" not in str(error), how
            outcomes["refused"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{how}: {type(error).__name__}: {error}") from error
        assert contents(folder) == expected, how
        outcomes["right"] += 1
    return outcomes


def test_commands_survive_damage(finished, tmp_path):
    run_on_damage(finished, tmp_path, 2, seed=0)


@pytest.mark.slow
def test_commands_survive_much_damage(finished, tmp_path, capsys):
    outcomes = run_on_damage(finished, tmp_path, 150, seed=1)
    with capsys.disabled():
        sys.stdout.write(f"\n150 damages through both commands: {outcomes}\n")
