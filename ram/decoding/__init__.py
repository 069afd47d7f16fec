"""Decoding with a frozen proposal and a residual aligner.

The public names are resolved on first use, so that importing `ram.decoding.par` loads torch alone.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ram.decoding.generation import generate, generate_iter
    from ram.decoding.par import PARParams
    from ram.decoding.rows import Generation

__all__ = ["Generation", "PARParams", "generate", "generate_iter"]
MODULES = {"Generation": "rows", "PARParams": "par", "generate": "generation", "generate_iter": "generation"}


def __getattr__(name: str) -> object:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
