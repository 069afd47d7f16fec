"""Loading models, damaged folders, fingerprints, and the life cycle of run folders."""

import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_model_folder, tiny_model
from transformers import AutoModelForCausalLM

import train
import trainers
from preference_datasets import get_dataset
from ram.errors import UserError
from ram.models import checkpoints, run_folder
from ram.settings import recipes
from ram.storage import provenance
from ram.storage.files import read_json, write_json
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
def test_truncated_weights_error_names_the_folder(tmp_path, keep):
    source = saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"\Acannot load a model from {source} .*truncated"):
        checkpoints.load_model(source)


@pytest.mark.parametrize("text", ['{"model_type": "ll', "[]", "5", "", '{"model_type": "nope"}'])
def test_malformed_config_error_names_the_folder(tmp_path, text):
    """Both loading and the earlier check of the context length name the file."""
    source = saved(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    if "nope" in text:
        with pytest.raises(UserError, match=rf"\Acannot load a model from {source} "):
            checkpoints.load_model(source)
        return
    for read in (checkpoints.load_model, lambda source: checkpoints.check_context(source, 8)):
        with pytest.raises(UserError, match=rf"\A{source}/config\.json.*; download or copy the model again"):
            read(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", '{"a": '])
def test_malformed_tokenizer_error_names_the_folder(tmp_path, name, text):
    source = saved(tmp_path / "m")
    (tmp_path / "m" / name).write_text(text)
    with pytest.raises(UserError, match=f"no tokenizer in {source}"):
        checkpoints.load_tokenizer(source)


def test_missing_tokenizer_error_names_the_file(tmp_path):
    """transformers' own message does not say that the file is missing."""
    source = saved(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"no tokenizer in {source}: expected its tokenizer.json; copy"):
        checkpoints.load_tokenizer(source)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 2), ("hidden_size", 32)])
def test_weights_that_do_not_match_the_config_are_refused(tmp_path, key, value):
    """Missing weights are never initialised at random."""
    source = saved(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=source):
        checkpoints.load_model(source)


# ---- new models --------------------------------------------------------------------------------------------

