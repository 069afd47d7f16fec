"""The models and settings that a recipe's pairs are served with: `serve.py experiment=NAME`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ram.errors import UserError
from ram.settings import compose, recipes
from ram.settings.overrides import ROLES
from ram.settings.schema import Tables, merged, settings_of


def of_recipe(overrides: Sequence[str], tables: Tables) -> dict[str, Any]:
    """Return dotted keys of serve.yaml with their values.

    The proposal is that of the recipe's first pair, which also gives the settings of decoding. Every aligner
    that some pair joins to this proposal is served under its stage's name, if it is trained.

    Args:
        overrides: `experiment=NAME` and keys of the recipe, as train.py and pipeline.py take them.
        tables: names that the files at the top define.

    Raises:
        UserError: the recipe has no pair, or the proposal is not trained.
    """
    overrides = compose.preflight(overrides)
    config = settings_of(compose.compose(overrides), tables)
    stages = {stage.name: stage for stage in recipes.resolve(overrides, tables)}
    systems = [spec for spec in config.evaluation.systems.values() if recipes.applies(spec, config)]
    pairs = [spec for spec in systems if spec.get("proposal") and spec.get("aligner")]
    if not pairs:
        raise UserError(f"experiment={config.experiment_name} has no pair of a proposal and an aligner")
    first = pairs[0]
    proposal = recipes.model_source(first["proposal"], stages)
    roles = [spec["aligner"] for spec in pairs if spec["proposal"] == first["proposal"]]
    folders = {role: recipes.model_source(role, stages) for role in dict.fromkeys(roles)}
    aligners = {
        re.sub(r"[^A-Za-z0-9._-]", "-", role)[-64:]: folder
        for role, folder in folders.items()
        if Path(folder).is_dir()
    }
    if not (Path(proposal).is_dir() and aligners):
        missing = proposal if not Path(proposal).is_dir() else next(iter(folders.values()))
        raise UserError(
            f"experiment={config.experiment_name}: no model at {missing}; train it first with the same keys, "
            f"`python train.py {' '.join(overrides)}`"
        )
    by_task = next(iter(config.evaluation.tasks.values()), {})
    own = {key: value for key, value in first.items() if key not in ROLES}
    sampling = merged(config.sampling, by_task, own)
    values: dict[str, Any] = {f"sampling.{key}": value for key, value in vars(sampling.params).items()}
    return values | {
        "proposal": proposal,
        "aligners": aligners,
        "template": sampling.template,
        "max_new_tokens": sampling.max_length - sampling.max_prompt_length,
    }
