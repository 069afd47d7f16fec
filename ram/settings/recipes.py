"""Resolve a configuration into stages with their settings, inputs and outputs, before any model loads.

A recipe (config/experiment/*.yaml) names stages. Each is the root configuration with some keys changed. A key
on the command line applies to every stage, `stage.NAME.key=value` to one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ram.data.catalogue import local_file, parse_name, short_name, source_of
from ram.data.prompts import CHAT
from ram.errors import UserError, nearest, pick
from ram.log import log
from ram.models import checkpoints, run_folder
from ram.settings.compose import GROUPS, compose, has_key, key_of, leaves, set_overrides, set_values
from ram.settings.overrides import check_names, check_used, keys_given
from ram.settings.schema import (
    INTRODUCED,
    OMITTED,
    Settings,
    Tables,
    check_sampling,
    check_training,
    decisive,
    settings_of,
)
from ram.storage.files import differences, how_to_get
from ram.storage.provenance import completed

STAGE_KEYS = {  # keys of a stage that are not keys of config.yaml, by kind
    "train": {"kind", "only_if", "otherwise", "init_from", "samples"},
    "sample": {"kind", "only_if", "proposal", "dataset"},
    "world": {"kind", "only_if"},
}


@dataclass
class Stage:
    """One resolved stage.

    Attributes:
        name: its name in the recipe.
        kind: a key of STAGE_KEYS; or "given", a training stage that is left out: its model is used as it is.
        config: its settings.
        output: the run folder, the sampled file, or the toy data set's folder.
        source: the weights that it starts from or samples with, None for a model made from scratch.
        reads: data files that must exist before it starts.
        proposal: the weights of the frozen proposal, if the loss needs one.
        sampled: the data set that a sample stage makes.
    """

    name: str
    kind: str
    config: Settings
    output: Path
    source: str | None = None
    reads: list[Path] = field(default_factory=list)
    proposal: str | None = None
    sampled: str | None = None

    @property
    def weights(self) -> Path:
        """The folder of a training stage's finished weights."""
        return self.output if self.kind == "given" else self.output / run_folder.LATEST


# ---- resolving ---------------------------------------------------------------------------------------------


def stage_config(spec: dict[str, Any], name: str, overrides: Sequence[str]) -> DictConfig:
    """Return a stage's configuration: the recipe's keys, then the stage's, then the command line's."""
    groups = [f"loss={spec['loss']}"] if "loss" in spec else []
    values: dict[str, Any] = {}
    if "model" in spec:
        file, values = model_choice(spec["model"], name)
        groups.insert(0, f"model={file}")
    for key, value in spec.items():
        section = key.removesuffix("_settings")
        if section != key or key in ("sampling", "divergence", "wandb"):
            if not isinstance(value, dict):
                raise UserError(f"stage.{name}.{key}={value!r}: expected keys below it, as in {{key: value}}")
            values |= {f"{section}.{inner}": inner_value for inner, inner_value in value.items()}
        elif key not in ("model", "loss", *STAGE_KEYS[spec["kind"]]):
            values[key] = value

    # A key such as `loss.alpha` changes the stages whose loss has it.
    chosen = [override for override in overrides if key_of(override) in GROUPS]
    files = compose([*groups, *chosen])
    overrides = [
        override
        for override in overrides
        if not key_of(override).startswith(("model.", "loss.")) or has_key(files, key_of(override))
    ]
    config = compose([*groups, *overrides])
    set_values(config, values)
    set_overrides(config, overrides)
    given = {key_of(override) for override in overrides}
    given |= {key for _, keys in keys_given(overrides) for key in keys}  # those below a dict, too
    set_values(
        config, {key: value for key, value in values.items() if f"stage.{name}.{in_stage(key)}" in given}
    )
    return config


