"""Models on disk and run folders: damage is named, what is finished is checked, what begins anew is
cleared.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_model_folder, tiny_model
from transformers import AutoModelForCausalLM

import train
import trainers
from ram.errors import UserError
from ram.models import checkpoints, run_folder
from ram.settings import recipes
from ram.storage.files import write_json
from utils import TABLES

TOKENIZER = byte_tokenizer()
SIZES = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


# ---- loading -----------------------------------------------------------------------------------------------


def saved(path):
    return save_model_folder(path, tiny_model(len(TOKENIZER), 0), TOKENIZER)


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_cut_weights_name_the_folder(tmp_path, keep):
    """A download that was cut short is one line, not the traceback of the file format's own error."""
    source = saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"\Acannot load a model from {source} .*cut short"):
        checkpoints.load_model(source)


@pytest.mark.parametrize("text", ['{"model_type": "ll', "[]", "5", "", '{"model_type": "nope"}'])
def test_a_broken_config_names_the_folder(tmp_path, text):
    """Whatever is in config.json, loading and the check before it say in one line where."""
    source = saved(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"\Acannot load a model from {source} "):
        checkpoints.load_model(source)
    if "nope" not in text:
        with pytest.raises(UserError, match=rf"{source}/config\.json"):
            checkpoints.check_context(source, 8)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", '{"a": '])
def test_a_broken_tokenizer_names_the_folder(tmp_path, name, text):
    source = saved(tmp_path / "m")
    (tmp_path / "m" / name).write_text(text)
    with pytest.raises(UserError, match=f"no tokenizer in {source}"):
        checkpoints.load_tokenizer(source)


def test_a_missing_tokenizer_is_said_to_be_missing(tmp_path):
    """A folder with the weights alone; transformers' own error is a list of what it tried."""
    source = saved(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"no tokenizer in {source}: expected its tokenizer.json; copy"):
        checkpoints.load_tokenizer(source)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 2), ("hidden_size", 32)])
def test_weights_of_another_config_are_refused(tmp_path, key, value):
    """Weights that config.json asks for and the folder lacks are never drawn at random."""
    source = saved(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=source):
        checkpoints.load_model(source)


# ---- fresh models ------------------------------------------------------------------------------------------

