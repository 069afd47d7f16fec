"""loss=ratio: the likelihood of the product with a frozen proposal, its gradient, and its cache on disk."""

import json

import numpy as np
import pytest
import torch
from small import SMALL, run
from tiny import tiny_model, tiny_tokenizer
from training_runs import TOKENIZER, dataset, frozen_proposal, trainer

import train
from ram.data.tokenization import TokenizedDataset
from ram.decoding import scoring
from ram.errors import UserError
from ram.models import checkpoints, run_folder
from ram.settings import compose, recipes
from ram.training import frozen, logps, optimizers
from ram.training.frozen import FrozenProposal
from utils import TABLES

VOCAB = len(TOKENIZER)
FORWARDS = {"packed": logps.packed_logps, "padded": logps.padded_logps}


def direct_losses(proposal, aligner, data, rows, exponent=1.0):
    """-log softmax(log P + exponent * z_Q) of every target token, one example at a time, in one piece."""
    losses = []
    for row in rows:
        prompt, target = data.part("prompt", row).tolist(), data.part("target", row).tolist()
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            log_p = proposal(ids).logits[0, :, :VOCAB].log_softmax(-1)
        joint = (log_p + exponent * aligner(ids).logits[0, :, :VOCAB]).log_softmax(-1)[len(prompt) - 1 : -1]
        losses.append(-joint.gather(1, torch.tensor(target).unsqueeze(1)).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("exponent", [1.0, 0.3])
@pytest.mark.parametrize("forward", FORWARDS)
def test_loss_and_gradient_equal_a_direct_computation(forward, exponent, monkeypatch):
    """In float64 with many tiles; the proposal gets no gradient, rows beyond the vocabulary do not count."""
    monkeypatch.setattr("ram.training.losses.TILE", 1000)
    proposal, data, rows = frozen_proposal(), dataset(9), np.array([4, 0, 8, 3])
    proposal.exponent = exponent
    aligner = tiny_model(VOCAB, seed=3, layers=2, dtype=torch.float64, extra_rows=2)
    expected = direct_losses(proposal.model, aligner, data, rows, exponent)
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in aligner.named_parameters()}
    aligner.zero_grad()
    logps.use_packed(aligner)
    sums, _ = FORWARDS[forward](aligner, data, rows, ("target",), 0, proposal=proposal)
    torch.testing.assert_close(-sums["target"], expected, rtol=1e-6, atol=1e-6)
    (-sums["target"].mean()).backward()
    for name, p in aligner.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in proposal.model.parameters())


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_loss_is_the_likelihood_of_product(exponent):
    """What is trained is what `sample_mode=product` draws from if the temperature is 1/exponent."""
    proposal, aligner = frozen_proposal(), tiny_model(VOCAB, seed=3, dtype=torch.float64)
    data = dataset(5)
    expected = direct_losses(proposal.model, aligner, data, range(5), exponent)
    rows = [scoring.Row(data.part("prompt", i).tolist(), data.part("target", i).tolist()) for i in range(5)]
    keys = {"sample_mode": "product", "temperature": 1 / exponent}
    product = scoring.Scheme(scoring.PARParams(**vars(scoring.RAW) | keys))
    models = {"proposal": proposal.model, "aligner": aligner}
    (scores,) = scoring.score(models, TOKENIZER, rows, [product])
    actual = torch.stack([-own.logprobs.sum() for own in scores])
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-6)


