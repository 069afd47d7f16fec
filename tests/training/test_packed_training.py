"""Training with packed forward passes: equality with padded ones, and a fraction of the negatives."""

import itertools

import numpy as np
import pytest
import torch
from tiny import tiny_model
from training_runs import TOKENIZER, assert_same_path, dataset, path_of, settings, trainer
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import trainers
from ram.errors import UserError
from ram.training import packing
from trainers import BasicTrainer


@pytest.mark.parametrize("loss", ["sft", "ours_sft", "dpo", "ipo", "ours_dpo"])
def test_packed_training_equals_padded_training(tmp_path, loss):
    """packed=true and packed=false give the same losses and gradient norms."""
    runs = {}
    for packed in ("true", "false"):
        reference = None
        if loss in ("dpo", "ipo"):
            reference = tiny_model(len(TOKENIZER), seed=5, layers=2, dtype=torch.float64)
        overrides = [f"loss={loss}", f"packed={packed}", "gradient_accumulation_steps=2", "lr=1e-4"]
        runs[packed] = trainer(tmp_path / packed, *overrides, reference=reference, dtype=torch.float64)
        runs[packed].train()
    assert_same_path(path_of(runs["true"]), path_of(runs["false"]))


def test_unpackable_model_is_trained_with_padding(tmp_path, caplog):
    """The reason is logged, and the losses are those of packed=false."""
    capped, plain = tiny_model(len(TOKENIZER), seed=0), tiny_model(len(TOKENIZER), seed=0)
    capped.config.final_logit_softcapping = 30.0
    data = dataset(8), dataset(6, seed=99)
    packed = BasicTrainer(settings("packed=true"), capped, TOKENIZER, *data, tmp_path, {})
    padded = BasicTrainer(settings("packed=false"), plain, TOKENIZER, *data, tmp_path, {})
    assert "packed training is not used (its logits are not a linear function" in caplog.text
    rows = np.arange(8)
    assert torch.equal(packed.losses(data[0], rows)[0], padded.losses(data[0], rows)[0])


def test_labels_without_a_row_are_refused(tmp_path):
    """The packed pass would train on a logit of 0."""
    small, data = tiny_model(20, seed=0), (dataset(8), dataset(6, seed=99))
    with pytest.raises(UserError, match="has 20 vocabulary rows, but the training data has the token id"):
        BasicTrainer(settings(), small, TOKENIZER, *data, tmp_path, {})


