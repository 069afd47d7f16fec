"""The columns of metrics.csv follow from the table of losses."""

import csv
import logging
from types import SimpleNamespace

import pytest
import torch

from ram.training import losses
from ram.training.losses import LOSSES, Loss, LossSettings
from ram.training.metrics import MetricsLog, columns_of, rows_until

# As files of earlier versions have them, whatever the loss.
COLUMNS = [
    "split",
    "updates",
    "examples",
    "epoch",
    "loss",
    "target_logp",
    "target_logp_per_token",
    "sampled_logp",
    "sampled_logp_per_token",
    "chosen_reward",
    "rejected_reward",
    "reward_margin",
    "reward_accuracy",
    "grad_norm",
    "lr",
    "tokens",
    "examples_per_second",
    "tokens_per_second",
]


@pytest.mark.parametrize("name", LOSSES)
def test_columns_of_existing_losses_are_unchanged(name):
    assert list(columns_of(LOSSES[name])) == COLUMNS


@pytest.fixture
def log_of_new_loss(tmp_path, monkeypatch):
    """Open the log of a run whose loss has a metric of its own."""

    def squared(policy, reference, settings):
        return policy["target"] ** 2, {"distance": policy["target"].abs()}

    monkeypatch.setitem(losses.LOSSES, "squared", Loss(squared, LossSettings, ("distance",)))
    settings = SimpleNamespace(
        minimum_log_interval_secs=0,
        debug=False,
        loss=SimpleNamespace(name="squared"),
        wandb=SimpleNamespace(enabled=False),
    )
    return lambda after=None: MetricsLog(tmp_path, settings, after)


def test_metric_of_a_new_loss_is_a_column_and_logged(log_of_new_loss, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ram")
    metrics = log_of_new_loss()
    _, values = losses.LOSSES["squared"].function({"target": torch.tensor([-2.0])}, None, None)
    row = {"updates": 1, "examples": 8, "loss": 4.0, "distance": values["distance"].item()}
    metrics.write("train", row)
    metrics.close()
    with open(tmp_path / "metrics.csv", newline="") as file:
        (written,) = csv.DictReader(file)
    assert written["distance"] == "2" and "distance 2" in caplog.text
    assert list(written) == [*COLUMNS[:13], "distance", *COLUMNS[13:]]


def test_rows_of_a_file_without_the_column_are_kept(log_of_new_loss, tmp_path):
    """A run that was stopped before its loss had the metric keeps its rows when it resumes."""
    path = tmp_path / "metrics.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"split": "train", "updates": n} for n in (1, 2, 3))
    log_of_new_loss(after=2).close()
    rows = rows_until(path, 9)
    assert [row["updates"] for row in rows] == ["1", "2"] and {row["distance"] for row in rows} == {""}
