"""Keys and values of many rows in one allocation per model, and the forwards that read and write them.

    row -> Allocation: a position for each of its tokens -> parts of a forward: rows by new tokens -> logits

A pool is allocated once, and a row takes all positions that it can ever need before its first round: memory
is bounded, and an admitted row never runs out. Rows with a common beginning can share its positions
(`PagedPositions`), or each row has a line of its own (`LinePositions`), which attention reads without a copy.

Shapes: R rows, T new tokens, C tokens whose logits are needed, S places seen, V vocabulary.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicLayer

from ram.decoding.positions import Allocation, LinePositions, PagedPositions
from ram.decoding.steps import DenseSteps, Part, Steps, cat, llama_steps
from ram.models import by_length
from ram.models.abilities import (
    Truth,
    attention_of,
    distance,
    keep,
    max_positions,
    objection,
    text_config,
)
from ram.models.by_length import Lengths, lengths
from ram.models.llama import JointForward, LlamaForward, is_plain_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Limits:
    """Sizes of a pool.

    Args:
        rows: rows decoded at once.
        positions: tokens held at once, over all rows.
        columns: tokens of the longest row.
        share_prefixes: whether rows with a common beginning share its positions; otherwise each row has a
            line of `columns` positions.
        unused: ids below `vocab_size` that name no token and are never drawn.
    """

    vocab_size: int
    rows: int
    positions: int
    columns: int
    share_prefixes: bool = True
    unused: tuple[int, ...] = ()


@dataclass(eq=False)
class ServedModel:
    """A model with its pool; numbers follow the order in which models were opened.

    Args:
        others: further models whose logits the pool gives, see `ram.decoding.joint`.
    """

    model: "PreTrainedModel"
    pool: "Pool"
    number: int = field(default_factory=itertools.count().__next__)
    others: "tuple[PreTrainedModel, ...]" = ()

    def __post_init__(self) -> None:
        weights = list(self.model.parameters())
        self.parameters = sum(weight.numel() for weight in weights)
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        self.layers = text_config(self.model.config).num_hidden_layers
        self.vocab_size, self.max_positions = self.pool.vocab_size, max_positions(self.model.config)


def pool_objection(model: Any, longest: int) -> str | None:
    """Return why a model cannot be decoded with a pool, or None if it can.

    Args:
        longest: tokens of the longest row.
    """
    if not hasattr(model, "base_model"):
        return "it is no transformers model"
    if model._is_stateful:
        return "it keeps a state, which cannot take back a rejected draft"
    return objection(model, "the pool of keys and values", _pool_difference, longest)


def _pool_difference(model: Any, truth: Truth) -> float:
    """How far a pool is from the truth: ragged rows, read in pieces, the last of which hold wrong drafts."""
    rows, longest = truth.rows, max(map(len, truth.rows))
    limits = Limits(truth.logprobs[0].shape[-1], len(rows), len(rows) * longest, longest)
    pool = TransformersPool(model, limits)
    for line, row in enumerate(rows):
        assert pool.admit(line, row, len(row)) is not None
    lines, read, worst = torch.arange(len(rows)), [0] * len(rows), 0.0
    while unread := max(len(row) - start for row, start in zip(rows, read, strict=True)):
        counts = [min(len(row) - start, 4) for row, start in zip(rows, read, strict=True)]
        if not any(read):
            counts = [len(row) - 12 for row in rows]
        ids = torch.zeros(len(rows), max(counts), dtype=torch.int64)
        places = torch.full_like(ids, longest)
        for line, (row, start, count) in enumerate(zip(rows, read, counts, strict=True)):
            ids[line, :count] = torch.tensor(row[start : start + count])
            places[line, :count] = torch.arange(start, start + count)
        kept = [count - (count > 3 and unread > 4 and any(read)) for count in counts]
        for line, count in enumerate(kept):
            ids[line, count : counts[line]] = rows[line][0]  # a draft that is rejected
        (logits,) = pool([Part(ids, places, lines, None, longest)])
        for line, count in enumerate(kept):
            expected = truth.logprobs[line][read[line] : read[line] + count]
            worst = max(worst, distance(logits[line, :count].log_softmax(-1), expected) if count else 0.0)
        read = [start + count for start, count in zip(read, kept, strict=True)]
    return worst


@torch.inference_mode()
def open_model(model: "PreTrainedModel", limits: Limits) -> ServedModel:
    """Allocate a model's pool. Any thread may call this: it changes no engine.

    Raises:
        ValueError: if the model cannot be decoded with a pool, lacks rows for the vocabulary, or if memory
            has no room for the pool.
    """
    if reason := pool_objection(model, limits.columns):
        raise ValueError(
            f"{type(model).__name__} cannot be served: its keys and values cannot be kept by position, since "
            f"{reason}; `generate` decodes it more slowly"
        )
    if (rows := text_config(model.config).vocab_size) < limits.vocab_size:
        raise ValueError(
            f"{type(model).__name__} cannot be served: it has {rows} vocabulary rows, expected at least the "
            f"tokenizer's {limits.vocab_size}"
        )
    try:
        pool = (LlamaPool if is_plain_llama(model) else TransformersPool)(model, limits)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"no room for {limits.positions} positions and {limits.rows} rows beside the weights "
            f"({reason}): lower engine.max_tokens or engine.max_rows"
        ) from None
    return ServedModel(model, pool)


class Pool:
    """Keys and values of a model's rows; `steps` runs rows of several pools of one kind together."""

    kind: tuple
    steps: Callable[..., Steps | DenseSteps]

    def __init__(self, model: "PreTrainedModel", limits: Limits) -> None:
        self.limits, self.device = limits, model.device
        self.columns, self.vocab_size = limits.columns, limits.vocab_size
        kind = PagedPositions if limits.share_prefixes else LinePositions
        self.positions = kind(limits.rows, limits.positions, limits.columns)
        # Position of each place of a line; the last column and free places point to a position nobody reads.
        table = torch.from_numpy(self.positions.initial_table())
        self.table = table.to(self.device)
        self.stored: list[torch.Tensor] = []  # by layer, keys and values: (positions, heads, head size)

    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Logits (R, C, V) of each part's needed tokens; keys and values of all tokens are stored."""
        return self.together([self], [parts])

    @staticmethod
    def together(pools: Sequence[Any], parts: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        """`__call__` of several pools of one kind, each with its own parts; in their order."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Memory of the keys and values of all positions."""
        return sum(stored.numel() * stored.element_size() for stored in self.stored)

    def admit(self, line: int, tokens: list[int], count: int) -> Allocation | None:
        """Allocate `count` positions to a row that begins with `tokens`; None if too few are free."""
        assert 0 < count <= self.columns, (count, self.columns)
        allocation = self.positions.admit(line, tokens, count)
        if allocation is not None and self.limits.share_prefixes:
            self.table[line, :count] = torch.from_numpy(allocation.positions).to(self.device)
            self.table[line, count:] = self.limits.positions
        return allocation

    def write_index(self, part: Part) -> torch.Tensor:
        """(R * T,) positions of the new tokens."""
        return self.table[part.lines.unsqueeze(1), part.places].flatten()

    def read_index(self, part: Part) -> torch.Tensor | None:
        """(R * S,) positions that a part reads; None if `read` can slice them."""
        if part.span is not None and not self.limits.share_prefixes:
            return None
        return self.table[part.lines, : part.seen].flatten()

    def read(self, stored: torch.Tensor, part: Part, index: torch.Tensor | None) -> torch.Tensor:
        """(R, S, heads, head size) the states that a part sees, as a view if possible."""
        if index is None:
            return stored.view(self.limits.rows, self.columns + 1, *stored.shape[1:])[part.span, : part.seen]
        return stored.index_select(0, index).view(len(part.ids), part.seen, *stored.shape[1:])


class TransformersPool(Pool):
    """A pool of any transformers decoder that takes a four-dimensional mask; parts run one by one."""

    def __init__(self, model: "PreTrainedModel", limits: Limits) -> None:
        super().__init__(model, limits)
        self.model, self.cache = model, _PoolCache(self)
        self.last = min(limits.columns, max_positions(model.config) or limits.columns) - 1
        self.unused = torch.tensor(limits.unused, dtype=torch.int64, device=self.device)
        self.adds_mask = attention_of(model) == "eager"
        self.kind, self.steps = (type(self), id(self)), Steps

    @staticmethod
    def together(pools: Sequence[Any], parts: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        return [pool.forward(part) for pool, own in zip(pools, parts, strict=True) for part in own]

    def forward(self, part: Part) -> torch.Tensor:
        self.cache.part = part = part.to(self.device)
        self.cache.write, self.cache.index = self.write_index(part), self.read_index(part)
        mask = part.visible()
        if self.adds_mask:  # eager attention adds its mask: a Boolean one would hide nothing
            dtype = self.model.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        needed = part.ids.shape[1] - part.first
        logits = self.model(
            input_ids=part.ids,
            attention_mask=mask,
            position_ids=part.places.clamp(max=self.last),
            past_key_values=self.cache,
            use_cache=True,
            **keep(self.model, needed),
        ).logits
        logits = logits[:, -needed:, : self.vocab_size]
        if self.limits.unused:
            logits = logits.index_fill(-1, self.unused, float("-inf"))
        return part.pick(logits)


class _PoolCache(Cache):
    """The pool as transformers' cache: the positions that the next forward's tokens write and read."""

    part: Part
    write: torch.Tensor
    index: torch.Tensor | None

    def __init__(self, pool: TransformersPool) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.pool = pool

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        stored, states = self.pool.stored, []
        if 2 * layer_idx == len(stored):
            size = self.pool.positions.size
            # Both at once: after a failure, e.g. for lack of memory, neither may be there.
            states = [x.new_zeros((size, x.shape[1], x.shape[3])) for x in (key_states, value_states)]
            stored += states
            states = []
        for kept, new in zip(stored[2 * layer_idx :], (key_states, value_states), strict=False):
            kept[self.write] = new.transpose(1, 2).flatten(0, 1)
            states.append(self.pool.read(kept, self.part, self.index).transpose(1, 2))
        return tuple(states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class LlamaPool(Pool):
    """A pool for `LlamaForward`: all parts share the linear layers, and each computes its own attention."""

    def __init__(self, model: "PreTrainedModel", limits: Limits) -> None:
        super().__init__(model, limits)
        self.run = run = LlamaForward(model, limits.columns, limits.vocab_size, limits.unused)
        self.kind, self.steps = run.kind, llama_steps
        # Attention by lengths looks behind a slot: behind the last line is a spare one.
        spare = self.columns if run.by_length and not limits.share_prefixes else 0
        shape = (self.positions.size + spare, 2 * run.kv_heads, run.head_size)
        self.stored = [run.embedding.new_zeros(shape) for _ in run.layers]

    @staticmethod
    def together(pools: Sequence[Any], parts: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        owned = [(pool, part.to(pool.device)) for pool, own in zip(pools, parts, strict=True) for part in own]
        sizes = [part.ids.numel() for _, part in owned]
        needed = [part.logits_shape.numel() for _, part in owned]
        run = pools[0].run
        if len(pools) > 1:
            ends = list(itertools.accumulate(map(len, parts), initial=0))
            spans = [slice(*span) for span in itertools.pairwise(ends)]
            counts = [[sum(numbers[span]) for span in spans] for numbers in (sizes, needed)]
            run = JointForward([pool.run for pool in pools], *counts)
        writes = [pool.write_index(part) for pool, part in owned]
        sights = [pool.sight(part) for pool, part in owned]

        def attend(layer: int, states: torch.Tensor) -> torch.Tensor:
            outputs, own_states = [], (states,) if len(sizes) == 1 else states.split(sizes)
            for (pool, _), write, own in zip(owned, writes, own_states, strict=True):
                pool.stored[layer].index_copy_(0, write, own[:, run.heads :])
            for (pool, part), sight, own in zip(owned, sights, own_states, strict=True):
                queries = own[:, : run.heads].view(*part.ids.shape, run.heads, run.head_size)
                outputs.append(pool.attend(layer, queries, part, *sight))
            return cat(outputs)

        def select(x: torch.Tensor) -> torch.Tensor:
            rows = zip(owned, x.split(sizes), strict=True)
            return cat([part.pick(own.view(*part.ids.shape, -1)).flatten(0, 1) for (_, part), own in rows])

        ids = cat([part.ids.flatten() for _, part in owned])
        places = cat([part.places.flatten() for _, part in owned])
        logits = run(ids, places, attend, select).split(needed)
        return [
            rows.view(*part.logits_shape, rows.shape[-1])
            for rows, (_, part) in zip(logits, owned, strict=True)
        ]

    def sight(self, part: Part) -> "tuple[torch.Tensor | None, torch.Tensor | Lengths]":
        """What a part's tokens see: the positions to gather, if any, and a bias or the lengths of rows."""
        index = self.read_index(part)
        if not self.run.by_length:
            return index, self.run.bias(part.visible())
        if index is None:
            return None, lengths(part.places, self.columns + 1, part.seen, self.columns)
        behind = part.ids.shape[1]
        index = torch.cat([index, index.new_full((behind,), self.limits.positions)])
        return index, lengths(part.places, part.seen, part.seen, behind)

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        part: Part,
        index: torch.Tensor | None,
        sight: "torch.Tensor | Lengths",
    ) -> torch.Tensor:
        """Attention of a part's queries (R, T, heads, head size) to what they see -> (R * T, ...)."""
        stored = self.stored[layer]
        if isinstance(sight, torch.Tensor):
            keys, values = self.read(stored, part, index).chunk(2, dim=2)
            return self.run.attention(queries, keys, values, sight)
        if index is not None:
            return by_length.attend(queries, stored.index_select(0, index), sight)
        assert part.span is not None
        return by_length.attend(queries, stored[part.span.start * (self.columns + 1) :], sight)
