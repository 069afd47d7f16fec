"""Layout of packed forward passes, micro-batches, and the choice of negatives."""

import numpy as np
import pytest
import torch

from ram.data.tokenization import TokenizedDataset
from ram.training import packing

BOTH = ("target", "negative")


def data(**parts):
    """Make a data set from lists of ids: data(prompt=[[1, 2]], target=[[3]])."""
    return TokenizedDataset(
        {name: np.array([i for row in rows for i in row], dtype=np.int32) for name, rows in parts.items()},
        {name: np.cumsum([0] + [len(row) for row in rows]) for name, rows in parts.items()},
        {},
    )


TWO = data(prompt=[[1, 2, 3], [4]], target=[[10, 11], [12]], negative=[[20, 21, 22], [23, 24]])


def test_layout_of_two_examples():
    """Prompts occur once, answers lack their last token, and both answers' positions follow the prompt."""
    batch = packing.pack(TWO, [0, 1], BOTH)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 20, 21, 4, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1]]
    assert batch.segments == packing.Segments((4, 2, 1, 1), (0, 3, 0, 1))
    assert batch.labels.tolist() == [10, 11, 12, 20, 21, 22, 23, 24]
    assert batch.predictors.tolist() == [2, 3, 6, 2, 4, 5, 6, 7]
    assert batch.counts == {"target": [2, 1], "negative": [3, 2]}


def test_rows_in_any_order_with_one_answer():
    batch = packing.pack(TWO, [1, 0], ("target",))
    assert batch.input_ids.tolist() == [[4, 1, 2, 3, 10]]
    assert batch.labels.tolist() == [12, 10, 11] and batch.predictors.tolist() == [0, 3, 4]


def test_negative_that_is_not_drawn_has_no_tokens():
    batch = packing.pack(TWO, [0, 1], BOTH, np.array([False, True]))
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 4, 23]]
    assert batch.counts == {"target": [2, 1], "negative": [0, 2]}
    assert batch.predictors.tolist() == [2, 3, 4, 4, 5]


def test_empty_parts():
    """The first token after an empty prompt has no label; an empty answer has neither tokens nor labels."""
    odd = data(prompt=[[], [1, 2]], target=[[3, 4], []], negative=[[5, 6, 7], [8]])
    batch = packing.pack(odd, [0, 1], BOTH)
    assert batch.input_ids.tolist() == [[3, 5, 6, 1, 2]]
    assert batch.segments == packing.Segments((1, 2, 2), (0, 0, 0))
    assert batch.labels.tolist() == [4, 6, 7, 8] and batch.predictors.tolist() == [0, 1, 2, 4]
    assert batch.counts == {"target": [1, 0], "negative": [2, 1]}


def test_lengths_count_the_prompt_once():
    rows = np.array([1, 0])
    assert packing.lengths(TWO, rows, BOTH).tolist() == [4, 8]
    assert packing.lengths(TWO, rows, ("target",)).tolist() == [2, 5]
    assert packing.lengths(TWO, rows, BOTH, np.array([False, True])).tolist() == [2, 8]


@pytest.mark.parametrize("seed", range(20))
def test_cut_is_even_and_complete(seed):
    """Each example occurs once, no piece is empty, and none exceeds the mean by more than one example."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 500, size=rng.integers(1, 40))
    pieces = int(rng.integers(1, len(lengths) + 1))
    cut = packing.cut_evenly(lengths, pieces)
    assert sorted(np.concatenate(cut)) == list(range(len(lengths)))
    assert len(cut) == pieces and all(len(part) for part in cut)
    assert max(lengths[part].sum() for part in cut) <= lengths.sum() / pieces + lengths.max() + 1


def test_micro_batches_of_processes_cover_the_batch():
    """Every process gets the same number of micro-batches, and each example occurs once."""
    lengths = np.array([5, 3, 8])
    shares = packing.micro_batches(lengths, size=1, n_processes=2)
    assert [len(share) for share in shares] == [2, 2]
    assert sorted(np.concatenate([piece for share in shares for piece in share])) == [0, 1, 2]
    assert sum(len(piece) == 0 for share in shares for piece in share) == 1


def test_chosen_negatives_depend_only_on_seed_and_index():
    """Any cut of the run gives the same choice, another seed another one; the share is the fraction."""
    whole = packing.draw_negatives(3, 0, 4000, 0.1)
    parts = [packing.draw_negatives(3, start, 7, 0.1) for start in range(0, 700, 7)]
    assert np.array_equal(np.concatenate(parts), whole[:700])
    assert not np.array_equal(packing.draw_negatives(4, 0, 4000, 0.1), whole)
    assert whole.mean() == pytest.approx(0.1, abs=4 * (0.09 / 4000) ** 0.5)
    # A larger fraction only raises the threshold, so it includes the choice of a smaller one.
    assert not (whole & ~packing.draw_negatives(3, 0, 4000, 0.5)).any()
    assert packing.draw_negatives(3, 0, 100, 1.0).all()


def test_neighbouring_choices_are_independent():
    """Choices of neighbouring indices and of neighbouring seeds coincide as often as independent ones."""
    a, b = packing.draw_negatives(0, 0, 8000, 0.5), packing.draw_negatives(1, 0, 8000, 0.5)
    for first, second in ((a[:-1], a[1:]), (a, b)):
        assert (first & second).mean() == pytest.approx(0.25, abs=4 * (0.1875 / 8000) ** 0.5)


def test_moving_to_a_device_keeps_all_fields():
    batch = packing.pack(TWO, [0, 1], BOTH)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.labels, batch.labels) and moved.segments == batch.segments


def test_pass_of_one_token_texts_is_not_empty():
    """Such a text predicts nothing; a forward pass of no token would be an error."""
    batch = packing.pack(data(prompt=[[], []], target=[[3], [4]]), [0, 1], ("target",))
    assert batch.input_ids.tolist() == [[3, 4]] and batch.segments == packing.Segments((1, 1), (0, 0))
    assert not len(batch.labels) and not len(batch.predictors) and batch.counts == {"target": [0, 0]}