WRONG = [
    ({"model_type": "lama"}, r"unknown model\.architecture\.model_type 'lama': did you mean 'llama'"),
    ({"model_type": None}, r"unknown model\.architecture\.model_type None"),
    ({"hidden_sizes": 16}, r"unknown key model\.architecture\.hidden_sizes: did you mean 'hidden_size'"),
    ({"hidden_size": 18}, r"model\.architecture cannot .*hidden size \(18\) is not a multiple"),
    ({"hidden_size": "big"}, r"model\.architecture cannot .*hidden_size.* expected int, got str"),
    ({"num_attention_heads": 0}, r"model\.architecture cannot be made into a model"),
    ({"num_key_value_heads": 3}, r"model\.architecture cannot be made into a model"),  # shows when it runs
    ({"hidden_act": "silly"}, r"model\.architecture cannot be made into a model .*silly"),
    ({"vocab_size": 5}, r"model\.architecture cannot be made into a model .*vocab_size"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_an_architecture_that_is_none_is_named(changed, message):
    """Unknown types and keys, and sizes that do not fit together, end in one line before any training."""
    with pytest.raises(UserError, match=message):
        checkpoints.new_model(SIZES | changed, TOKENIZER, 0)


def test_fresh_weights_depend_on_their_seed_alone():
    """Whatever was drawn before; and nothing that is drawn afterwards depends on them."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = checkpoints.new_model(SIZES | {"attention_dropout": 0.5}, TOKENIZER, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    two = checkpoints.new_model(SIZES, TOKENIZER, 3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_lengths_are_checked_against_the_positions_of_any_model(tmp_path):
    """A folder's config, a fresh architecture, GPT-2's name for it; what states no limit has none."""
    source = saved(tmp_path / "m")
    checkpoints.check_context(source, 256)
    with pytest.raises(UserError, match=f"max_length=257, but {source} holds 256 positions"):
        checkpoints.check_context(source, 257)
    checkpoints.check_context(None, 64, SIZES)
    for architecture in (SIZES, {"model_type": "gpt2", "n_positions": 64}):
        with pytest.raises(UserError, match=r"max_length=65, but model\.architecture holds 64 positions"):
            checkpoints.check_context(None, 65, architecture)
    checkpoints.check_context(None, 9999, {"model_type": "llama"})
    checkpoints.check_context("owner/on-the-hub", 9999)


# ---- fingerprints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_fingerprint_covers_what_decides_the_text(tmp_path, name):
    """A change in the tokenizer's own settings is another model; a note beside the weights is not."""
    source = saved(tmp_path / "m")
    before = checkpoints.weights_fingerprint(source)
    (tmp_path / "m" / "README.md").write_text("a note")
    assert checkpoints.weights_fingerprint(source) == before
    path = tmp_path / "m" / name
    path.write_text((path.read_text() if path.is_file() else "") + "\n")
    assert checkpoints.weights_fingerprint(source) != before


# ---- run folders -------------------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path):
    """Makes the one stage of a tiny run on 12 rows; a fresh model unless weights are named."""
    rows = [{"instruction": f"say {i}", "output": f"word {i}", "sampling": f"no {i}"} for i in range(12)]
    write_json(tmp_path / "data" / "train" / "ultrachat_round_one_sampling_m.json", rows)
    TOKENIZER.save_pretrained(tmp_path / "data" / "tokenizer")

    def make(*overrides, **sizes):
        sized = ", ".join(f"{key}: {json.dumps(value)}" for key, value in (SIZES | sizes).items())
        fresh = f"model.architecture={{{sized}}}"
        overrides = [
            f"data_dir={tmp_path / 'data'}",
            f"output_dir={tmp_path}",
            "exp_name=run",
            "datasets=[uc_m]",
            *([] if any("name_or_path" in override for override in overrides) else [fresh]),
            f"model.tokenizer_name_or_path={tmp_path / 'data' / 'tokenizer'}",
            "max_length=64",
            "max_prompt_length=40",
            "n_epochs=2",
            "save_every=8",
            "heldout_fraction=0.2",
            *overrides,
        ]
        return recipes.resolve(overrides, TABLES)[0]

    return make


def snapshot(folder):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


def test_a_finished_run_is_left_alone_and_checked(stage):
    """done.json describes LATEST: weights that are missing or changed are named."""
    run = stage()
    train.train_stage(run, overwrite=False)
    before = snapshot(run.output)
    train.train_stage(run, overwrite=False)
    assert snapshot(run.output) == before
    record = run_folder.finished_run(run.output)
    assert record["weights"] == checkpoints.weights_fingerprint(str(run.weights))
    saved(run.weights)
    with pytest.raises(UserError, match="LATEST does not hold the weights .*overwrite=true"):
        train.train_stage(run, overwrite=False)
    run.weights.rename(run.output / "elsewhere")
    with pytest.raises(UserError, match="LATEST does not hold the weights .*overwrite=true"):
        train.train_stage(run, overwrite=False)
    train.train_stage(run, overwrite=True)
    assert run_folder.finished_run(run.output)["weights"] == record["weights"]


@pytest.mark.parametrize("text", ["", '{"settings": {', "[]", "5", "{}", '{"settings": {}}'])
def test_an_odd_done_json_is_no_traceback(stage, text):
    """Cut short, of another kind or without a key: one line with the remedy, which works."""
    run = stage()
    run.output.mkdir(parents=True)
    (run.output / "done.json").write_text(text)
    with pytest.raises(UserError, match=r"done\.json.*overwrite=true trains"):
        train.train_stage(run, overwrite=False)
    train.train_stage(run, overwrite=True)
    assert run_folder.finished_run(run.output)


def test_what_is_not_finished_has_no_record(tmp_path):
    assert run_folder.finished_run(tmp_path) is None and run_folder.finished_run(tmp_path / "none") is None


def leave(folder):
    """What an earlier attempt at a run leaves behind."""
    for name in ("LATEST", "step-900", "step-16", "step-old"):
        saved(folder / name)
    for name in ("metrics.csv", "bad_rows.jsonl"):
        (folder / name).write_text("old")


def test_an_attempt_begins_without_the_traces_of_another(stage):
    """Weights and metrics of an attempt that was not finished are gone before the first update, not counted
    as good; a folder that is not ours stays.
    """
    run = stage("lr=1e38")
    leave(run.output)
    with pytest.raises(trainers.Diverged, match="no good weights were saved"):
        train.train_stage(run, overwrite=False)
    assert sorted(path.name for path in run.output.iterdir()) == ["config.yaml", "metrics.csv", "step-old"]
    assert "old" not in (run.output / "metrics.csv").read_text()


def test_a_run_that_cannot_begin_spares_what_is_there(stage):
    """A model that cannot be made is found out before anything of the finished run is removed."""
    train.train_stage(stage(), overwrite=False)
    before = snapshot(stage().output)
    with pytest.raises(UserError, match=r"model\.architecture"):
        train.train_stage(stage(num_attention_heads=3), overwrite=True)
    with pytest.raises(UserError, match="max_length=64, but model.architecture holds 63"):
        train.train_stage(stage(max_position_embeddings=63), overwrite=True)
    assert snapshot(stage().output) == before


def test_a_run_does_not_replace_the_weights_it_starts_from(stage):
    """Weights out of the run's own folder would be removed before they are read."""
    train.train_stage(stage(), overwrite=False)
    before = snapshot(stage().output)
    source = stage().output / "step-8"
    with pytest.raises(UserError, match=r"step-8, which lies in its own run folder .*exp_flag"):
        train.train_stage(stage(f"model.name_or_path={source}"), overwrite=True)
    assert snapshot(stage().output) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_debug_never_touches_a_run_folder(stage, overwrite):
    """A finished run and an unfinished one stay as they are, whatever is trained on top of them."""
    run = stage("debug=true")
    leave(run.output)
    before = snapshot(run.output)
    train.train_stage(run, overwrite)
    assert snapshot(run.output) == before
    train.train_stage(stage(), overwrite=True)
    before = snapshot(run.output)
    train.train_stage(run, overwrite)
    assert snapshot(run.output) == before


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_reference_of_a_fresh_model_is_that_model(stage, loss, monkeypatch):
    """dpo and ipo measure a model from nothing against itself as it began, in the type of the reference."""
    seen, real = {}, trainers.BasicTrainer.train

    def look(self, state=None):
        seen["policy"] = [p.detach().clone() for p in self.model.parameters()]
        seen["reference"] = [p.detach().clone() for p in self.reference.parameters()]
        metrics = real(self)
        seen["after"] = [p.detach() for p in self.reference.parameters()]
        return metrics

    monkeypatch.setattr(trainers.BasicTrainer, "train", look)
    run = stage(f"loss={loss}", "lr=1e-3", "warmup_steps=0", "model.reference_dtype=float32")
    train.train_stage(run, overwrite=False)
    trained = list(AutoModelForCausalLM.from_pretrained(run.weights).parameters())
    assert all(map(torch.equal, seen["policy"], seen["reference"]))
    assert all(map(torch.equal, seen["reference"], seen["after"]))
    assert not all(map(torch.equal, seen["reference"], trained))
    train.train_stage(stage(f"loss={loss}", "model.reference_dtype=bfloat16"), overwrite=True)
    assert {weight.dtype for weight in seen["reference"]} == {torch.bfloat16}


def test_code_in_a_models_folder_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    """A folder may name its own code; it is refused, without a question, until trust_remote_code=true."""
    folder = Path(save_model_folder(tmp_path / "model", tiny_model(len(TOKENIZER), 0), TOKENIZER))
    code = "from transformers import LlamaConfig, LlamaForCausalLM\nopen({!r}, 'w').close()\n"
    code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code.format(str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="trust_remote_code"):
        checkpoints.load_model(str(folder), "float32")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setitem(checkpoints.remote_code, "trust_remote_code", True)
    assert type(checkpoints.load_model(str(folder), "float32")).__name__ == "OwnModel"
    assert (tmp_path / "ran").exists()
