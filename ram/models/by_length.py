"""Attention over the first keys of each row, by a GPU kernel that takes lengths in place of a mask.

    rows of queries, one slot of keys per row -> Lengths, once a forward -> attend, once a layer

A slot is larger than the row in it, so keys are read where they are stored, and no size depends on how long
the rows have become. Queries of a row are its newest tokens: the last sees all keys that count, the one
before it one fewer. Unused queries follow the others of their row. They look beyond the row's keys and up to
`behind` positions beyond its slot, which must be readable; their outputs mean nothing.

Shapes: R rows of T queries, H heads, K key-value heads, D head size; N stored positions.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ram.log import log


class Lengths(NamedTuple):
    """The keys that each row's queries see.

    Args:
        query_starts, key_starts: (R + 1,) int32, first query and first position of each row's slot.
        used: (R,) int32, keys that the row's last query sees.
        queries, keys: T, and a bound of `used`.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    used: torch.Tensor
    queries: int
    keys: int


def lengths(places: torch.Tensor, slot: int, seen: int, behind: int) -> Lengths:
    """Return what `attend` needs.

    Args:
        places: (R, T) of the queries in their rows; consecutive but for the unused ones at the end.
        slot: positions from the beginning of one row's keys to the next one's.
        seen: a bound of the places that used queries see.
        behind: readable positions behind each slot.
    """
    rows, queries = places.shape
    starts = torch.arange(rows + 1, device=places.device, dtype=torch.int32)
    most = min(slot + behind, seen + queries)  # only a row without any used query would look further
    used = (places[:, 0] + queries).clamp(max=most).int()
    return Lengths(starts * queries, starts * slot, used, queries, most)


def attend(queries: torch.Tensor, stored: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    """Attention of (R, T, H, D) to stored keys and values (N, 2 K, D) -> (R * T, H * D)."""
    from torch.nn.attention.varlen import varlen_attn

    keys, values = stored.chunk(2, dim=1)
    output = varlen_attn(
        queries.flatten(0, 1),
        keys,
        values,
        lengths.query_starts,
        lengths.key_starts,
        lengths.queries,
        lengths.keys,
        window_size=(-1, 0),  # causal, with the last query at the last key that counts
        enable_gqa=queries.shape[2] != keys.shape[1],
        seqused_k=lengths.used,
    )
    assert isinstance(output, torch.Tensor)
    return output.flatten(1)


@functools.lru_cache(maxsize=16)
def is_usable(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int) -> bool:
    """Return whether a device has the kernel, and it is right on a few rows of these heads."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if reason := kernel_fault(device, dtype, heads, kv_heads, head_size):
        log.info(f"decoding masks its attention: the kernel that takes lengths fails here ({reason})")
    return reason is None


@torch.inference_mode()
def kernel_fault(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_size: int
) -> str | None:
    """Compare the kernel with masked attention in float64; return what is wrong with it, or None."""
    rows, slot, generator = 3, 24, torch.Generator().manual_seed(0)
    for count, firsts, valid in ((1, (0, 9, 22), (1, 1, 1)), (4, (0, 9, 20), (4, 2, 1))):
        shapes = (rows, count, heads, head_size), (rows * slot + count, 2 * kv_heads, head_size)
        queries, stored = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        places = torch.tensor(firsts).unsqueeze(1) + torch.arange(count)
        try:
            own = lengths(places.to(device), slot, slot, count)
            found = attend(queries.to(device), stored.to(device), own)
        except (RuntimeError, ImportError, NotImplementedError, TypeError) as error:
            return str(error).strip().split("\n")[0][:100]
        lines = stored[: rows * slot].double().unflatten(0, (rows, slot)).transpose(1, 2)
        keys, values = lines.chunk(2, dim=1)
        mask = (torch.arange(slot) <= places.unsqueeze(-1)).unsqueeze(1)
        expected = F.scaled_dot_product_attention(
            queries.double().transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=heads != kv_heads
        ).transpose(1, 2)
        difference = (found.cpu().double().view(expected.shape) - expected).abs()
        worst = max(difference[row, :used].max().item() for row, used in enumerate(valid))
        if not worst < 0.05:  # a rounding of bfloat16 at values below 4 is 0.01
            return f"it is wrong by {worst:.2g}"
    return None
