"""Fixtures of a small sample stage, and a trained pair."""

import pytest
from inside import train_pair
from sample_stage import folders, resolve  # noqa: F401


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The output folder of a trained toy pair, and both models' folders by role."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train_pair(folder)
