"""A forward of few shapes on a GPU: captured once for each, then run again without Python.

A round's forward depends on three small tensors; everything else (weights, caches) stays where it is. So the
tensors are copied to where a captured CUDA graph reads them, and the graph writes the logits to where they
are copied from. Columns seen are rounded up, so that a shape lasts for many tokens.
"""

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

COLUMNS = 128  # the columns that a graph sees are a multiple of this
EAGER = 2  # so often a shape runs as it is: what comes no more is not worth capturing


def capture_cuda(run: Callable[[], torch.Tensor], pool) -> tuple[Callable[[], None], torch.Tensor]:
    """(replay, the logits that it fills) of a forward whose inputs and caches keep their places."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries that set themselves up must do so before
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()
    return graph.replay, output


CAPTURES = {"cuda": (capture_cuda, lambda: torch.cuda.graph_pool_handle())}  # by device type


def can_capture(device: torch.device) -> bool:
    return device.type in CAPTURES


class Graphs:
    """Stands in for a forward (ids, places, mask) -> logits; see `slots.Slots.__call__` for the shapes."""

    def __init__(self, forward: Callable[..., torch.Tensor], columns: int, device: torch.device) -> None:
        self.forward, self.columns = forward, columns
        self.capture, pool = CAPTURES[device.type]
        self.pool, self.uses, self.captured = pool(), Counter(), {}

    def __call__(self, ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = min(-(-mask.shape[-1] // COLUMNS) * COLUMNS, self.columns)
        given = (ids, places, F.pad(mask, (0, seen - mask.shape[-1])))
        shape = (*ids.shape, seen)
        self.uses[shape] += 1
        if self.uses[shape] <= EAGER:
            return self.forward(*given)
        if shape not in self.captured:
            kept = tuple(each.clone() for each in given)
            self.captured[shape] = kept, *self.capture(lambda: self.forward(*kept), self.pool)
        kept, replay, output = self.captured[shape]
        for old, new in zip(kept, given, strict=True):
            old.copy_(new)
        replay()
        return output.clone()  # the next run of this shape writes over it