def model_choice(reference: str | None, stage: str) -> tuple[str, dict[str, Any]]:
    """Return the file of config/model that a stage's model is made from, and the keys to change in it.

    Args:
        reference: a name of config/model, a folder of a model or a run, or a hub id ORG/NAME.
        stage: for messages.
    """
    if reference is None:
        raise UserError(
            f"stage {stage!r} has no model: give pair.proposal and pair.aligner, each a folder, a hub id or "
            "a name of config/model"
        )
    if Path(reference).is_dir():
        folder = run_folder.find_served(reference)
        return "blank_model", {"model.name": label_of(folder), "model.name_or_path": folder}
    if run_folder.is_hub_id(reference):
        return "blank_model", {"model.name": Path(reference).name, "model.hub_id": reference}
    return reference, {}


def label_of(reference: str) -> str:
    """Return what a model is called: its folder's name, that of its run, or the last part of a hub id."""
    folder = Path(reference).absolute() if Path(reference).is_dir() else Path(reference)
    is_in_run = folder.name == run_folder.LATEST or folder.name.startswith("step-")
    return folder.parent.name if is_in_run else folder.name


def in_stage(key: str) -> str:
    """Return how a stage of a recipe spells a key: `loss.alpha` -> `loss_settings.alpha`."""
    return re.sub(r"^(model|loss)\.", r"\1_settings.", key)


def resolve(overrides: Sequence[str], tables: Tables) -> list[Stage]:
    """Return the stages of a configuration in the recipe's order; without a recipe the one stage `run`.

    Raises:
        UserError: something is wrong that can be known without loading a model or data.
    """
    composed = compose(overrides)
    config = settings_of(composed, tables)
    systems = config.evaluation.systems
    check_names(config)
    used = {name: spec for name, spec in systems.items() if applies(spec, config)}
    if not config.stage:
        stage = _stage("run", {"kind": "train"}, composed, {}, tables)
        check_used(overrides, config, {"run": stage}, used)
        return [stage]
    for override in overrides:
        if (key := key_of(override)) in ("model", "loss"):
            raise UserError(
                f"{override}: a recipe has several stages; give stage.NAME.{key}=, pair.proposal= or "
                "pair.aligner= instead"
            )
    stages: dict[str, Stage] = {}
    for name, spec in config.stage.items():
        if not isinstance(spec, dict) or "kind" not in spec:
            known = [
                key for key, other in config.stage.items() if isinstance(other, dict) and "kind" in other
            ]
            raise UserError(f"unknown stage {name!r}: {nearest(name, known)}")
        pick(STAGE_KEYS, spec["kind"], f"kind of stage.{name}")
        if not applies(spec, config):
            if spec.get("otherwise") == "given":
                stages[name] = _given(name, spec, overrides, tables)
            continue
        stages[name] = _stage(name, spec, stage_config(spec, name, overrides), stages, tables)
    check_used(overrides, config, stages, used)
    return list(stages.values())


def applies(spec: dict[str, Any], config: Settings) -> bool:
    """Return whether the keys that a stage or a system depends on have the values in its `only_if`."""
    return all(value_of(config, key) == value for key, value in spec.get("only_if", {}).items())


