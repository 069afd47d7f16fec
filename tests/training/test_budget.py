"""Passes formed by a budget of tokens: their sizes, and the same losses as one pass over everything."""

import numpy as np
import pytest
import torch
from tiny import tiny_model
from training_runs import TOKENIZER, assert_same_path, dataset, frozen_proposal, path_of, trainer, weights

from ram.training import budget, frozen, packing
from ram.training.budget import cut_packed, cut_padded, padded_tokens

BOTH = ("target", "negative")
BUDGET = 192  # tokens: the longest example that max_length=96 allows


def batch_of(seed):
    """Lengths (B,) and widths (2, B) of a batch, some negatives left out, and a budget that all fit."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(0, 200, size=40), rng.integers(0, 200, size=(2, 40))
    answers[1] *= rng.random(40) < 0.7
    widths = (prompts + answers) * (answers > 0)
    return prompts + answers.sum(axis=0), widths, int(rng.integers(800, 4000))


@pytest.mark.parametrize("n_processes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_no_pass_exceeds_the_budget(seed, n_processes):
    """Each example occurs once, all processes have as many passes, and none has more tokens than allowed."""
    lengths, widths, tokens = batch_of(seed)
    sizes_of = {
        "packed": (cut_packed(lengths, tokens, n_processes), lambda piece: lengths[piece].sum()),
        "padded": (cut_padded(widths, tokens, n_processes), lambda piece: padded_tokens(widths[:, piece])),
    }
    for shares, size_of in sizes_of.values():
        assert len({len(share) for share in shares}) == 1 and len(shares) == n_processes
        pieces = [piece for share in shares for piece in share if len(piece)]
        assert sorted(np.concatenate(pieces)) == list(range(40))
        assert max(size_of(piece) for piece in pieces) <= tokens
    shares, _ = sizes_of["packed"]
    # Longest first fills every pass of a batch like this to three quarters, or there is one pass each.
    assert len(shares[0]) == 1 or len(shares[0]) - 1 <= lengths.sum() / (0.75 * tokens * n_processes)


def test_pass_may_be_as_large_as_the_budget():
    widths = np.array([[4, 4, 3]])
    assert [[piece.tolist() for piece in share] for share in cut_padded(widths, 8, 1)] == [[[0, 1], [2]]]
    assert len(cut_padded(widths, 12, 1)[0]) == 1 and len(cut_padded(widths, 7, 1)[0]) == 3


def test_padded_tokens_are_those_that_the_model_sees():
    """The count of a padded pass is the size of its input, and a negative that is left out has no row."""
    data, rows = dataset(9), np.array([4, 2, 7])
    drawn = np.array([True, False, True])
    widths = budget.widths(data, rows, BOTH, drawn)
    targets = packing.collate(data, rows, "target", 0)["input_ids"].numel()
    negatives = packing.collate(data, rows[drawn], "negative", 0)["input_ids"].numel()
    assert padded_tokens(widths) == targets + negatives
    assert padded_tokens(budget.widths(data, rows, ("target",))) == targets


def test_packed_tokens_are_those_that_the_model_sees():
    """A packed pass leaves the last token of each answer out, so the count is above its input by those."""
    data, rows = dataset(9), np.array([4, 2, 7])
    seen = packing.pack(data, rows, BOTH).input_ids.numel()
    assert packing.lengths(data, rows, BOTH).sum() == seen + 6


@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("kind", ["sft", "ours_sft", "dpo", "ratio"])
def test_losses_do_not_depend_on_the_budget(tmp_path, kind, packed):
    """Losses, gradient norms, weights and held-out losses equal those of one pass over each batch (float64).

    With a budget, an update of 8 examples takes several passes, and so does the evaluation.
    """
    runs = {}
    for tokens in ("null", BUDGET):
        reference = tiny_model(len(TOKENIZER), seed=7, layers=2, dtype=torch.float64)
        run = trainer(
            tmp_path / str(tokens),
            f"loss={kind}",
            f"packed={packed}",
            f"tokens_per_pass={tokens}",
            "lr=1e-3",
            dtype=torch.float64,
            reference=reference if kind == "dpo" else None,
            proposal=frozen_proposal() if kind == "ratio" else None,
        )
        sizes = []
        losses = run.losses

        def seen(data, rows, drawn=None, run=run, sizes=sizes, losses=losses):
            cut = budget.widths(data, rows, run.answers, drawn)
            packed_size = packing.lengths(data, rows, run.answers, drawn).sum()
            sizes.append(packed_size if run.is_packed else padded_tokens(cut))
            return losses(data, rows, drawn)

        run.losses = seen
        runs[tokens] = run, run.train(), sizes
    (whole, whole_result, whole_sizes), (cut, cut_result, cut_sizes) = runs.values()
    assert max(cut_sizes) <= BUDGET < max(whole_sizes) and len(cut_sizes) > len(whole_sizes)
    assert_same_path(path_of(cut), path_of(whole))
    assert cut_result["loss"] == pytest.approx(whole_result["loss"], rel=1e-6)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], weight, rtol=0, atol=1e-6)


def test_frozen_proposal_pads_within_its_own_budget(monkeypatch):
    """Rows of uneven lengths take several forward passes; the states keep the order of the rows."""
    proposal, data, rows = frozen_proposal(), dataset(12), np.array([3, 11, 0, 7, 5])
    whole, sizes = proposal.hidden(data, rows), []
    monkeypatch.setattr(frozen, "TOKENS", 80)
    hidden = proposal._hidden

    def seen(data, rows):
        sizes.append(packing.collate(data, rows, "target", 0)["input_ids"].numel())
        return hidden(data, rows)

    monkeypatch.setattr(proposal, "_hidden", seen)
    torch.testing.assert_close(proposal.hidden(data, rows), whole, rtol=1e-5, atol=1e-6)
    assert len(sizes) > 1 and max(sizes) <= max(80, int(budget.widths(data, rows, ("target",)).max()))
