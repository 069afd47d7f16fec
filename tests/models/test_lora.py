"""Low-rank adapters: what is trained, how a run is resumed, what is exported."""

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch.distributed.checkpoint import FileSystemReader
from torch.func import functional_call
from training_runs import (
    RESUMABLE,
    TOKENIZER,
    assert_same_path,
    path_of,
    recorded_path,
    resumed_run,
    settings,
    stopped_run,
    trainer,
    weights,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ram.errors import UserError
from ram.models import lora
from ram.settings.schema import check_lora
from ram.training import resume
from ram.training.packing import collate

pytest.importorskip("peft", reason="peft is not installed")
LORA = "lora={r: 2, alpha: 6}"


def adapted(targets="all-linear", dtype=torch.float64):
    model = tiny_model(len(TOKENIZER), seed=0, layers=2, dtype=dtype)
    lora.add_adapters(model, lora.LoraSettings(r=2, alpha=6, targets=targets), seed=5)
    return model


def test_new_adapters_change_nothing():
    """B is zero at first, so the logits are the plain model's; only the factors are trained, in float32."""
    ids = torch.arange(6).unsqueeze(0)
    plain, model = tiny_model(len(TOKENIZER), seed=0, layers=2), adapted(dtype=torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7  # layers, factors, linear layers
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    torch.testing.assert_close(adapted(dtype=torch.float32)(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_gradient_equals_direct_computation(tmp_path):
    """One SGD step moves A and B as the formula W + (alpha / r) B A says."""
    sgd = ("optimizer=SGD", "lr=0.5", "max_grad_norm=1e9", "gradient_accumulation_steps=4")
    run = trainer(tmp_path, LORA, *sgd, dtype=torch.float64)
    torch.manual_seed(3)
    for name, p in run.model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    before, rows = weights(run), np.array([1, 5, 7])
    run.update(rows)

    factors = {name: p.clone().requires_grad_() for name, p in before.items() if ".lora_" in name}
    direct = {}
    for name, weight in before.items():
        if ".lora_" not in name:
            layer, has_adapter, end = name.partition(".base_layer")
            a, b = (factors.get(f"{layer}.lora_{factor}.default.weight") for factor in "AB")
            direct[layer + end] = weight + 6 / 2 * (b @ a) if has_adapter else weight
    batch = collate(run.train_data, rows, "target", 0)
    labels = batch.pop("labels")
    plain = tiny_model(len(TOKENIZER), seed=0, layers=2, dtype=torch.float64)
    logits = functional_call(plain, direct, kwargs=batch).logits[:, :-1].log_softmax(-1)
    logps = logits.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    (-(logps * (labels[:, 1:] != -100)).sum() / 3).backward()
    after = weights(run)
    for name, weight in before.items():
        expected = weight - 0.5 * factors[name].grad if name in factors else weight
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_path_does_not_depend_on_passes(tmp_path, loss):
    """Packed or padded, in one micro-batch or four: the losses are equal."""
    paths = []
    for name, overrides in {
        "packed": [],
        "padded": ["packed=false", "gradient_accumulation_steps=4"],
    }.items():
        reference = (
            tiny_model(len(TOKENIZER), seed=7, layers=2, dtype=torch.float64) if loss == "dpo" else None
        )
        keys = (LORA, f"loss={loss}", "lr=1e-3", *overrides)
        run = trainer(tmp_path / name, *keys, dtype=torch.float64, reference=reference)
        run.train()
        paths.append(path_of(run))
    assert_same_path(paths[1], paths[0])


def test_export_is_a_plain_model(tmp_path):
    """The exported folder has the plain model's names, and the trained model's logits in float64."""
    run = trainer(tmp_path, LORA, "lr=1e-2", dtype=torch.float64)
    run.train()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "LATEST", dtype="auto")
    plain = tiny_model(len(TOKENIZER), seed=0, layers=2)
    assert exported.state_dict().keys() == plain.state_dict().keys()
    changed = [
        name for name, p in exported.named_parameters() if not torch.equal(p, plain.get_parameter(name))
    ]
    assert len(changed) == 2 * 7
    ids = torch.arange(9).unsqueeze(0)
    # The export is rounded to float32.
    torch.testing.assert_close(exported.double()(ids).logits, run.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert any("lora_A" in name for name, _ in run.model.named_parameters())  # the run itself goes on


def test_stopped_run_is_resumed(tmp_path):
    """A resumed run equals an uninterrupted one; its states hold the factors alone."""
    whole = trainer(tmp_path / "whole", LORA, *RESUMABLE)
    whole.train()
    stopped_run(tmp_path / "stopped", 2, LORA, *RESUMABLE)
    [folder] = resume.complete_states(tmp_path / "stopped")[-1:]
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    assert stored and all("lora_" in key for key in stored if key.startswith("model."))
    run, state = resumed_run(tmp_path / "stopped", LORA, *RESUMABLE)
    assert state is not None
    assert recorded_path(tmp_path / "stopped") == recorded_path(tmp_path / "whole")
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())


def test_wrong_settings_are_one_line():
    with pytest.raises(UserError, match="no_such_layer.*not found.*q_proj"):
        adapted(["no_such_layer"])
    with pytest.raises(UserError, match="LM head"):
        adapted(["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"lora\.r.*at least 1"):
        settings("lora={r: 0, alpha: 1}")
    with pytest.raises(UserError, match=r"lora\.rang.*unknown|unknown.*lora\.rang"):
        settings("lora={r: 4, alpha: 1, rang: 4}")
    with pytest.raises(UserError, match=r"lora\.base_dtype.*model\.fsdp_policy_mp=bfloat16"):
        check_lora(settings("lora={r: 4, alpha: 1, base_dtype: bfloat16}"))


def test_weights_are_merged_one_at_a_time():
    """All at once they would be a second copy of the model, in float32, on the device of the training."""
    model = tiny_model(13, 1).to(torch.bfloat16)
    lora.add_adapters(model, lora.LoraSettings(r=2, alpha=4), seed=5)
    state = dict(model.state_dict())
    weights = [name for name in state if "lora_" not in name]
    left = [len(state) for _ in lora.merged_weights(model, state)]
    assert left == list(range(len(weights)))[::-1]


@pytest.mark.parametrize("targets", ["all-linear", ["attn.c_proj"]])
def test_layers_of_gpt2_are_merged_transposed(targets):
    """Their weights are (in, out): a square one would be merged wrongly without an error."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=20)).eval().double()
    plain = copy.deepcopy(model)
    lora.add_adapters(model, lora.LoraSettings(r=2, alpha=6, targets=targets), seed=5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    plain.load_state_dict(dict(lora.merged_weights(model, dict(model.state_dict()))))
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