def value_of(config: Settings, key: str) -> Any:
    """Return the value of a dotted key, None if there is no such key."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def _stage(
    name: str, spec: dict[str, Any], composed: DictConfig, earlier: dict[str, Stage], tables: Tables
) -> Stage:
    """Return a stage, checked; `earlier`: the stages before it, by name."""
    kind, samples = spec["kind"], earlier.get(spec.get("samples", ""))
    if kind == "sample" and spec.get("dataset"):
        set_values(composed, {"datasets": [spec["dataset"]]})
    elif samples is not None:
        set_values(composed, {"datasets": [samples.sampled]})
    if kind == "train" and spec.get("init_from"):
        set_values(composed, {"model.archive": model_source(spec["init_from"], earlier)})
    config = settings_of(composed, tables)
    data_dir = Path(config.data_dir)
    if kind == "world":
        return Stage(name, kind, config, data_dir)
    if kind == "sample":
        check_sampling(config.sampling)
        template, of_sampling = config.template, config.sampling.template
        if CHAT in (template, of_sampling) and template != of_sampling:
            raise UserError(
                f"stage.{name}: template={template}, but sampling.template={of_sampling}: expected the same; "
                "leave sampling.template out"
            )
        if len(config.datasets) != 1:
            raise UserError(
                f"stage.{name}: datasets={config.datasets}: expected one to sample answers to, e.g. "
                "datasets=[path/to/file.jsonl]"
            )
        dataset = config.datasets[0]
        base, _, variant = parse_name(dataset, tables.datasets)
        if not source_of(base, tables.datasets).sampled or variant:
            raise UserError(f"stage.{name}: data set {dataset!r} is not one that proposals sample")
        source, label = model_source(spec["proposal"], earlier), spec["proposal"]
        label = earlier[label].config.model.name if label in earlier else label
        sampled = f"{dataset}_{label_of(label)}"
        output = local_file(sampled, data_dir, tables.datasets)
        assert output is not None  # only sampled data sets get here, and their files are local
        reads = _files([dataset], data_dir, tables)
        return Stage(name, kind, config, output, source, reads, sampled=sampled)
    check_training(config, tables)
    model = config.model
    source = model.archive if model.archive or model.architecture else model.name_or_path or model.hub_id
    output = Path(config.output_dir) / "model" / run_name(config, tables)
    proposal = None
    if tables.losses[config.loss.name].needs_proposal:
        if config.proposal is None:
            raise UserError(
                f"stage {name!r}: loss={config.loss.name} needs the proposal: give "
                f"{'' if name == 'run' else f'stage.{name}.'}proposal=FOLDER (or a stage's name)"
            )
        proposal = model_source(config.proposal, earlier)
    return Stage(name, kind, config, output, source, _files(config.datasets, data_dir, tables), proposal)


def _given(name: str, spec: dict[str, Any], overrides: Sequence[str], tables: Tables) -> Stage:
    """Return a stage that stands for the model that it would start from, unless its `only_if` holds."""
    config = settings_of(stage_config(spec, name, overrides), tables)
    folder = config.model.name_or_path
    if not folder or not Path(folder).is_dir():
        raise UserError(
            f"stage {name!r} is left out, so its model is used as it is: expected a folder, not "
            f"{folder or config.model.hub_id!r}; download it first (hf download), or let the stage run"
        )
    return Stage(name, "given", config, Path(folder), folder)


def model_source(reference: str, stages: dict[str, Stage]) -> str:
    """Return the folder of a stage's weights, or the reference itself if it names a folder."""
    if reference in stages:
        if stages[reference].kind not in ("train", "given"):
            raise UserError(f"stage {reference!r} trains no model")
        return str(stages[reference].weights)
    if "/" not in reference and not Path(reference).exists():
        raise UserError(
            f"{reference!r} is neither an earlier stage nor a folder: {nearest(reference, stages)}"
        )
    return reference


def _files(names: Sequence[str], data_dir: Path, tables: Tables) -> list[Path]:
    return [
        path for path in (local_file(name, data_dir, tables.datasets) for name in names) if path is not None
    ]


def run_name(config: Settings, tables: Tables) -> str:
    """Return a run's name.

    It is {prefix}{loss}_{data set}_{model}_b{batch}_lr{lr}[_a{alpha}][_e{exponent}][_lora{r}][_@flag].
    """
    if config.exp_name:
        return config.exp_name
    data = "+".join(short_name(parse_name(name, tables.datasets)[0]) for name in config.datasets)
    name = f"{config.exp_prefix}{config.loss.name}_{data}_{config.model.name}"
    name += f"_b{config.batch_size}_lr{float(config.lr)}"
    alpha = getattr(config.loss, "alpha", None)
    if alpha is not None and float(alpha) != 1e-4:
        name += f"_a{float(alpha)}"
    if (exponent := getattr(config.loss, "exponent", 1.0)) != 1.0:
        name += f"_e{float(exponent)}"
    if config.lora is not None:
        name += f"_lora{config.lora.r}"
    return f"{name}_@{config.exp_flag}" if config.exp_flag else name


