"""Models that stay in memory while the next user needs them too."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ram.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Source = tuple[str, str, torch.device]  # folder or hub id, dtype, device


class LoadedModels:
    """The models of the latest call of `load`. Systems with a common model load it once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, Source], PreTrainedModel] = {}

    def load(self, wanted: Mapping[str, Source]) -> "dict[str, PreTrainedModel]":
        """Return models by role; first drop all that are loaded but not wanted.

        Raises:
            UserError: if a model cannot be loaded.
        """
        for key in self._models.keys() - wanted.items():
            del self._models[key]
        for role, source in wanted.items():
            if (role, source) not in self._models:
                self._models[role, source] = checkpoints.load_model(*source)
        return {role: self._models[role, source] for role, source in wanted.items()}

    def drop(self) -> None:
        """Free the memory."""
        self._models.clear()
