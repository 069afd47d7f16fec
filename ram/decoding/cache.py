"""Keys and values of many rows in one pool of positions; rows that begin alike share theirs.

    row -> Hold: a position for each of its tokens -> parts of a forward: rows by new tokens -> logits

A pool is allocated once, for `size` positions, and a row takes at its start as many as it can ever need, so
what is held is bounded and no row that was let in can run out. A finished row's positions stay until others
need them, the longest unused first. A row whose first tokens are those of a row that runs, or ran, of the
same model takes over its positions instead of reading again: a position belongs to all rows that share it,
and each only writes behind what it shares.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, DynamicLayer

from ram.models.llama import JointForward, LlamaForward, is_plain_llama

BLOCK = 16  # tokens; shorter beginnings are not looked for


class Hold:
    """A row's part of a pool: its tokens (a list that grows with the row), their positions, how many were
    read.
    """

    def __init__(self, tokens: list[int], positions: np.ndarray, read: int) -> None:
        self.tokens, self.positions, self.read = tokens, positions, read
        self.shared = read  # tokens that the row found read
        self.keys: list[int] = []  # of its whole blocks that others may find

    @property
    def unread(self) -> int:
        """Tokens that stand before the last one and were not read; the last one is read with the drafts."""
        return len(self.tokens) - 1 - self.read


class Part(NamedTuple):
    """New tokens of R rows of a model, T each."""

    ids: torch.Tensor  # (R, T)
    places: torch.Tensor  # (R, T) index in the row; the pool's `columns` for what nobody reads
    lines: torch.Tensor  # (R,)
    seen: int  # no token sees more places
    wanted: torch.Tensor | None  # (R, C) tokens whose logits are wanted; None for all


class Pool:
    """The positions of a model's keys and values, and who has them.

    size: positions. lines: rows at once. columns: tokens of the longest row. Of a kind of pools `steps` takes
    rows of several together.
    """

    kind: tuple
    steps: "type[Steps] | type[DenseSteps]"

    def __init__(self, size: int, lines: int, columns: int, device: torch.device) -> None:
        self.size, self.columns, self.device = size, columns, device
        self.free, self.count = np.arange(size)[::-1].copy(), size  # the first `count` are free
        self.holders = np.zeros(size, dtype=np.int64)
        self.kept: dict[Hold, None] = {}  # of finished rows, the longest unused first
        self.blocks: dict[int, Hold] = {}
        self.stored: list[Any] = []  # by layer, one position more than there are
        self.table = torch.full((lines, columns + 1), size, device=device)  # the last position is nobody's

    def admit(self, line: int, tokens: list[int], count: int) -> Hold | None:
        """Positions for a row of at most `count` tokens that begins with `tokens`; None where too few are
        free.
        """
        origin, read = self.find(tokens)
        shared = origin.positions[:read] if origin is not None else self.free[:0]
        self.holders[shared] += 1
        while self.count < count - read and self.kept:
            self.drop(next(iter(self.kept)))
        if self.count < count - read:
            self.give_back(shared)
            return None
        if origin in self.kept:
            self.kept[origin] = self.kept.pop(origin)
        self.count -= count - read
        fresh = self.free[self.count : self.count + count - read].copy()
        self.holders[fresh] = 1
        hold = Hold(tokens, np.concatenate([shared, fresh]), read)
        self.table[line, :count] = torch.from_numpy(hold.positions).to(self.device)
        self.table[line, count:] = self.size
        return hold

    def find(self, tokens: Sequence[int]) -> tuple[Hold | None, int]:
        """The row that has read the most of these tokens' beginning, and how much, but for the last token."""
        found, key, limit = None, 0, len(tokens) - 1
        for start in range(0, limit - BLOCK + 1, BLOCK):
            key = hash((key, *tokens[start : start + BLOCK]))
            if key not in self.blocks:
                break
            found = self.blocks[key]
        if found is None:
            return None, 0
        return found, common(found.tokens, tokens, min(limit, found.read))

    def note(self, hold: Hold) -> None:
        """Lets others find what a row has read."""
        while (len(hold.keys) + 1) * BLOCK <= hold.read:
            start = len(hold.keys) * BLOCK
            last = hold.keys[-1] if hold.keys else 0
            hold.keys.append(hash((last, *hold.tokens[start : start + BLOCK])))
            self.blocks[hold.keys[-1]] = hold

    def release(self, hold: Hold) -> None:
        """A row has ended: what it has read stays for others while there is room, the rest is free."""
        self.note(hold)
        self.give_back(hold.positions[hold.read :])
        hold.positions = hold.positions[: hold.read]
        self.kept[hold] = None
        if not hold.keys:
            self.drop(hold)

    def drop(self, hold: Hold) -> None:
        """Forgets what a finished row has read."""
        del self.kept[hold]
        for key in hold.keys:
            if self.blocks.get(key) is hold:
                del self.blocks[key]
        self.give_back(hold.positions)

    def give_back(self, positions: np.ndarray) -> None:
        self.holders[positions] -= 1
        free = positions[self.holders[positions] == 0]
        self.free[self.count : self.count + len(free)] = free
        self.count += len(free)

    @property
    def bytes(self) -> int:
        """Memory of keys and values, of all positions."""
        tensors = (each for layer in self.stored for each in (layer if isinstance(layer, tuple) else [layer]))
        return sum(each.numel() * each.element_size() for each in tensors)

    def where(self, part: Part) -> torch.Tensor:
        """(R * T,) positions of the new tokens."""
        return self.table[part.lines.unsqueeze(1), part.places].flatten()

    def read(self, part: Part) -> torch.Tensor:
        """(R * S,) positions of what they see."""
        return self.table[part.lines, : part.seen].flatten()