def identity(config: Settings) -> dict[str, Any]:
    """Return what makes two training runs the same: dotted key -> value of each key that decides weights."""
    values = leaves(decisive(config))
    if config.early_stopping is not None:  # otherwise these only watch a run
        watched = ("eval_every", "save_every", "n_eval_examples")
        values |= {key: getattr(config, key) for key in watched}
    return {key: value for key, value in values.items() if key not in OMITTED or OMITTED[key] != value}


def recorded_identity(record: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in a finished run's record, completed by keys that are younger than the record.

    Args:
        record: the run's DONE file.
        current: the identity to compare it with.
    """
    return completed(record["settings"], current, INTRODUCED)


# ---- checks ------------------------------------------------------------------------------------------------


def check_inputs(stages: Sequence[Stage], running: Sequence[Stage]) -> None:
    """Check that the inputs of the stages to run exist or are made by an earlier one of them.

    Args:
        stages: all stages of the recipe.
        running: those to run, in order.

    Raises:
        UserError: a file or weights are missing, or the weights were trained with other settings.
    """
    made: set[str] = set()
    for stage in running:
        for path in stage.reads:
            if not path.is_file() and str(path) not in made and str(path.parent.parent) not in made:
                raise UserError(
                    f"stage {stage.name!r} reads {path}, which does not exist: {_maker(path, stages)}"
                )
        if stage.proposal and stage.proposal not in made:
            checkpoints.find_model(stage.proposal, quiet=True)
            check_trained(stages, stage.proposal)
        if stage.source and stage.source not in made:
            model = stage.config.model
            if model.archive or not model.architecture:
                checkpoints.find_model(stage.source, None if model.archive else model.hub_id, quiet=True)
            check_trained(stages, stage.source)
        made |= {str(stage.output), str(stage.weights)}


def check_trained(stages: Sequence[Stage], source: str, ignore: Sequence[str] = ()) -> None:
    """Check that weights of a stage were trained with its present settings.

    Weights without a record of their training are accepted as they are.

    Args:
        stages: all stages of the recipe.
        source: a folder of weights; any folder that is not a stage's is accepted.
        ignore: keys that may differ.

    Raises:
        UserError: the run in the stage's folder was trained with other settings.
    """
    for stage in stages:
        if stage.kind != "train" or str(stage.weights) != source:
            continue
        done = run_folder.finished_run(stage.output)
        if done is None:  # a run writes LATEST and its record together: these weights are from elsewhere
            log.info(f"stage {stage.name}: {source} was not trained here and is used as it is")
            return
        now = identity(stage.config)
        recorded = recorded_identity(done, now)
        before = {key: now.get(key) if key in ignore else value for key, value in recorded.items()}
        if changed := differences(before, now):
            raise UserError(
                f"stage {stage.name!r}: {stage.output} was trained with other settings ({changed}); give "
                f"those it was trained with, or train it again (stages=[{stage.name}] overwrite=true)"
            )
        run_folder.check_finished(stage.output, done)


def _maker(path: Path, stages: Sequence[Stage]) -> str:
    makers = [
        s.name for s in stages if s.output == path or (s.kind == "world" and path.is_relative_to(s.output))
    ]
    if makers:
        return f"run stage {makers[0]!r} first (stages=[{makers[0]}])"
    return how_to_get(path)


def select(stages: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    """Return the stages to run, in the order of `names`, or all of them if that is None."""
    table = {stage.name: stage for stage in stages}
    return list(stages) if names is None else [pick(table, name, "stage") for name in names]
