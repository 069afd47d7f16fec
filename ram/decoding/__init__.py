"""Decoding with a proposal and an aligner: `from ram.decoding import generate, PARParams`.

The public names load on first use, so that importing `ram.decoding.par` alone loads only torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ram.decoding.generation import Generation, generate, generate_iter
    from ram.decoding.par import PARParams

__all__ = ["Generation", "PARParams", "generate", "generate_iter"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "ram.decoding.par" if name == "PARParams" else "ram.decoding.generation"
    return getattr(importlib.import_module(module), name)