def common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many of the first `limit` tokens two lists share."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def wanted_of(part: Part, found: torch.Tensor) -> torch.Tensor:
    """(R, C, _) what is wanted of (R, T, _)."""
    if part.wanted is None:
        return found
    return found.gather(1, part.wanted.unsqueeze(-1).expand(-1, -1, found.shape[-1]))


def visible(part: Part) -> torch.Tensor:
    """(R, 1, T, S) which places each token sees."""
    columns = torch.arange(part.seen, device=part.places.device)
    return (columns <= part.places.unsqueeze(-1)).unsqueeze(1)


def cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def moved(part: Part, device: torch.device) -> Part:
    return Part(*(each.to(device) if isinstance(each, torch.Tensor) else each for each in part))


@torch.inference_mode()
def open_pool(model, size: int, lines: int, columns: int, vocab_size: int) -> "LlamaPool | TransformersPool":
    """An empty pool of a model, with the fastest forward that fits it."""
    kind = LlamaPool if is_plain_llama(model) else TransformersPool
    return kind(model, size, lines, columns, vocab_size)


class Steps:
    """Steps of a token each for some rows of a pool."""

    def __init__(self, pools: "Sequence[TransformersPool]", lines: Sequence[torch.Tensor], seen: int) -> None:
        """lines: (R,) of each pool's rows; seen: no step sees more places."""
        self.given, self.seen = list(zip(pools, lines, strict=True)), seen

    def step(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the rows' next tokens; ids, places: (R,)."""
        counts = [len(lines) for _, lines in self.given]
        ids, places = (each.unsqueeze(1).split(counts) for each in (ids, places))
        parts = [
            (pool, Part(mine, at, lines, self.seen, None))
            for (pool, lines), mine, at in zip(self.given, ids, places, strict=True)
        ]
        return cat([pool([part])[0][:, 0] for pool, part in parts])

    def close(self) -> None:
        """After the last step."""


class TransformersPool(Pool):
    """A pool for any decoder of transformers that takes a four-dimensional mask; parts go one by one."""

    def __init__(self, model, size: int, lines: int, columns: int, vocab_size: int) -> None:
        super().__init__(size, lines, columns, model.device)
        self.model, self.vocab_size, self.cache = model, vocab_size, _PoolCache(self)
        limit = getattr(model.config, "max_position_embeddings", None)
        self.last = min(columns, limit or columns) - 1
        self.kind, self.steps = (type(self), id(self)), Steps

    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Logits (R, C, V) of each part's wanted tokens; keys and values of all are kept."""
        return [self.forward(moved(part, self.device)) for part in parts]

    @staticmethod
    def together(pools: "Sequence[TransformersPool]", given: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        """`__call__` for one pool after the other."""
        return [each for pool, parts in zip(pools, given, strict=True) for each in pool(parts)]

    def forward(self, part: Part) -> torch.Tensor:
        self.cache.where, self.cache.at, self.cache.rows = self.where(part), self.read(part), len(part.ids)
        logits = self.model(
            input_ids=part.ids,
            attention_mask=visible(part),
            position_ids=part.places.clamp(max=self.last),
            past_key_values=self.cache,
            use_cache=True,
        ).logits[..., : self.vocab_size]
        return wanted_of(part, logits)


class _PoolCache(Cache):
    """transformers' view of a pool: where the next forward's tokens go (`where`) and what they see (`at`)."""

    def __init__(self, pool: TransformersPool) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.pool = pool

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        stored, found = self.pool.stored, []
        if layer_idx == len(stored):
            _, heads, _, width = key_states.shape
            shape = (self.pool.size + 1, heads, width)
            stored.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        for kept, states in zip(stored[layer_idx], (key_states, value_states), strict=True):
            kept[self.where] = states.transpose(1, 2).flatten(0, 1)
            found.append(kept[self.at].view(self.rows, -1, *kept.shape[1:]).transpose(1, 2))
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class LlamaPool(Pool):
    """A pool for `slots.LlamaForward`: all parts go through the linear layers together, and each pays
    attention by itself.
    """

    def __init__(self, model, size: int, lines: int, columns: int, vocab_size: int) -> None:
        super().__init__(size, lines, columns, model.device)
        self.run = run = LlamaForward(model, columns, vocab_size)
        self.kind, self.steps = run.kind, DenseSteps
        shape = (size + 1, 2 * run.kv_heads, run.size)
        self.stored = [run.embedding.new_zeros(shape) for _ in run.layers]

    def __call__(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Logits (R, C, V) of each part's wanted tokens; keys and values of all are kept."""
        return LlamaPool.together([self], [parts])

    @staticmethod
    def together(pools: "Sequence[LlamaPool]", given: Sequence[Sequence[Part]]) -> list[torch.Tensor]:
        """`__call__` for pools of one kind in one forward, each with parts of its own; in their order."""
        pairs = zip(pools, given, strict=True)
        owned = [(pool, moved(part, pool.device)) for pool, parts in pairs for part in parts]
        parts = [part for _, part in owned]
        sizes = [part.ids.numel() for part in parts]
        wanted = [(part.ids if part.wanted is None else part.wanted).numel() for part in parts]
        run = pools[0].run
        if len(pools) > 1:
            ends = itertools.accumulate(map(len, given), initial=0)
            spans = [slice(*span) for span in itertools.pairwise(ends)]
            counts = [[sum(each[span]) for span in spans] for each in (sizes, wanted)]
            run = JointForward([pool.run for pool in pools], *counts)
        wheres = [pool.where(part) for pool, part in owned]
        reads = [pool.read(part) for pool, part in owned]
        biases = [run.bias(visible(part)) for part in parts]

        def attend(layer, found):
            heard, mine = [], found.split(sizes)
            for (pool, _), where, new in zip(owned, wheres, mine, strict=True):
                pool.stored[layer].index_copy_(0, where, new[:, run.heads :])
            for (pool, part), at, bias, new in zip(owned, reads, biases, mine, strict=True):
                seen = pool.stored[layer].index_select(0, at).view(len(part.ids), part.seen, -1, run.size)
                queries = new[:, : run.heads].view(*part.ids.shape, run.heads, run.size)
                heard.append(run.hear(queries, *seen.split(run.kv_heads, dim=2), bias))
            return cat(heard)

        def pick(x):
            rows = (mine.view(*part.ids.shape, -1) for part, mine in zip(parts, x.split(sizes), strict=True))
            return cat([wanted_of(part, mine).flatten(0, 1) for part, mine in zip(parts, rows, strict=True)])

        ids, places = cat([part.ids.flatten() for part in parts]), cat([p.places.flatten() for p in parts])
        logits = run(ids, places, attend, pick)
        shapes = [(part.ids if part.wanted is None else part.wanted).shape for part in parts]
        pairs = zip(logits.split(wanted), shapes, strict=True)
        return [each.view(*shape, logits.shape[-1]) for each, shape in pairs]


class DenseSteps:
    """Steps of a token each for some rows of pools of one kind: what they see is brought together once, and
    goes back to the pools after the last step.
    """

    def __init__(self, pools: Sequence[LlamaPool], lines: Sequence[torch.Tensor], seen: int) -> None:
        """lines: (R,) of each pool's rows; seen: no step sees more places."""
        self.pools, self.device, self.seen = pools, pools[0].device, seen
        self.lines = [each.to(self.device) for each in lines]
        self.counts = [len(each) for each in lines]
        runs = [pool.run for pool in pools]
        self.run = runs[0] if len(runs) == 1 else JointForward(runs, self.counts)
        at = [pool.table[mine, : seen + 1] for pool, mine in zip(pools, self.lines, strict=True)]
        for pool, each in zip(pools, at, strict=True):
            each[:, seen] = pool.size  # what nobody reads
        layers = zip(*(pool.stored for pool in pools), strict=True)
        pairs = [list(zip(layer, at, strict=True)) for layer in layers]
        self.dense = [
            cat([stored.index_select(0, each.flatten()) for stored, each in pair]) for pair in pairs
        ]
        self.starts = torch.arange(sum(self.counts), device=self.device) * (seen + 1)
        self.done: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the rows' next tokens; ids, places: (R,)."""
        run, rows = self.run, len(ids)
        ids, places = ids.to(self.device), places.to(self.device)
        columns = places.clamp(max=self.seen)
        where = self.starts + columns
        self.done.append((places, where))
        mask = torch.arange(self.seen + 1, device=self.device) <= columns.unsqueeze(1)
        bias = run.bias(mask.view(rows, 1, 1, -1))

        def attend(layer, found):
            dense = self.dense[layer]
            dense.index_copy_(0, where, found[:, run.heads :])
            seen = dense.view(rows, self.seen + 1, -1, run.size)
            return run.hear(found[:, : run.heads].unsqueeze(1), *seen.split(run.kv_heads, dim=2), bias)

        return run(ids, places, attend)

    def close(self) -> None:
        """Gives the pools the steps' keys and values."""
        given = (torch.stack(each, dim=1).split(self.counts) for each in zip(*self.done, strict=True))
        for pool, lines, places, where in zip(self.pools, self.lines, *given, strict=True):
            to, where = pool.table[lines.unsqueeze(1), places].flatten(), where.flatten()
            for stored, dense in zip(pool.stored, self.dense, strict=True):
                stored.index_copy_(0, to, dense.index_select(0, where))
