"""A stranger's file of messages: the four commands of docs/own_pair.md train, decode, evaluate and serve."""

import json
import re
import shlex
from pathlib import Path

import pytest
from chatty import CHATML as TEMPLATE
from chatty import save_chatty
from pages import commands
from served import ask, listening
from small import ROOT, run
from transformers import AutoTokenizer

import pipeline
import train
from ram.errors import UserError
from ram.serving import api, http
from ram.serving.registry import Models
from ram.settings import recipes, serving
from ram.storage.files import read_json
from utils import TABLES

# Smaller than the page's run, which a test has no time for.
SHORT = ["max_length=140", "max_prompt_length=120", "stage.proposal.n_examples=32", "evaluation.bootstrap=50"]
SHORT += ["evaluation.examples=2"]


def write_models_and_data(folder: Path, rows: int = 24, tests: int = 6) -> None:
    """Write what the page begins with: two models with one chat template, and two files of messages."""
    save_chatty(folder / "models" / "large", 0, hidden=32)
    save_chatty(folder / "models" / "small", 1)
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"{i}."},
            ]
        }
        for i in range(rows + tests)
    ]
    for name, part in (("my.jsonl", dialogues[:rows]), ("my_test.jsonl", dialogues[rows:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))


def commands_of_the_page() -> list[list[str]]:
    """The script and the arguments of each command of the page."""
    found = commands((ROOT / "docs" / "own_pair.md").read_text(encoding="utf-8"))
    return [[Path(words[1]).stem, *words[2:]] for words in map(shlex.split, found)]


def test_four_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_models_and_data(tmp_path)
    dry, trains, evaluates, serves = commands_of_the_page()
    assert [line[0] for line in (dry, trains, evaluates, serves)] == ["train", "train", "pipeline", "serve"]
    run(train, *dry[1:], *SHORT)
    assert not Path("_output").exists(), "a dry run writes nothing"
    run(train, *trains[1:], *SHORT)
    run(pipeline, *evaluates[1:], *SHORT)

    figures = read_json("_output/report/pair/results.json")["systems"]
    names = ["proposal", "aligner", "proposal+aligner[par]", "proposal+aligner[par_kl]"]
    assert list(figures) == names
    assert all(figures[name]["nll"] > 0 for name in names)
    (folder,) = Path("_output/pair/own").glob("ours_sft_my_small*/LATEST#*par_k*")
    answers = read_json(folder / "output.json")
    assert [row["instruction"] for row in answers] == [f"What is {i}?" for i in range(24, 30)]

    config = serving.read_settings([*serves[1:], "port=0", *SHORT], TABLES)
    models, listener = Models(config), http.listen(config)
    url = http.url_of(config, listener.getsockname()[1])
    messages = [{"role": "user", "content": "What is 3?"}]
    with listening(models, api.create_app(models), listener):
        answer = ask(url, {"model": "aligner", "messages": messages, "max_tokens": 4}).json()
    ids = AutoTokenizer.from_pretrained("models/small").apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert answer["usage"]["prompt_tokens"] == len(ids)


def resolve(folder: Path, *more: str) -> dict[str, recipes.Stage]:
    keys = [f"pair.proposal={folder}/models/large", f"pair.aligner={folder}/models/small"]
    keys += ["experiment=pair", f"datasets=[{folder}/my.jsonl]", f"output_dir={folder}/out"]
    return {stage.name: stage for stage in recipes.resolve([*keys, *more], TABLES)}


def test_stages_of_the_recipe(tmp_path: Path):
    """Run names come from the file's stem; the aligner reads the samples unless its loss needs none."""
    write_models_and_data(tmp_path)
    stages = resolve(tmp_path)
    assert list(stages) == ["proposal", "sample", "aligner"]
    assert stages["proposal"].output.name == "wu_sft_my_large_b16_lr2e-05"
    assert stages["aligner"].config.datasets == [f"{tmp_path}/my.jsonl_large"]
    assert stages["aligner"].reads == [stages["sample"].output]

    plain = resolve(tmp_path, "pair.warm_up=false")
    assert str(plain["proposal"].weights) == plain["sample"].source == f"{tmp_path}/models/large"

    ratio = resolve(tmp_path, "pair.loss=ratio")
    assert list(ratio) == ["proposal", "aligner"]
    assert ratio["aligner"].config.datasets == [f"{tmp_path}/my.jsonl"]
    assert ratio["aligner"].proposal == str(ratio["proposal"].weights)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["datasets=[x.jsonl]"], "give pair.proposal and pair.aligner, each a folder"),
        (["pair.proposal=a/b", "pair.aligner=a/c"], "datasets is not set: give a file"),
        (["pair.proposal=a/b", "pair.aligner=a/c", "datasets=[x.jsonl,y.json]"], "expected one to sample"),
        (
            ["pair.proposal=a/b", "pair.aligner=a/c", "datasets=[x.jsonl]", "pair.warm_up=false"],
            "expected a folder, not 'a/b'",
        ),
        (["pair.proposal=lama8b", "pair.aligner=a/c", "datasets=[x.jsonl]"], "did you mean 'llama8b'"),
    ],
)
def test_missing_parts_are_told(keys: list[str], words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        recipes.resolve(["experiment=pair", *keys], TABLES)


def test_two_templates_are_refused_before_training(tmp_path: Path):
    """The aligner would learn other prompts than the proposal reads."""
    write_models_and_data(tmp_path)
    save_chatty(tmp_path / "models" / "small", 1, template="{{ bos_token }}" + TEMPLATE)
    with pytest.raises(UserError, match="have different chat templates; give the folder of the right one"):
        train.check_templates(list(resolve(tmp_path).values()))
    given = f"model.tokenizer_name_or_path={tmp_path}/models/large"
    train.check_templates(list(resolve(tmp_path, given).values()))
