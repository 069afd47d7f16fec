"""Compare the run names, identities and answer folders of a recipe with those of another checkout.

python tests/helpers/same_identities.py FILE    fail if they differ from the ones saved in FILE
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ram.evaluation.systems import resolve_systems
from ram.settings import compose, recipes
from ram.settings.schema import settings_of
from ram.storage.files import read_json
from utils import TABLES

RECIPE = ["experiment=demo"]


def identities() -> dict[str, dict[str, Any]]:
    """Return the identity of each training run by its folder, and the answer folder of each system."""
    stages = {stage.name: stage for stage in recipes.resolve(RECIPE, TABLES)}
    config = settings_of(compose.compose(RECIPE), TABLES)
    runs = {str(stage.output): recipes.identity(stage.config) for stage in stages.values()}
    folders = {}
    for task in config.evaluation.tasks:
        for name, system in resolve_systems(config, task, stages, set()).items():
            folders[f"{task}/{name}"] = str(system.folder)
    return {"runs": runs, "folders": folders}


def main(path: str) -> None:
    before, now = read_json(Path(path)), identities()
    assert now["folders"] == before["folders"]
    assert now["runs"].keys() == before["runs"].keys()
    for folder, identity in now["runs"].items():
        assert recipes.recorded_identity({"settings": before["runs"][folder]}, identity) == identity


if __name__ == "__main__":
    main(sys.argv[1])
