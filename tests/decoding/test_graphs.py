"""What surrounds a captured forward, with a capture that runs on a CPU: shapes, places, the same answers."""

import pytest
import torch
from test_generation import BOTH, CASES, LETTERS, SEED, STOP, assert_same, pair, ragged_prompts, slow_answers

from ram.decoding import generation, graphs, speculation


@pytest.fixture
def captured(monkeypatch):
    """Stands in for a GPU: keeps the forward and fills one output, as a replayed graph does."""
    shapes = []

    def capture(run, pool):
        output = run().clone()
        shapes.append(tuple(output.shape))
        return lambda: output.copy_(run()), output

    monkeypatch.setattr(graphs, "CAPTURES", {"cpu": (capture, lambda: None)})
    monkeypatch.setattr(graphs, "COLUMNS", 8)
    monkeypatch.setattr(speculation, "TIGHT", set())
    return shapes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_captured_forwards_give_the_same(case, batch_size, captured):
    """Replayed forwards, with the columns rounded up, give the plain loop's answers."""
    roles, params, _ = CASES[case]
    settings = {"max_new_tokens": 16, "seed": SEED, "stop": STOP, "batch_size": batch_size}
    models = pair(len(LETTERS), roles)
    found = generation.generate(*models, LETTERS, ragged_prompts(), params, cuda_graphs=True, **settings)
    assert_same(found, slow_answers(case, torch.float32))
    assert captured and len(captured) < sum(len(g.token_ids) for g in found) / 3


def test_nothing_is_captured_unasked(captured):
    """Graphs are for who asks for them, and for a device that has them."""
    models, params = pair(len(LETTERS), BOTH), CASES["par"][1]
    generation.generate(*models, LETTERS, ["abc"], params, max_new_tokens=9)
    assert not captured
    graphs.CAPTURES.pop("cpu")
    generation.generate(*models, LETTERS, ["abc"], params, max_new_tokens=9, cuda_graphs=True)
    assert not captured


def test_one_transfer_brings_everything(monkeypatch):
    """Ids, flags and divergences come back with their types and values, whatever their widths."""
    found = {
        "token": torch.tensor([[1, 2**40], [7, 128_255]]),
        "flag": torch.tensor([[True], [False]]),
        "kl": torch.tensor([[0.1, float("inf")], [1e-30, 3.0]], dtype=torch.float64),
        "none": torch.zeros(2, 0, dtype=torch.bool),
    }
    assert speculation.fetch(found) is found  # a CPU needs no transfer
    kind = type("Device", (torch.Tensor,), {"device": torch.device("meta")})
    elsewhere = {key: value.as_subclass(kind) for key, value in found.items()}
    brought = speculation.fetch(elsewhere)
    for key, value in found.items():
        assert brought[key].dtype == value.dtype and torch.equal(
            brought[key].as_subclass(torch.Tensor), value
        )
