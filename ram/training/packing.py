"""Lay out the examples of one forward pass end to end: no padding, and each prompt only once.

    an example:  prompt | target | negative      both answers continue the prompt; neither sees the other

This module also decides which examples share a forward pass, and which negatives are computed at all.
Shapes: B examples, T tokens of all examples together, N response tokens (labels).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ram.data.tokenization import TokenizedDataset
from ram.training.losses import IGNORE_INDEX


@dataclass(frozen=True)
class Segments:
    """Which tokens see which, as consecutive segments.

    The `lengths[i]` tokens of segment i see one another causally, and the first `prefixes[i]` tokens of
    segment i - 1. This is a class and not a tuple, because torch.compile would compile the model again for
    every number of segments.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """The input of one forward pass.

    The segments cover the tokens in order. The last token of an answer predicts nothing, so it is a label but
    not an input. The labels are those of all targets, then those of all negatives.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    predictors: torch.Tensor  # (N,) index of the token that predicts each label
    labels: torch.Tensor  # (N,)
    segments: Segments
    counts: dict[str, list[int]]  # response tokens of each example, by answer; 0 if the answer is left out

    def to(self, device: torch.device) -> "Packed":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(
    data: TokenizedDataset,
    rows: Sequence[int] | np.ndarray,
    answers: Sequence[str],
    drawn: Sequence[bool] | np.ndarray | None = None,
) -> Packed:
    """Lay out the examples `rows` end to end.

    The first token after an empty prompt has no label, because nothing predicts it. Padded rows do the same.

    Args:
        answers: ("target",) or ("target", "negative").
        drawn: (B,) whether each example's negative is computed; None computes all.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int]] = []  # (length, prefix)
    predictors: dict[str, list[np.ndarray]] = {answer: [] for answer in answers}
    labels: dict[str, list[np.ndarray]] = {answer: [] for answer in answers}
    total = 0
    for i, row in enumerate(rows):
        prompt = data.part("prompt", row)
        prompt_start = total
        prompt_size = len(prompt)
        ids.append(prompt)
        positions.append(np.arange(prompt_size))
        total += prompt_size
        for answer in answers:
            response = data.part(answer, row)
            if answer == "negative" and drawn is not None and not drawn[i]:
                response = response[:0]
            # A text of one token has nothing to predict; it is read all the same, so that no pass is empty.
            inputs = response[:-1] if prompt_size or len(response) > 1 else response
            ids.append(inputs)
            positions.append(np.arange(prompt_size, prompt_size + len(inputs)))
            if answer == answers[0]:
                segments.append((prompt_size + len(inputs), 0))  # the prompt and its first answer are one
            else:
                segments.append((len(inputs), prompt_size))
            # Each token of the answer is predicted by the token before it. For the first one that is the
            # last token of the prompt, which is not its neighbour in the second answer.
            previous = np.arange(total, total + len(response)) - 1
            previous[:1] = prompt_start + prompt_size - 1
            unpredicted = 1 if prompt_size == 0 else 0
            predictors[answer].append(previous[unpredicted:])
            labels[answer].append(response[unpredicted:])
            total += len(inputs)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    nonempty = [segment for segment in segments if segment[0]]
    return Packed(
        input_ids=joined(ids).unsqueeze(0),
        position_ids=joined(positions).unsqueeze(0),
        predictors=joined([part for answer in answers for part in predictors[answer]]),
        labels=joined([part for answer in answers for part in labels[answer]]),
        segments=Segments(
            lengths=tuple(length for length, _ in nonempty), prefixes=tuple(prefix for _, prefix in nonempty)
        ),
        counts={answer: [len(part) for part in labels[answer]] for answer in answers},
    )


def lengths(
    data: TokenizedDataset, rows: np.ndarray, answers: Sequence[str], drawn: np.ndarray | None = None
) -> np.ndarray:
    """Return the tokens of each example, with the prompt counted once: (B,)."""
    sizes_B = np.zeros(len(rows), dtype=np.int64)
    for part in ("prompt", *answers):
        part_sizes_B = data.offsets[part][rows + 1] - data.offsets[part][rows]
        if part == "negative" and drawn is not None:
            part_sizes_B = part_sizes_B * drawn
        sizes_B += part_sizes_B
    return sizes_B


def cut_evenly(lengths: Sequence[int] | np.ndarray, n_pieces: int) -> list[np.ndarray]:
    """Split examples into at most `n_pieces` forward passes with about equal token counts.

    Longest first, each to the piece with the fewest tokens so far (Graham 1969): at most 4/3 of the best
    possible maximum. No piece is empty if there are at least `n_pieces` examples.

    Returns:
        The indices into `lengths` of each piece.
    """
    totals = np.zeros(n_pieces, dtype=np.int64)
    members: list[list[int]] = [[] for _ in range(n_pieces)]
    for index in np.argsort(-np.asarray(lengths), kind="stable"):
        smallest = int(np.argmin(totals))
        members[smallest].append(index)
        totals[smallest] += max(lengths[index], 1)  # an empty example counts too, so that pieces fill up
    return [np.array(piece) for piece in members if piece]


def micro_batches(lengths: np.ndarray, size: int, n_processes: int) -> list[list[np.ndarray]]:
    """Cut a batch into micro-batches of about equal token counts, for each process.

    All processes get the same number, because a sharded model is gathered by all of them together. If there
    are not enough examples, some micro-batches are empty.

    Args:
        lengths: (B,) tokens of each example.
        size: Mean number of examples of a micro-batch.

    Returns:
        For each process, the indices into `lengths` of its micro-batches.
    """
    n_per_process = math.ceil(math.ceil(len(lengths) / size) / n_processes)
    n_pieces = n_per_process * n_processes
    pieces = cut_evenly(lengths, n_pieces)
    empty = np.array([], dtype=np.int64)
    pieces += [empty] * (n_pieces - len(pieces))
    return [pieces[rank::n_processes] for rank in range(n_processes)]


def draw_negatives(seed: int, first: int, count: int, fraction: float) -> np.ndarray:
    """Choose each negative with probability `fraction`, for the `count` examples of a run from `first` on.

    A choice depends only on (seed, index), because Philox is a counter-based generator. Micro-batches,
    processes and restarts therefore do not change it.

    Returns:
        (count,) bool.
    """
    if fraction == 1:
        return np.ones(count, dtype=bool)
    words = [np.random.Philox(key=seed, counter=index).random_raw() for index in range(first, first + count)]
    # The upper 53 bits of a word give a uniform double in [0, 1).
    uniform = (np.array(words, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53
    return uniform < fraction


def collate(
    data: TokenizedDataset, rows: Sequence[int] | np.ndarray, answer: str, pad_id: int
) -> dict[str, torch.Tensor]:
    """Return right-padded input_ids, attention_mask and labels, each (B, T), of prompt + `answer`.

    Labels are -100 on the prompt and on padding. Both are found by position, not by token id, so a pad token
    that equals EOS is never learnt, and an EOS that ends an answer always is.

    Args:
        answer: "target" or "negative".
    """
    pairs = [(data.part("prompt", row), data.part(answer, row)) for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids_BT = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    attention_mask_BT = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels_BT = torch.full((len(pairs), width), IGNORE_INDEX, dtype=torch.int64)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids_BT[i, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        attention_mask_BT[i, :end] = 1
        labels_BT[i, len(prompt) : end] = input_ids_BT[i, len(prompt) : end]
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}
