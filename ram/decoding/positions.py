"""Which positions of a pool belong to which row; rows with a common beginning can share its positions."""

from collections.abc import Sequence

import numpy as np

BLOCK = 16  # tokens; shorter common beginnings are not looked up


class Allocation:
    """A row's part of a pool.

    Args:
        tokens: the row's prompt and answer; the list grows with the row.
        positions: one position per token that is ever read.
        read: tokens whose keys and values are stored.
    """

    def __init__(self, tokens: list[int], positions: np.ndarray, read: int) -> None:
        self.tokens, self.positions, self.read = tokens, positions, read
        self.shared = read  # tokens that another row had read before
        self.keys: list[int] = []  # hashes of the complete blocks that other rows can find

    @property
    def unread(self) -> int:
        """Unread tokens before the last one; the last one is read together with the drafts."""
        return len(self.tokens) - 1 - self.read


class LinePositions:
    """A line of `columns` positions for each row; the last column of a line takes what nobody reads."""

    def __init__(self, lines: int, positions: int, columns: int) -> None:
        self.lines, self.columns = lines, columns
        self.size = lines * (columns + 1)

    def initial_table(self) -> np.ndarray:
        return np.arange(self.size).reshape(self.lines, self.columns + 1)

    def admit(self, line: int, tokens: list[int], count: int) -> Allocation:
        return Allocation(tokens, np.empty(0, dtype=np.int64), 0)

    def note(self, allocation: Allocation) -> None:
        """Nothing to share."""

    def release(self, allocation: Allocation) -> None:
        """The line is free at once."""

    def undo(self, allocation: Allocation) -> None:
        """The line is free at once."""


class PagedPositions:
    """Any free positions for each row. Finished rows keep theirs until others need them.

    A row that begins as a running or finished row of the same model shares its positions instead of reading
    the tokens again. A position belongs to all rows that share it, and each row writes only behind the shared
    part.
    """

    def __init__(self, lines: int, positions: int, columns: int) -> None:
        self.lines, self.columns = lines, columns
        self.size = positions + 1  # the last position takes what nobody reads
        self.free, self.count = np.arange(positions)[::-1].copy(), positions  # the first `count` are free
        self.holders = np.zeros(positions, dtype=np.int64)
        self.kept: dict[Allocation, None] = {}  # of finished rows, the least recently used first
        self.blocks: dict[int, Allocation] = {}

    def initial_table(self) -> np.ndarray:
        return np.full((self.lines, self.columns + 1), self.size - 1)

    def admit(self, line: int, tokens: list[int], count: int) -> Allocation | None:
        """Allocate `count` positions to a row that begins with `tokens`; None if too few are free."""
        origin, read = self.find(tokens)
        shared = origin.positions[:read] if origin is not None else self.free[:0]
        self.holders[shared] += 1
        while self.count < count - read and self.kept:
            self.drop(next(iter(self.kept)))
        if self.count < count - read:
            self._free(shared)
            return None
        if origin in self.kept:
            self.kept[origin] = self.kept.pop(origin)
        self.count -= count - read
        fresh = self.free[self.count : self.count + count - read].copy()
        assert not self.holders[fresh].any(), "a free position has a holder"
        self.holders[fresh] = 1
        return Allocation(tokens, np.concatenate([shared, fresh]), read)

    def find(self, tokens: Sequence[int]) -> tuple[Allocation | None, int]:
        """Return the row that has read the longest beginning of these tokens, and that beginning's length.

        The last token does not count: it must be read to give logits.
        """
        origin, key, limit = None, 0, len(tokens) - 1
        for start in range(0, limit - BLOCK + 1, BLOCK):
            key = hash((key, *tokens[start : start + BLOCK]))
            if key not in self.blocks:
                break
            origin = self.blocks[key]
        if origin is None:
            return None, 0
        return origin, common_length(origin.tokens, tokens, min(limit, origin.read))

    def note(self, allocation: Allocation) -> None:
        """Let other rows find the tokens that a row has read."""
        while (len(allocation.keys) + 1) * BLOCK <= allocation.read:
            start = len(allocation.keys) * BLOCK
            last = allocation.keys[-1] if allocation.keys else 0
            allocation.keys.append(hash((last, *allocation.tokens[start : start + BLOCK])))
            self.blocks[allocation.keys[-1]] = allocation

    def release(self, allocation: Allocation) -> None:
        """End a row: keep the positions that it has read while there is room, and free the others."""
        self.note(allocation)
        self._free(allocation.positions[allocation.read :])
        allocation.positions = allocation.positions[: allocation.read]
        self.kept[allocation] = None
        if not allocation.keys:
            self.drop(allocation)

    def undo(self, allocation: Allocation) -> None:
        """Take back an allocation that was never used."""
        self._free(allocation.positions)

    def drop(self, allocation: Allocation) -> None:
        """Forget a finished row."""
        del self.kept[allocation]
        for key in allocation.keys:
            if self.blocks.get(key) is allocation:
                del self.blocks[key]
        self._free(allocation.positions)

    def _free(self, positions: np.ndarray) -> None:
        self.holders[positions] -= 1
        assert (self.holders[positions] >= 0).all(), "a position was freed twice"
        free = positions[self.holders[positions] == 0]
        self.free[self.count : self.count + len(free)] = free
        self.count += len(free)


def common_length(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Return how many of the first `limit` tokens two lists share."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
