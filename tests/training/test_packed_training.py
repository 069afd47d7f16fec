"""Training through packed forward passes: equal to padded ones, and with a share of the sampled answers."""

import itertools

import numpy as np
import pytest
import torch
from tiny import tiny_model
from training_runs import TOKENIZER, assert_same_path, dataset, path_of, settings, trainer

import trainers
from ram.training import packing
from trainers import BasicTrainer


@pytest.mark.parametrize("loss", ["sft", "ours_sft", "dpo", "ipo", "ours_dpo"])
def test_packed_equals_padded(tmp_path, loss):
    """packed=false, one padded forward pass per answer: the same losses and gradient norms."""
    runs = {}
    for packed in ("true", "false"):
        reference = None
        if loss in ("dpo", "ipo"):
            reference = tiny_model(len(TOKENIZER), seed=5, layers=2, dtype=torch.float64)
        overrides = [f"loss={loss}", f"packed={packed}", "gradient_accumulation_steps=2", "lr=1e-4"]
        runs[packed] = trainer(tmp_path / packed, *overrides, reference=reference, dtype=torch.float64)
        runs[packed].train()
    assert_same_path(path_of(runs["true"]), path_of(runs["false"]))


def test_a_model_that_cannot_be_packed_is_padded(tmp_path, caplog):
    """The log says why; losses are those of the padded reference."""
    found, plain = tiny_model(len(TOKENIZER), seed=0), tiny_model(len(TOKENIZER), seed=0)
    found.config.final_logit_softcapping = 30.0
    data = dataset(8), dataset(6, seed=99)
    packed = BasicTrainer(settings("packed=true"), found, TOKENIZER, *data, tmp_path, {})
    padded = BasicTrainer(settings("packed=false"), plain, TOKENIZER, *data, tmp_path, {})
    assert "packed=true cannot be had of this model" in caplog.text
    rows = np.arange(8)
    assert torch.equal(packed.losses(data[0], rows)[0], padded.losses(data[0], rows)[0])


# ---- a share of the sampled answers ------------------------------------------------------------------------


def gradient(run, rows, drawn):
    run.model.zero_grad()
    losses, _ = run.losses(run.train_data, rows, drawn)
    (losses.sum() / len(rows)).backward()
    found = torch.cat([p.grad.flatten().double() for p in run.model.parameters()])
    return losses.detach().double(), found


@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_share_of_the_sampled_answers_is_unbiased(tmp_path, packed):
    """The mean over all 16 draws of 4 examples, weighted by their probability, is the loss of them all."""
    share, rows = 0.3, np.array([3, 1, 7, 2])
    overrides = ["loss=ours_sft", "loss.alpha=0.5", f"packed={packed}"]
    run = trainer(tmp_path, *overrides, f"loss.sampled_fraction={share}", dtype=torch.float64)
    everything = gradient(run, rows, None)
    means = [torch.zeros_like(part) for part in everything]
    for draw in itertools.product([False, True], repeat=4):
        probability = share ** sum(draw) * (1 - share) ** (4 - sum(draw))
        for mean, part in zip(means, gradient(run, rows, np.array(draw)), strict=True):
            mean += probability * part
    for mean, part in zip(means, everything, strict=True):
        assert (mean - part).norm() <= 1e-6 * part.norm()
    alone = gradient(run, rows, np.zeros(4, dtype=bool))[1]
    assert (alone - everything[1]).norm() > 0.1 * everything[1].norm()  # the term is not negligible here


def test_draws_do_not_depend_on_micro_batches(tmp_path):
    """With half of the sampled answers, 1 and 4 micro-batches still take the same path."""
    paths = []
    for pieces in (1, 4):
        overrides = ["loss=ours_sft", "loss.alpha=0.5", "loss.sampled_fraction=0.5", "lr=1e-3", "n_epochs=2"]
        overrides.append(f"gradient_accumulation_steps={pieces}")
        run = trainer(tmp_path / str(pieces), *overrides, dtype=torch.float64)
        run.train()
        paths.append(path_of(run))
    assert_same_path(*paths)


def test_sampled_figures_are_means_over_what_was_drawn(tmp_path):
    """Training logs means of what was computed, nothing where nothing was; evaluation computes all."""
    overrides = ["loss=ours_sft", "loss.alpha=0.5", "loss.sampled_fraction=0.25", "lr=1e-12", "batch_size=4"]
    run = trainer(tmp_path / "a", *overrides, n=16, dtype=torch.float64)
    whole = trainer(tmp_path / "b", "loss=ours_sft", n=16, dtype=torch.float64)
    rows, log = np.array([4, 2, 9, 11]), trainers.MetricsLog(tmp_path, run.settings)
    _, each = zip(*(whole.losses(run.train_data, rows[i : i + 1]) for i in range(4)), strict=True)
    empty = full = 0
    for first in range(0, 16 * 4, 4):
        run.examples = first
        drawn, row = packing.draw(0, first, 4, 0.25), run.update(rows)
        if not drawn.any():
            empty += 1
            assert "sampled_logp" not in row and "sampled_logp_per_token" not in row
            continue
        full += 1
        wanted = [part["sampled_logp"] for part, taken in zip(each, drawn, strict=True) if taken]
        assert row["sampled_logp"] == pytest.approx(np.mean(wanted), rel=1e-5)
        assert row["loss"] == pytest.approx(-row["target_logp"] + 0.5 * sum(wanted) / 0.25 / 4, rel=1e-5)
    assert empty and full
    assert run.evaluate(log)["sampled_logp"] == pytest.approx(whole.evaluate(log)["sampled_logp"], rel=1e-5)
    log.close()
