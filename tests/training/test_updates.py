"""What an update and an evaluation do besides the loss: clipping, random numbers, mode, learning rate."""

import numpy as np
import pytest
import torch
from training_runs import trainer, weights

from ram.training.metrics import MetricsLog

ROWS = np.arange(8)


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_gradient_is_clipped_to_its_norm(tmp_path, limit):
    """SGD moves the weights by lr times the gradient, whose norm is at most max_grad_norm."""
    run = trainer(tmp_path, "optimizer=SGD", "lr=1", f"max_grad_norm={limit}", dtype=torch.float64)
    before = weights(run)
    norm = run.update(ROWS)["grad_norm"]
    moved = (
        torch.stack([(weights(run)[name] - weight).norm() for name, weight in before.items()]).norm().item()
    )
    assert norm > 1e-2 and moved == pytest.approx(min(norm, limit), rel=1e-6)


def test_random_numbers_of_an_update_depend_on_its_position(tmp_path, monkeypatch):
    """Dropout draws from the global generator: a resumed run must draw what the whole one did."""
    drawn = []
    for noise in (1, 2):
        run = trainer(tmp_path / str(noise))
        original = run.losses

        def losses(*args, original=original):
            drawn.append(torch.rand(4).tolist())
            return original(*args)

        monkeypatch.setattr(run, "losses", losses)
        torch.manual_seed(noise)
        for _ in range(2):
            run.update(ROWS)
    first, second, *again = drawn
    assert again == [first, second] and first != second


def test_models_mode_is_that_of_its_task(tmp_path, monkeypatch):
    """Held-out losses are those of a model in eval mode; training goes on in train mode afterwards."""
    run = trainer(tmp_path, "eval_every=8", "save_every=null")
    modes = []
    original = run.losses

    def losses(data, *args):
        modes.append((data is run.train_data, run.model.training))
        return original(data, *args)

    monkeypatch.setattr(run, "losses", losses)
    log = MetricsLog(tmp_path, run.settings)
    for _ in range(2):
        run.update(ROWS)
        run.evaluate(log)
    log.close()
    assert set(modes) == {(True, True), (False, False)}


def test_scaled_last_batch_takes_a_smaller_step(tmp_path, caplog):
    """A batch of 1 among batches of 8 moves the weights by an eighth; without the key a line warns."""
    moved = {}
    for key in ("whole", "scaled"):
        run = trainer(tmp_path / key, "optimizer=SGD", "lr=1", f"last_batch={key}", n=17, dtype=torch.float64)
        before = weights(run)
        assert run.update(np.array([3]))["lr"] == (1.0 if key == "whole" else 0.125)
        moved[key] = torch.cat([(weights(run)[name] - w).flatten() for name, w in before.items()])
    torch.testing.assert_close(moved["scaled"] * 8, moved["whole"])
    assert caplog.text.count("the last batch of each epoch has 1 of 8 examples and takes a whole update") == 1


def test_warm_up_longer_than_the_run_is_said(tmp_path, caplog):
    trainer(tmp_path, "warmup_steps=3")
    assert "warmup_steps=3: the run has 3 updates, so the learning rate never reaches" in caplog.text
    caplog.clear()
    trainer(tmp_path, "warmup_steps=2")
    assert "warmup_steps" not in caplog.text