WRONG = [
    ({"model_type": "lama"}, r"unknown model\.architecture\.model_type 'lama': did you mean 'llama'"),
    ({"model_type": None}, r"unknown model\.architecture\.model_type None"),
    ({"hidden_sizes": 16}, r"unknown key model\.architecture\.hidden_sizes: did you mean 'hidden_size'"),
    ({"hidden_size": 18}, r"model\.architecture is not a valid .*hidden size \(18\) is not a multiple"),
    ({"hidden_size": "big"}, r"model\.architecture is not a valid .*hidden_size.* expected int, got str"),
    ({"num_attention_heads": 0}, r"model\.architecture is not a valid model"),
    ({"num_key_value_heads": 3}, r"model\.architecture is not a valid model"),  # fails only in a forward pass
    ({"hidden_act": "silly"}, r"model\.architecture is not a valid model .*silly"),
    ({"vocab_size": 5}, r"model\.architecture is not a valid model .*vocab_size"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_invalid_architecture_is_refused(changed, message):
    """Unknown types, unknown keys and inconsistent sizes."""
    with pytest.raises(UserError, match=message):
        checkpoints.new_model(SIZES | changed, TOKENIZER, 0)


def test_new_weights_depend_on_their_seed_only():
    """Creating a model neither reads nor changes the global random state."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = checkpoints.new_model(SIZES | {"attention_dropout": 0.5}, TOKENIZER, 3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    two = checkpoints.new_model(SIZES, TOKENIZER, 3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_max_length_is_checked_against_the_positions_of_a_model(tmp_path):
    """For a folder, a new architecture and GPT-2's key; a config without the key has no limit."""
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
def test_fingerprint_covers_every_file_that_affects_the_output(tmp_path, name):
    """A changed tokenizer setting changes the fingerprint; a note beside the weights does not."""
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
    """Makes the stage of a tiny run on 12 rows, with a new model unless weights are named."""
    rows = [{"instruction": f"say {i}", "output": f"word {i}", "sampling": f"no {i}"} for i in range(12)]
    write_json(tmp_path / "data" / "train" / "ultrachat_round_one_sampling_m.json", rows)
    TOKENIZER.save_pretrained(tmp_path / "data" / "tokenizer")

    def make(*overrides, **sizes):
        sized = ", ".join(f"{key}: {json.dumps(value)}" for key, value in (SIZES | sizes).items())
        model = [f"model.architecture={{{sized}}}"]
        if any("name_or_path" in override for override in overrides):
            model = []
        overrides = [
            f"data_dir={tmp_path / 'data'}",
            f"output_dir={tmp_path}",
            "exp_name=run",
            "datasets=[uc_m]",
            *model,
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


def test_finished_run_is_checked_and_not_trained_again(stage):
    """If LATEST is missing or has other weights than done.json says, the run is refused."""
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


def test_heldout_data_that_choose_the_weights_belong_to_a_run(stage, tmp_path, caplog):
    """A run that stopped early by other held-out prompts is trained again."""
    keys = ("early_stopping=2", "eval_every=8", "n_eval_examples=8", "keep_steps=1")
    run = stage(*keys)
    train.train_stage(run, overwrite=False)
    before = snapshot(run.output)
    train.train_stage(stage(*keys), overwrite=False)
    assert snapshot(run.output) == before
    rows_file = tmp_path / "data" / "train" / "ultrachat_round_one_sampling_m.json"
    rows = read_json(rows_file)
    held = {
        example.row
        for example in get_dataset("uc_m", "heldout", data_dir=tmp_path / "data", heldout_fraction=0.2)
    }
    write_json(rows_file, [row | {"output": "x"} if i in held else row for i, row in enumerate(rows)])
    train.train_stage(stage(*keys), overwrite=False)
    assert "trained with other settings, data or weights (heldout:" in caplog.text


def test_states_left_by_a_stop_are_removed(stage):
    """A stop between done.json and the removal of the states leaves them; the next run removes them."""
    run = stage()
    train.train_stage(run, overwrite=False)
    (run.output / "states" / "000000003").mkdir(parents=True)
    train.train_stage(run, overwrite=False)
    assert not (run.output / "states").exists()


def test_run_of_an_earlier_version_is_accepted(stage, tmp_path, monkeypatch, caplog):
    """Its record has no digests, no younger keys, and fingerprints of blocks; nothing is trained again."""
    monkeypatch.setattr(checkpoints, "BLOCK", 2)
    monkeypatch.setattr(provenance, "LARGE", 1)
    source = saved(tmp_path / "start")
    run = stage(f"model.name_or_path={source}", "loss=ours_sft")
    train.train_stage(run, overwrite=False)
    record = run_folder.finished_run(run.output)
    assert record["inputs"]["weights"] == checkpoints.weights_fingerprint(source)
    del record["files"], record["metrics_sha256"], record["settings"]["loss.sampled_fraction"]
    record["weights"] = checkpoints.earlier_fingerprint(str(run.weights))
    record["inputs"]["weights"] = checkpoints.earlier_fingerprint(source)
    write_json(run.output / "done.json", record)
    before = snapshot(run.output)
    train.train_stage(run, overwrite=False)
    assert snapshot(run.output) == before and "made by an earlier version" in caplog.text


@pytest.mark.parametrize("text", ["", '{"settings": {', "[]", "5", "{}", '{"settings": {}}'])
def test_malformed_done_json_is_one_line(stage, text):
    """The remedy in the message works."""
    run = stage()
    run.output.mkdir(parents=True)
    (run.output / "done.json").write_text(text)
    with pytest.raises(UserError, match=r"done\.json.*overwrite=true to train"):
        train.train_stage(run, overwrite=False)
    train.train_stage(run, overwrite=True)
    assert run_folder.finished_run(run.output)


def test_unfinished_run_has_no_record(tmp_path):
    assert run_folder.finished_run(tmp_path) is None and run_folder.finished_run(tmp_path / "none") is None


def leave(folder):
    """Create the files of an earlier, unfinished attempt."""
    for name in ("LATEST", "step-900", "step-16", "step-old"):
        saved(folder / name)
    for name in ("metrics.csv", "bad_rows.jsonl"):
        (folder / name).write_text("old")


def test_files_of_an_earlier_attempt_are_removed(stage):
    """Weights and metrics of an unfinished attempt are gone before the first update; other folders stay."""
    run = stage("lr=1e38")
    leave(run.output)
    with pytest.raises(trainers.Diverged, match="no good weights were saved"):
        train.train_stage(run, overwrite=False)
    assert sorted(path.name for path in run.output.iterdir()) == ["config.yaml", "metrics.csv", "step-old"]
    assert "old" not in (run.output / "metrics.csv").read_text()


def test_run_that_cannot_start_keeps_the_finished_one(stage):
    """An invalid model is refused before any file of the finished run is removed."""
    train.train_stage(stage(), overwrite=False)
    before = snapshot(stage().output)
    with pytest.raises(UserError, match=r"model\.architecture"):
        train.train_stage(stage(num_attention_heads=3), overwrite=True)
    with pytest.raises(UserError, match="max_length=64, but model.architecture holds 63"):
        train.train_stage(stage(max_position_embeddings=63), overwrite=True)
    assert snapshot(stage().output) == before


def test_run_does_not_remove_the_weights_it_starts_from(stage):
    """Starting from weights in the run's own folder is refused."""
    train.train_stage(stage(), overwrite=False)
    before = snapshot(stage().output)
    source = stage().output / "step-8"
    with pytest.raises(UserError, match=r"step-8, which is in its own run folder .*exp_flag"):
        train.train_stage(stage(f"model.name_or_path={source}"), overwrite=True)
    assert snapshot(stage().output) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_debug_never_touches_a_run_folder(stage, overwrite):
    """Neither a finished nor an unfinished run is changed."""
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
def test_reference_of_a_new_model_is_its_initial_state(stage, loss, monkeypatch):
    """dpo and ipo compare a new model with its initial weights, in the reference's dtype."""
    seen = {}
    real = trainers.BasicTrainer.train

    def record(self, state=None):
        seen["policy"] = [p.detach().clone() for p in self.model.parameters()]
        seen["reference"] = [p.detach().clone() for p in self.reference.parameters()]
        metrics = real(self)
        seen["after"] = [p.detach() for p in self.reference.parameters()]
        return metrics

    monkeypatch.setattr(trainers.BasicTrainer, "train", record)
    run = stage(f"loss={loss}", "lr=1e-3", "warmup_steps=0", "model.reference_dtype=float32")
    train.train_stage(run, overwrite=False)
    trained = list(AutoModelForCausalLM.from_pretrained(run.weights).parameters())
    assert all(map(torch.equal, seen["policy"], seen["reference"]))
    assert all(map(torch.equal, seen["reference"], seen["after"]))
    assert not all(map(torch.equal, seen["reference"], trained))
    train.train_stage(stage(f"loss={loss}", "model.reference_dtype=bfloat16"), overwrite=True)
    assert {weight.dtype for weight in seen["reference"]} == {torch.bfloat16}


def test_code_in_a_model_folder_runs_only_if_trusted(tmp_path, monkeypatch):
    """Without trust_remote_code=true, the code is refused without a prompt on the terminal."""
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


# ---- weight files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "missing.safetensors", 5, ""])
def test_index_that_names_no_file_of_its_folder_is_refused(tmp_path, name):
    """transformers would read the weights of another folder without a word."""
    source = saved(tmp_path / "m")
    saved(tmp_path / "other")
    write_json(tmp_path / "m" / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": name}})
    with pytest.raises(UserError, match=r"index\.json: names .*, which is no file beside it"):
        checkpoints.load_model(source)


def test_weights_under_an_integer_header_are_refused(tmp_path):
    """The same bytes, called int32 in the header, are whole numbers of a billion: no loader objects."""
    source = saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UserError, match="is stored as I32, expected floating point"):
        checkpoints.load_model(source)


@pytest.mark.parametrize("text", ["[]", "5", '{"add_bos": ', "[" * 10_000, '{"add_bos": tru'])
def test_damaged_card_is_one_line(tmp_path, text):
    (tmp_path / "ram.json").write_text(text)
    with pytest.raises(UserError, match=r"\A.*ram\.json.*copy the file again, or remove it.*\Z"):
        checkpoints.read_card(str(tmp_path))
