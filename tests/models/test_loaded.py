"""Models that systems share are loaded once, and leave the memory if nobody needs them."""

import gc
import weakref

import pytest
import torch

from ram.models import checkpoints
from ram.models.loaded import LoadedModels

CPU = torch.device("cpu")


@pytest.fixture
def loads(monkeypatch):
    """The sources that were loaded; every model is a module of its own."""
    sources = []

    def load_model(*source):
        sources.append(source[0])
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(checkpoints, "load_model", load_model)
    return sources


def test_common_models_are_loaded_once(loads):
    """Another role, type or device is another model: a role may change its model's memory layout."""
    models = LoadedModels()
    large = {"proposal": ("large", "auto", CPU)}
    first = models.load(large)
    pair = models.load(large | {"aligner": ("small", "auto", CPU)})
    assert loads == ["large", "small"] and pair["proposal"] is first["proposal"]
    models.load({"proposal": ("large", "float32", CPU), "aligner": ("small", "auto", CPU)})
    assert loads == ["large", "small", "large"]
    both = models.load({"proposal": ("small", "auto", CPU), "aligner": ("small", "auto", CPU)})
    assert loads[3:] == ["small"] and both["proposal"] is not both["aligner"]


def test_unwanted_models_are_freed_before_others_load(loads):
    """Two large models never need memory at once."""
    models = LoadedModels()
    gone = weakref.ref(models.load({"proposal": ("a", "auto", CPU)})["proposal"])
    original, alive = checkpoints.load_model, []

    def load_model(*source):
        gc.collect()
        alive.append(gone() is not None)
        return original(*source)

    checkpoints.load_model = load_model  # the fixture's patch is undone after the test
    models.load({"proposal": ("b", "auto", CPU)})
    assert alive == [False]
    last = weakref.ref(models.load({"proposal": ("b", "auto", CPU)})["proposal"])
    models.drop()
    gc.collect()
    assert last() is None and loads == ["a", "b"]