def large_data(vocab):
    rng = np.random.default_rng(0)
    sizes = {"prompt": rng.integers(1, 9, 7), "target": rng.integers(1, 9, 7)}
    ids = {part: rng.integers(0, vocab, size.sum()).astype(np.int32) for part, size in sizes.items()}
    return TokenizedDataset(ids, {part: np.cumsum([0, *size]) for part, size in sizes.items()}, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_changes_nothing_at_a_large_vocabulary(tmp_path, caplog, dtype):
    """V = 4,099: losses and gradients agree to 1e-5; the file states its size first, and is used again."""
    vocab = 4099
    tokenizer = tiny_tokenizer([f"<{i}>" for i in range(vocab - 2)])
    checkpoints.export_model(tiny_model(vocab, 1), tokenizer, tmp_path / "p", "float32", {"add_bos": False})
    data = {"train": large_data(vocab), "heldout": large_data(vocab)}
    aligner = tiny_model(vocab, 2)
    settings = str(tmp_path / "p"), aligner, tokenizer, data, dtype, torch.device("cpu")
    results = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        proposal = frozen.open_proposal(*settings, cache)
        aligner.zero_grad()
        sums, _ = logps.padded_logps(aligner, data["train"], [5, 0, 3], ("target",), 0, proposal=proposal)
        (-sums["target"].sum()).backward()
        results.append((sums["target"].detach(), aligner.lm_head.weight.grad.clone()))
    for sums, gradient in results[1:]:
        torch.testing.assert_close(sums, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-5)
    assert proposal.model is None and isinstance(proposal.states[0][2], np.memmap)
    tokens = int(data["train"].offsets["target"][-1])
    assert caplog.text.count("caching") == 1 and f"{tokens} tokens of 16 numbers" in caplog.text
    (record,) = (tmp_path / "cache").glob("*.json")  # both splits have the same tokens here
    assert json.loads(record.read_text())["weights"] == checkpoints.weights_fingerprint(settings[0])


def test_full_disk_is_reported_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="MB are free: set cache_proposal=false"):
        frozen._states_file(tmp_path / "x.npy", frozen_proposal(), dataset(3), {})


def test_scaled_logits_are_refused():
    proposal = tiny_model(VOCAB, 1)
    proposal.config.logit_scale = 0.5
    with pytest.raises(UserError, match="not a linear function of its last hidden state"):
        FrozenProposal(proposal, VOCAB, 0)


def test_recipe_without_a_proposal_is_refused():
    overrides = compose.preflight(["loss=ratio", "datasets=[uc]", "model=toy_small"])
    with pytest.raises(UserError, match="loss=ratio needs the proposal: give proposal=FOLDER"):
        recipes.resolve(overrides, TABLES)


def test_weight_decay_reaches_the_optimizer(tmp_path):
    run_of = trainer(tmp_path, "optimizer=AdamW", "weight_decay=0.3")
    assert run_of.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert trainer(tmp_path, "optimizer=AdamW").optimizer.param_groups[0]["weight_decay"] == 0.01
    settings = type("Settings", (), {"optimizer": "Rprop", "lr": 0.1, "weight_decay": 0.1})
    with pytest.raises(UserError, match="optimizer=Rprop has none"):
        optimizers.make_optimizer(settings, [torch.zeros(1, requires_grad=True)])


def test_recipe_trains_with_and_without_the_cache(tmp_path):
    """Both runs end with the same held-out loss, and record the proposal's weights."""
    overrides = [
        "experiment=demo_ratio",
        *(key for key in SMALL if "sft" not in key and "corrector" not in key),
    ]
    overrides += [f"output_dir={tmp_path}", "stage.aligner_ratio.n_examples=64"]
    stages = "stages=[world,general_proposal,general_aligner,proposal,aligner_ratio]"
    run(train, *overrides, stages)
    folder = next((tmp_path / "model").glob("ratio_*"))
    plain = run_folder.finished_run(folder)
    run(train, *overrides, "stages=[aligner_ratio]", "cache_proposal=true", "overwrite=true")
    cached = run_folder.finished_run(folder)
    assert cached["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-5)
    assert cached["inputs"] == plain["inputs"] and list((tmp_path / "cache").glob("proposal.*.npy"))
    (proposal,) = (tmp_path / "model").glob("wu_sft_*")
    assert plain["inputs"]["proposal"] == checkpoints.weights_fingerprint(str(proposal / "LATEST"))


def test_logits_that_the_configuration_does_not_explain_are_refused():
    """FalconH1 multiplies its logits by `lm_head_multiplier`; others have names of their own."""
    proposal = tiny_model(VOCAB, 1)
    forward = proposal.forward

    def scaled(*args, **settings):
        output = forward(*args, **settings)
        output.logits = 0.04 * output.logits
        return output

    proposal.forward = scaled
    with pytest.raises(UserError, match="not a linear function of its last hidden state"):
        FrozenProposal(proposal, VOCAB, 0)
