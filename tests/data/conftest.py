"""Fixtures of the tests of ram/data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ram.data import prepare as prepare_data


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def prepare(data_dir: Path) -> Callable[..., None]:
    """Run `python -m ram.data.prepare ARGUMENTS` in this process, with files below `data_dir`."""
    return lambda *arguments: prepare_data.main([*map(str, arguments), "--data-dir", str(data_dir)])
