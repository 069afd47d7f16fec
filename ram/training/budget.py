"""Form the forward passes of a batch: by a number of examples, or by a budget of tokens (`tokens_per_pass`).

The memory of a pass grows with its tokens, so a budget bounds it for any lengths of the examples. A packed
pass has as many tokens as its examples, with each prompt once. A padded pass has one row per example and
answer, all as long as the longest one.

Shapes: B examples.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.training import packing

# A batch cut for all processes: for each process, the indices of the examples in each of its passes.
Shares = list[list[np.ndarray]]


def micro_batches(
    settings: Any,
    data: TokenizedDataset,
    rows: np.ndarray,
    answers: Sequence[str],
    drawn: np.ndarray | None,
    is_packed: bool,
) -> list[np.ndarray]:
    """Return this process's passes over a batch of training, as indices into `rows`. Some may be empty.

    Args:
        settings: has tokens_per_pass, batch_size and gradient_accumulation_steps.
        answers: ("target",) or ("target", "negative").
        drawn: (B,) whether each example's negative is computed; None computes all.
        is_packed: whether the forward pass is the packed one.
    """
    if settings.tokens_per_pass is not None:
        return _within_budget(settings.tokens_per_pass, data, rows, answers, drawn, is_packed)
    size = settings.batch_size // settings.gradient_accumulation_steps
    lengths = packing.lengths(data, rows, answers, drawn)
    return packing.micro_batches(lengths, size, processes.count())[processes.rank()]


def heldout_passes(
    settings: Any, data: TokenizedDataset, n_examples: int, answers: Sequence[str], is_packed: bool
) -> list[np.ndarray]:
    """Return this process's passes over the first held-out examples, as rows of `data`. Some may be empty.

    Args:
        settings: has tokens_per_pass and eval_batch_size.
        answers: ("target",) or ("target", "negative").
        is_packed: whether the forward pass is the packed one.
    """
    rows = np.arange(n_examples)
    if settings.tokens_per_pass is not None:
        return _within_budget(settings.tokens_per_pass, data, rows, answers, None, is_packed)
    pieces = [rows[start : start + settings.eval_batch_size] for start in rows[:: settings.eval_batch_size]]
    return _shared_out(pieces, processes.count())[processes.rank()]


def _within_budget(
    budget: int,
    data: TokenizedDataset,
    rows: np.ndarray,
    answers: Sequence[str],
    drawn: np.ndarray | None,
    is_packed: bool,
) -> list[np.ndarray]:
    """Return this process's passes of at most `budget` tokens, as indices into `rows`."""
    if is_packed:
        shares = cut_packed(packing.lengths(data, rows, answers, drawn), budget, processes.count())
    else:
        shares = cut_padded(widths(data, rows, answers, drawn), budget, processes.count())
    return shares[processes.rank()]


def widths(
    data: TokenizedDataset, rows: np.ndarray, answers: Sequence[str], drawn: np.ndarray | None = None
) -> np.ndarray:
    """Return the tokens of each example's prompt with each answer (answers, B), 0 for a negative left out."""
    by_answer = [packing.lengths(data, rows, (answer,)) for answer in answers]
    if "negative" in answers and drawn is not None:
        by_answer[list(answers).index("negative")] *= drawn
    return np.stack(by_answer)


def cut_packed(lengths: np.ndarray, budget: int, n_processes: int) -> Shares:
    """Cut a batch into packed passes of at most `budget` tokens and about equal lengths, for each process.

    An example that is longer than the budget has a pass of its own. All processes get the same number of
    passes, because a sharded model is gathered by all of them together; some may be empty.

    Args:
        lengths: (B,) tokens of each example.
    """
    n_pieces = n_processes * max(1, math.ceil(int(lengths.sum()) / budget / n_processes))
    while True:
        pieces = packing.cut_evenly(lengths, n_pieces)
        if n_pieces >= len(lengths) or max(int(lengths[piece].sum()) for piece in pieces) <= budget:
            return _shared_out(pieces, n_processes)
        n_pieces += n_processes


def cut_padded(widths: np.ndarray, budget: int, n_processes: int) -> Shares:
    """Cut a batch into padded passes of at most `budget` tokens, padding included, for each process.

    Examples of similar lengths share a pass. For all else see `cut_packed`.

    Args:
        widths: (answers, B) tokens of each row of a pass, 0 for no row.
    """
    pieces: list[list[int]] = []
    for index in np.argsort(-widths.sum(axis=0), kind="stable"):
        if not pieces or padded_tokens(widths[:, [*pieces[-1], index]]) > budget:
            pieces.append([])
        pieces[-1].append(int(index))
    return _shared_out([np.array(piece) for piece in pieces], n_processes)


def padded_tokens(widths: np.ndarray) -> int:
    """Return the tokens of a padded pass over rows of some widths (answers, B), padding included."""
    return int(((widths > 0).sum(axis=1) * widths.max(axis=1)).sum())


def _shared_out(pieces: list[np.ndarray], n_processes: int) -> Shares:
    """Deal passes out to the processes; empty ones give all processes the same number."""
    n_missing = -len(pieces) % n_processes
    pieces = pieces + [np.array([], dtype=np.int64)] * n_missing
    return [pieces[rank::n_processes] for rank in range(n_processes)]
