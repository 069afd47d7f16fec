"""What one forward pass sees: the tokens of its examples end to end without padding, each prompt only once.

    an example:  prompt | target | negative      both answers go on from the prompt, neither sees the other

Also which examples share a forward pass, and whose second answer is computed at all. Shapes: B examples, T
tokens of all of them together, N response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ram.data.tokenization import TokenizedDataset
from ram.training.losses import IGNORE_INDEX


@dataclass(frozen=True)
class Segments:
    """Segment i: lengths[i] tokens that see one another causally, and the first prefixes[i] of segment i - 1.

    No plain tuple, because torch.compile would make a copy of the model for every number of segments.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One forward pass. An answer's last token predicts nothing and is none of the T tokens.

    The segments cover the tokens in order. The N labels are those of all targets, then of all negatives.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    predictors: torch.Tensor  # (N,) the token that predicts each label
    labels: torch.Tensor  # (N,)
    segments: Segments
    counts: dict[str, list[int]]  # response tokens of each example, by answer; 0 where it is left out

    def to(self, device: torch.device) -> "Packed":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(
    data: TokenizedDataset, rows: Sequence[int], answers: Sequence[str], drawn: Sequence[bool] | None = None
) -> Packed:
    """The examples `rows` end to end. answers: ("target",) or ("target", "negative").

    drawn: (B,) whose negatives take part; None = all. The first token after an empty prompt has nothing
    before it and no label, as in padded rows.
    """
    ids, positions, segments, total = [], [], [], 0
    predictors: dict[str, list[np.ndarray]] = {answer: [] for answer in answers}
    labels: dict[str, list[np.ndarray]] = {answer: [] for answer in answers}
    for i, row in enumerate(rows):
        prompt = data.part("prompt", row)
        begin, size = total, len(prompt)
        ids.append(prompt)
        positions.append(np.arange(size))
        total += size
        for answer in answers:
            left_out = answer == "negative" and drawn is not None and not drawn[i]
            response = data.part(answer, row)[: 0 if left_out else None]
            given = response[:-1]
            ids.append(given)
            positions.append(np.arange(size, size + len(given)))
            first = answer == answers[0]
            segments.append((size + len(given), 0) if first else (len(given), size))
            before = np.arange(total, total + len(response)) - 1
            before[:1] = begin + size - 1
            predictors[answer].append(before[size == 0 :])
            labels[answer].append(response[size == 0 :])
            total += len(given)

    def joined(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return Packed(
        joined(ids).unsqueeze(0),
        joined(positions).unsqueeze(0),
        joined([part for answer in answers for part in predictors[answer]]),
        joined([part for answer in answers for part in labels[answer]]),
        Segments(*zip(*(segment for segment in segments if segment[0]), strict=True)),
        {answer: [len(part) for part in labels[answer]] for answer in answers},
    )


def lengths(
    data: TokenizedDataset, rows: np.ndarray, answers: Sequence[str], drawn: np.ndarray | None = None
) -> np.ndarray:
    """Tokens of each example, the prompt counted once. (B,)"""
    found = np.zeros(len(rows), dtype=np.int64)
    for part in ("prompt", *answers):
        size = data.offsets[part][rows + 1] - data.offsets[part][rows]
        found += size * drawn if part == "negative" and drawn is not None else size
    return found


def cut_evenly(lengths: Sequence[int], pieces: int) -> list[np.ndarray]:
    """Positions of the examples of each of `pieces` forward passes whose token counts are about equal.

    Longest first, each to the piece with the fewest tokens so far (Graham 1969): at most 4/3 of the best
    possible maximum. No piece is empty where there are examples enough.
    """
    totals, members = np.zeros(pieces, dtype=np.int64), [[] for _ in range(pieces)]
    for index in np.argsort(-np.asarray(lengths), kind="stable"):
        smallest = int(np.argmin(totals))
        members[smallest].append(index)
        totals[smallest] += max(lengths[index], 1)
    return [np.array(part) for part in members if part]


def draw(seed: int, first: int, count: int, fraction: float) -> np.ndarray:
    """Bernoulli(`fraction`) for the examples first, …, first + count - 1 of a run. (count,) bool

    Each draw hangs on (seed, index) alone (Philox, a counter-based generator): no cut into micro-batches or
    processes and no restart changes it.
    """
    if fraction == 1:
        return np.ones(count, dtype=bool)
    words = [np.random.Philox(key=seed, counter=index).random_raw() for index in range(first, first + count)]
    return (np.array(words, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53 < fraction


def collate(data: TokenizedDataset, rows: Sequence[int], answer: str, pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels (B, T) of prompt + `answer` ("target" or "negative").

    Labels are -100 on the prompt and on padding by *position*, so a pad token that equals the EOS is never
    learnt, and an EOS that ends an answer always is.
    """
    pairs = [(data.part("prompt", row), data.part(answer, row)) for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full((len(pairs), width), IGNORE_INDEX, dtype=torch.int64)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        attention_mask[i, :end] = 1
        labels[i, len(prompt) : end] = input_ids[i, len(prompt) : end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
