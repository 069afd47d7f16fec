"""Forwards that read and write pools: their inputs, and the steps of one token that drafting takes.

Shapes: R rows, D steps, T new tokens, C tokens whose logits are needed, S places seen, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ram.models import by_length
from ram.models.llama import JointForward

if TYPE_CHECKING:
    from ram.decoding.cache import LlamaPool, Pool

Lines = Sequence[torch.Tensor]
Spans = Sequence[slice | None]


class Part(NamedTuple):
    """New tokens of R rows of a model, T each.

    Args:
        ids: (R, T).
        places: (R, T) index in the row; the pool's `columns` for padding that no token sees.
        lines: (R,).
        span: the same lines as a slice if they are consecutive, else None.
        seen: number of places S that the tokens may see.
        needed: (R, C) index of the tokens whose logits are needed; None for all.
        first: least index in `needed`.
    """

    ids: torch.Tensor
    places: torch.Tensor
    lines: torch.Tensor
    span: slice | None
    seen: int
    needed: torch.Tensor | None = None
    first: int = 0

    def to(self, device: torch.device) -> "Part":
        if self.ids.device == device:
            return self
        tensors = {key: value for key, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return self._replace(**{key: value.to(device) for key, value in tensors.items()})

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """(R, C, ...) the needed tokens of (R, T, ...), or of (R, T - first, ...)."""
        if self.needed is None:
            return values
        index = self.needed - (self.ids.shape[1] - values.shape[1])
        return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def visible(self) -> torch.Tensor:
        """(R, 1, T, S) whether a token sees a place."""
        columns = torch.arange(self.seen, device=self.places.device)
        return (columns <= self.places.unsqueeze(-1)).unsqueeze(1)

    @property
    def logits_shape(self) -> torch.Size:
        return (self.ids if self.needed is None else self.needed).shape


def cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Steps:
    """Steps of one token for some rows of a pool, each a forward of the pool."""

    def __init__(
        self, pools: "Sequence[Pool]", lines: Lines, spans: Spans, seen: int, places: torch.Tensor
    ) -> None:
        """lines: (R,) rows of each pool, with their spans; seen: places that the last step sees.

        places: (R, D) of the tokens of all steps.
        """
        self.pools = list(zip(pools, lines, spans, strict=True))
        self.counts, self.seen = [len(rows) for rows in lines], seen
        self.places = iter(places.unsqueeze(2).unbind(1))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after the next token (R,) of each row."""
        new_ids, columns = (values.split(self.counts) for values in (ids.unsqueeze(1), next(self.places)))
        parts = [
            [Part(new, at, lines, span, self.seen)]
            for (_, lines, span), new, at in zip(self.pools, new_ids, columns, strict=True)
        ]
        logits = self.pools[0][0].together([pool for pool, _, _ in self.pools], parts)
        return cat([values[:, 0] for values in logits])

    def close(self) -> None:
        """Finish after the last step."""


class DenseSteps:
    """Steps of one token for some rows of pools of one kind.

    Lines that follow each other are stepped in place. The states of other rows are gathered once, and the new
    ones go back to the pools after the last step.
    """

    def __init__(
        self, pools: "Sequence[LlamaPool]", lines: Lines, spans: Spans, seen: int, places: torch.Tensor
    ) -> None:
        """lines: (R,) rows of each pool, with their spans; seen: places that the last step sees.

        places: (R, D) of the tokens of all steps.
        """
        self.pools, self.device = pools, pools[0].device
        self.lines = [rows.to(self.device) for rows in lines]
        self.counts = [len(rows) for rows in lines]
        runs = [pool.run for pool in pools]
        self.run = runs[0] if len(runs) == 1 else JointForward(runs, self.counts)
        self.places = places.to(self.device)
        span = spans[0]
        self.in_place = in_place(pools, spans)
        if span is not None and self.in_place:
            padding = pools[0].columns
            rows = slice(span.start * (padding + 1), span.stop * (padding + 1))
            self.dense = [stored[rows] for stored in pools[0].stored]
            self.seen = seen
        else:
            padding = seen
            tables = [pool.table[rows, : seen + 1] for pool, rows in zip(pools, self.lines, strict=True)]
            for pool, table in zip(pools, tables, strict=True):
                table[:, seen] = pool.limits.positions  # the dense copy's own column for padding
            self.dense = [
                cat([stored.index_select(0, t.flatten()) for stored, t in zip(layer, tables, strict=True)])
                for layer in zip(*(pool.stored for pool in pools), strict=True)
            ]
            self.seen = seen + 1
        columns = self.places.t().clamp(max=padding)  # (D, R)
        self.index = columns + torch.arange(len(self.places), device=self.device) * (padding + 1)
        if self.run.by_length:
            sights: Any = [by_length.lengths(at.unsqueeze(1), padding + 1, self.seen, 0) for at in columns]
        else:
            mask = torch.arange(self.seen, device=self.device) <= columns[..., None, None, None]
            sights = self.run.bias(mask)
        self.steps = iter(zip(self.places.t(), self.index, sights, strict=True))

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) after the next token (R,) of each row."""
        run, rows = self.run, len(ids)
        places, index, sight = next(self.steps)

        def attend(layer: int, states: torch.Tensor) -> torch.Tensor:
            dense = self.dense[layer]
            dense.index_copy_(0, index, states[:, run.heads :])
            queries = states[:, : run.heads].unsqueeze(1)
            if run.by_length:
                return by_length.attend(queries, dense, sight)
            keys, values = dense.view(rows, -1, *dense.shape[1:])[:, : self.seen].chunk(2, dim=2)
            return run.attention(queries, keys, values, sight)

        return run(ids.to(self.device), places, attend)

    def close(self) -> None:
        """Copy the steps' keys and values to the pools."""
        if self.in_place:
            return
        columns = zip(self.places.split(self.counts), self.index.t().split(self.counts), strict=True)
        for pool, lines, (places, index) in zip(self.pools, self.lines, columns, strict=True):
            write, index = pool.table[lines.unsqueeze(1), places].flatten(), index.flatten()
            for stored, dense in zip(pool.stored, self.dense, strict=True):
                stored.index_copy_(0, write, dense.index_select(0, index))


def in_place(pools: "Sequence[Pool]", spans: Spans) -> bool:
    """Whether the lines of some rows are one slice of a pool."""
    return len(pools) == 1 and spans[0] is not None and not pools[0].limits.share_prefixes


def llama_steps(
    pools: "Sequence[LlamaPool]", lines: Lines, spans: Spans, seen: int, places: torch.Tensor
) -> "Steps | DenseSteps":
    """The steps of Llama pools. Other lines than a slice are not copied: a round has few steps for that."""
    dense = pools[0].limits.share_prefixes or in_place(pools, spans)
    return (DenseSteps if dense else Steps)(pools, lines, spans, seen, places)
