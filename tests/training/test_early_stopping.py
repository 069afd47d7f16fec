"""early_stopping: a run ends once its held-out loss no longer falls; LATEST has the best saved weights."""

import csv

import pytest
import torch
from safetensors.torch import load_file
from training_runs import dataset, settings, stopped_run, trainer

from ram.errors import UserError
from ram.models.run_folder import LATEST
from ram.settings.recipes import identity
from ram.settings.schema import check_training
from ram.training import resume
from trainers import BasicTrainer
from utils import TABLES

KEYS = ("batch_size=4", "eval_every=4", "save_every=4", "n_examples=32", "early_stopping=2", "keep_steps=1")


def falling_then_rising(self):
    """Held-out losses that depend on the number of examples alone, as those of a resumed run do."""
    return {"loss": {4: 5.0, 8: 3.0}.get(self.examples, 4.0)}


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def test_run_ends_with_the_best_saved_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(BasicTrainer, "heldout_averages", falling_then_rising)
    metrics = trainer(tmp_path, *KEYS).train()
    assert metrics["examples"] == 16  # the steps of 12 and 16 examples were worse than that of 8
    assert metrics["loss"] == metrics["best_loss"] == 3.0
    latest, best = weights_in(tmp_path / LATEST), weights_in(tmp_path / "step-8")
    assert all(torch.equal(latest[name], best[name]) for name in best)
    last = weights_in(tmp_path / "step-16")
    assert any(not torch.equal(latest[name], last[name]) for name in last)


def test_last_weights_stay_if_they_are_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(BasicTrainer, "heldout_averages", lambda self: {"loss": -float(self.examples)})
    run = trainer(tmp_path, *KEYS)
    metrics = run.train()
    assert metrics["examples"] == 32 and metrics["loss"] == -32
    trained = run.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in weights_in(tmp_path / LATEST).items())


@pytest.mark.parametrize("after", [3, 4])
def test_resumed_run_stops_at_the_same_update(tmp_path, monkeypatch, after):
    """Also if it was stopped after the very update that ends the run."""
    monkeypatch.setattr(BasicTrainer, "heldout_averages", falling_then_rising)
    whole = trainer(tmp_path / "whole", *KEYS).train()
    stopped_run(tmp_path / "parts", after, *KEYS)
    run = trainer(tmp_path / "parts", *KEYS)
    metrics = run.train(resume.newest(tmp_path / "parts", {"it": 1}))
    assert metrics["examples"] == whole["examples"] == 16
    parts, expected = (weights_in(tmp_path / name / LATEST) for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keys", [("save_every=null",), ("save_every=6",), ("n_eval_examples=0",)])
def test_settings_without_saved_evaluations_are_refused(keys):
    with pytest.raises(UserError, match="early_stopping=2: it chooses among saved steps"):
        check_training(settings(*KEYS, *keys), TABLES)


def test_keys_that_decide_when_to_stop_are_part_of_the_identity():
    early, plain = identity(settings(*KEYS)), identity(settings())
    assert {"early_stopping", "save_every", "eval_every", "n_eval_examples"} == set(early) - set(plain)


def test_steps_that_are_rarer_than_saves_are_refused():
    """An update of 8 examples saves once, however many multiples of 4 it passes."""
    with pytest.raises(UserError, match="save_every=4 examples is less than an update's batch_size=8"):
        check_training(settings(*KEYS, "batch_size=8"), TABLES)


def test_run_without_held_out_examples_is_refused(tmp_path):
    run = trainer(tmp_path, "early_stopping=null")
    with pytest.raises(UserError, match="early_stopping=2, but there are no held-out examples"):
        BasicTrainer(settings(*KEYS), run.model, run.tokenizer, run.train_data, dataset(0), tmp_path, {})


def test_run_stopped_at_its_early_end_has_each_row_once(tmp_path, monkeypatch):
    """The signal comes with the very update that ends the run; its evaluation is written again."""
    monkeypatch.setattr(BasicTrainer, "heldout_averages", falling_then_rising)
    trainer(tmp_path / "whole", *KEYS).train()
    stopped_run(tmp_path / "parts", 4, *KEYS)
    trainer(tmp_path / "parts", *KEYS).train(resume.newest(tmp_path / "parts", {"it": 1}))
    rows = []
    for name in ("whole", "parts"):
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            rows.append([(row["split"], row["updates"]) for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(set(rows[0])) == len(rows[0])


def test_early_end_evaluates_once(tmp_path, monkeypatch):
    """The step that ends the run was evaluated before it was saved."""
    evaluated = []
    monkeypatch.setattr(
        BasicTrainer,
        "heldout_averages",
        lambda self: evaluated.append(self.examples) or falling_then_rising(self),
    )
    trainer(tmp_path, *KEYS).train()
    assert evaluated == [4, 8, 12, 16]