def test_router_loss_is_part_of_the_loss(tmp_path):
    """A mixture of experts asks for it in its configuration; each example's loss has it, once."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": len(TOKENIZER)}
    data, losses = (dataset(8), dataset(6, seed=99)), []
    for coefficient in (0.0, 0.5):
        torch.manual_seed(0)
        config = MixtralConfig(**size, output_router_logits=True, router_aux_loss_coef=coefficient)
        run = BasicTrainer(settings(), MixtralForCausalLM(config), TOKENIZER, *data, tmp_path, {})
        run.model.train()
        losses.append(run.losses(data[0], np.arange(8))[0])
    added = losses[1] - losses[0]
    assert added.min() > 0.4 and added.max() - added.min() < 1e-3


@pytest.mark.parametrize("dropout", ["none", "config"])
def test_dropout_is_off_unless_asked_for(tmp_path, dropout):
    """Off: DPO begins at ln 2, and the same rows give the same losses again."""
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": len(TOKENIZER)}
    model, reference = (GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.4)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    data = dataset(8), dataset(6, seed=99)
    config = settings("loss=dpo", f"dropout={dropout}")
    run = BasicTrainer(config, model, TOKENIZER, *data, tmp_path, {}, reference=reference)
    run.model.train()
    first, again = (run.losses(data[0], np.arange(8))[0] for _ in range(2))
    is_off = dropout == "none"
    assert torch.equal(first, again) == is_off
    assert torch.allclose(first, torch.full((8,), np.log(2)), rtol=1e-5) == is_off


# ---- a fraction of the negatives ---------------------------------------------------------------------------


def losses_and_gradient(run, rows, drawn):
    run.model.zero_grad()
    losses, _ = run.losses(run.train_data, rows, drawn)
    (losses.sum() / len(rows)).backward()
    gradient = torch.cat([p.grad.flatten().double() for p in run.model.parameters()])
    return losses.detach().double(), gradient


@pytest.mark.parametrize("packed", ["true", "false"])
def test_fraction_of_negatives_is_unbiased(tmp_path, packed):
    """The expectation over all 16 choices of negatives equals the loss with all of them."""
    fraction, rows = 0.3, np.array([3, 1, 7, 2])
    overrides = ["loss=ours_sft", "loss.alpha=0.5", f"packed={packed}"]
    run = trainer(tmp_path, *overrides, f"loss.sampled_fraction={fraction}", dtype=torch.float64)
    full = losses_and_gradient(run, rows, None)
    means = [torch.zeros_like(part) for part in full]
    for drawn in itertools.product([False, True], repeat=4):
        probability = fraction ** sum(drawn) * (1 - fraction) ** (4 - sum(drawn))
        for mean, part in zip(means, losses_and_gradient(run, rows, np.array(drawn)), strict=True):
            mean += probability * part
    for mean, part in zip(means, full, strict=True):
        assert (mean - part).norm() <= 1e-6 * part.norm()
    _, without = losses_and_gradient(run, rows, np.zeros(4, dtype=bool))
    assert (without - full[1]).norm() > 0.1 * full[1].norm()  # so the sampled term matters here


def test_chosen_negatives_do_not_depend_on_micro_batches(tmp_path):
    """With half of the negatives, 1 and 4 micro-batches give the same losses and gradient norms."""
    paths = []
    for pieces in (1, 4):
        overrides = ["loss=ours_sft", "loss.alpha=0.5", "loss.sampled_fraction=0.5", "lr=1e-3", "n_epochs=2"]
        overrides.append(f"gradient_accumulation_steps={pieces}")
        run = trainer(tmp_path / str(pieces), *overrides, dtype=torch.float64)
        run.train()
        paths.append(path_of(run))
    assert_same_path(*paths)


def test_sampled_metrics_are_means_over_computed_negatives(tmp_path):
    """Training leaves the metrics out if no negative was computed. Evaluation computes all negatives."""
    overrides = ["loss=ours_sft", "loss.alpha=0.5", "loss.sampled_fraction=0.25", "lr=1e-12", "batch_size=4"]
    run = trainer(tmp_path / "a", *overrides, n=16, dtype=torch.float64)
    whole = trainer(tmp_path / "b", "loss=ours_sft", n=16, dtype=torch.float64)
    rows, log = np.array([4, 2, 9, 11]), trainers.MetricsLog(tmp_path, run.settings)
    _, sums = zip(*(whole.losses(run.train_data, rows[i : i + 1]) for i in range(4)), strict=True)
    empty = full = 0
    for first in range(0, 16 * 4, 4):
        run.examples = first
        drawn, row = packing.draw_negatives(0, first, 4, 0.25), run.update(rows)
        if not drawn.any():
            empty += 1
            assert "sampled_logp" not in row and "sampled_logp_per_token" not in row
            continue
        full += 1
        expected = [part["sampled_logp"] for part, is_drawn in zip(sums, drawn, strict=True) if is_drawn]
        assert row["sampled_logp"] == pytest.approx(np.mean(expected), rel=1e-5)
        assert row["loss"] == pytest.approx(-row["target_logp"] + 0.5 * sum(expected) / 0.25 / 4, rel=1e-5)
    assert empty and full
    assert run.evaluate(log)["sampled_logp"] == pytest.approx(whole.evaluate(log)["sampled_logp"], rel=1e-5)
    log.close()
