"""From a configuration to stages: what each one runs with, reads and writes, checked before any model loads.

A recipe (config/experiment/*.yaml) names stages; each is the root configuration with some keys changed. A key
given on the command line applies to every stage, `stage.NAME.key=value` to one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ram.data.catalogue import local_file, parse_name
from ram.errors import UserError, nearest, pick
from ram.log import log
from ram.models import checkpoints, run_folder
from ram.settings.compose import all_keys, compose, group_keys, key_of, known_keys, leaves
from ram.settings.schema import Tables, check_keys, check_sampling, check_training, check_types, literal
from ram.storage.files import differences, how_to_get

STAGE_KEYS = {  # what a stage may say beside configuration keys, by kind
    "train": {"kind", "only_if", "init_from"},
    "sample": {"kind", "only_if", "proposal", "dataset"},
    "world": {"kind", "only_if"},
}
# Keys that change neither weights nor samples; all the others are a run's identity.
NOT_IDENTITY = set(
    [
        "data_dir",
        "output_dir",
        "report_dir",
        "report",
        "local_dirs",
        "experiment_name",
        "stage",
        "stages",
        "dry_run",
        "overwrite",
        "exp_name",
        "exp_prefix",
        "exp_flag",
        "debug",
        "n_eval_examples",
        "eval_batch_size",
        "activation_checkpointing",
        "packed",
        "compile",
        "trainer",
        "cpu_offload",
        "resume",
        "keep_states",
        "keep_steps",
        "trust_remote_code",
        "do_first_eval",
        "eval_every",
        "save_every",
        "sample_during_eval",
        "n_eval_model_samples",
        "wandb",
        "minimum_log_interval_secs",
        "fsdp_port",
        "divergence",
        "sampling",
        "evaluation",
        "judge",
        "pair",
        "world",
        "baselines",
        "hh_negatives",
        "hh_data",
    ]
)
# Where weights lie: their content counts instead.
LOCATION = set(
    [
        "model.name",
        "model.name_or_path",
        "model.hub_id",
        "model.archive",
        "model.tokenizer_name_or_path",
        "model.block_name",
    ]
)


@dataclass
class Stage:
    """One resolved stage. output: the run folder, the sampled file, or the toy world's data folder."""

    name: str
    kind: str
    config: DictConfig
    output: Path
    source: str | None = None  # the weights it starts from or samples with; None: fresh ones
    reads: list[Path] = field(default_factory=list)  # data files that must be there before it starts

    @property
    def weights(self) -> Path:
        """The finished weights of a training stage."""
        return self.output / run_folder.LATEST


# ---- resolving ---------------------------------------------------------------------------------------------


def stage_config(spec: dict[str, Any], name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of one stage: the recipe's, then the stage's keys, then what the user gave."""
    groups = [f"{group}={spec[group]}" for group in ("model", "loss") if group in spec]
    keys: dict[str, Any] = {}
    for key, value in spec.items():
        section = key.removesuffix("_settings")
        if section != key or key in ("sampling", "divergence", "wandb"):
            if not isinstance(value, dict):
                raise UserError(f"stage.{name}.{key}={value!r}: expected keys below it, as in {{key: value}}")
            keys |= {f"{section}.{inner}": v for inner, v in value.items()}
        elif key not in ("model", "loss", *STAGE_KEYS[spec["kind"]]):
            keys[key] = value
    own = {key: f"{key}={literal(value)}" for key, value in keys.items()}

    # `loss.alpha=` is meant for the stages whose loss has an alpha, and so on.
    usable = list(overrides)
    if any(key_of(o).startswith(("model.", "loss.")) for o in overrides):
        known = known_keys(tuple(o for o in overrides if key_of(o) == "experiment") + tuple(groups))
        usable = [o for o in overrides if not key_of(o).startswith(("model.", "loss.")) or key_of(o) in known]
    given = {key_of(o) for o in overrides}
    settings = {"model.": "model_settings.", "loss.": "loss_settings."}
    specific = []
    for key, override in own.items():
        inner = next((key.replace(g, s, 1) for g, s in settings.items() if key.startswith(g)), key)
        if f"stage.{name}.{inner}" in given:
            specific.append(override)
    return compose([*groups, *own.values(), *usable, *specific])


def resolve(overrides: Sequence[str], tables: Tables) -> list[Stage]:
    """All stages of a configuration in the recipe's order, each checked; without a recipe the one stage
    `run`.

    Raises UserError for anything that can be known to be wrong without loading a model or data.
    """
    config = compose(overrides)
    found = leaves(config)
    check_keys(found, all_keys())
    check_types(found, all_keys())
    if not config.stage:
        return [_stage("run", {"kind": "train"}, config, {}, tables)]
    for override in overrides:
        if (key := key_of(override)) in ("model", "loss"):
            raise UserError(
                f"{override}: a recipe has several stages; give stage.NAME.{key}=, pair.proposal= or "
                "pair.aligner= instead"
            )
    stages: dict[str, Stage] = {}
    for name, spec in OmegaConf.to_container(config.stage, resolve=True).items():
        if not isinstance(spec, dict) or "kind" not in spec:
            known = [
                key for key, other in config.stage.items() if OmegaConf.is_dict(other) and "kind" in other
            ]
            raise UserError(f"unknown stage {name!r}: {nearest(name, known)}")
        pick(STAGE_KEYS, spec["kind"], f"kind of stage.{name}")
        if not applies(spec, config):
            continue
        stages[name] = _stage(name, spec, stage_config(spec, name, overrides), stages, tables)
    return list(stages.values())


def applies(spec: dict[str, Any], config: DictConfig) -> bool:
    """Whether the keys that a stage or a system depends on have the values it wants."""
    return all(OmegaConf.select(config, key) == value for key, value in spec.get("only_if", {}).items())


def _stage(
    name: str, spec: dict[str, Any], config: DictConfig, earlier: dict[str, Stage], tables: Tables
) -> Stage:
    found = leaves(config)
    check_types(found, all_keys())
    kind, data_dir = spec["kind"], Path(config.data_dir)
    if kind == "world":
        return Stage(name, kind, config, data_dir)
    if kind == "sample":
        check_sampling(config.sampling)
        base, _, variant = parse_name(spec["dataset"], tables.datasets)
        if not tables.datasets[base].sampled or variant:
            raise UserError(f"stage.{name}: data set {spec['dataset']!r} is not one that proposals sample")
        source, label = model_source(spec["proposal"], earlier), spec["proposal"]
        if label in earlier:
            label = earlier[label].config.model.name
        output = local_file(f"{spec['dataset']}_{Path(label).name}", data_dir, tables.datasets)
        OmegaConf.update(config, "datasets", [spec["dataset"]])
        return Stage(name, kind, config, output, source, _files([spec["dataset"]], data_dir, tables))
    if spec.get("init_from"):
        OmegaConf.update(config, "model.archive", model_source(spec["init_from"], earlier))
    check_training(config, tables)
    for key in group_keys("loss", config.loss.name):
        if key not in found:
            raise UserError(
                f"{key} is not set, but loss.name={config.loss.name} needs it: choose a loss by "
                f"loss={config.loss.name}, which reads config/loss/{config.loss.name}.yaml"
            )
    model = config.model
    source = model.archive if model.archive or model.architecture else model.name_or_path or model.hub_id
    output = Path(config.output_dir) / "model" / run_name(config, tables)
    return Stage(name, kind, config, output, source, _files(config.datasets, data_dir, tables))


def model_source(reference: str, stages: dict[str, Stage]) -> str:
    """Where the weights of a stage of this recipe will lie, or the folder that was named."""
    if reference in stages:
        if stages[reference].kind != "train":
            raise UserError(f"stage {reference!r} trains no model")
        return str(stages[reference].weights)
    if "/" not in reference and not Path(reference).exists():
        raise UserError(f"{reference!r} is no earlier stage and no folder: {nearest(reference, stages)}")
    return reference


def _files(names: Sequence[str], data_dir: Path, tables: Tables) -> list[Path]:
    return [
        path for path in (local_file(name, data_dir, tables.datasets) for name in names) if path is not None
    ]


def run_name(config: DictConfig, tables: Tables) -> str:
    """The run folder's name: {prefix}{loss}_{data set}_{model}_b{batch}_lr{lr}[_a{alpha}][_@flag]."""
    if config.exp_name:
        return config.exp_name
    data = "+".join(parse_name(name, tables.datasets)[0] for name in config.datasets)
    name = f"{config.exp_prefix}{config.loss.name}_{data}_{config.model.name}"
    name += f"_b{config.batch_size}_lr{float(config.lr)}"
    if config.loss.get("alpha") is not None and float(config.loss.alpha) != 1e-4:
        name += f"_a{float(config.loss.alpha)}"
    return f"{name}_@{config.exp_flag}" if config.exp_flag else name


def identity(config: DictConfig) -> dict[str, Any]:
    """What makes two training runs the same run: every key but those that change no weight."""
    found = {key: value for key, value in leaves(config).items() if key.split(".")[0] not in NOT_IDENTITY}
    return {key: value for key, value in found.items() if key not in LOCATION}  # weights go by their content


# ---- checks ------------------------------------------------------------------------------------------------


def check_inputs(stages: Sequence[Stage], running: Sequence[Stage]) -> None:
    """Raises UserError where a stage to run needs a file or weights that neither exist nor come from one
    before it, or weights of a stage that was trained with other settings.
    """
    made: set[str] = set()
    for stage in running:
        for path in stage.reads:
            if not path.is_file() and str(path) not in made and str(path.parent.parent) not in made:
                raise UserError(
                    f"stage {stage.name!r} reads {path}, which is not there: {_maker(path, stages)}"
                )
        if stage.source and stage.source not in made:
            model = stage.config.model
            if model.archive or not model.architecture:
                checkpoints.find_model(stage.source, None if model.archive else model.hub_id, quiet=True)
            check_trained(stages, stage.source)
        made |= {str(stage.output), str(stage.weights)}


def check_trained(stages: Sequence[Stage], source: str, ignore: Sequence[str] = ()) -> None:
    """Raises UserError where `source` is a stage's weights and that run was trained with other settings.

    ignore: keys that may differ. Weights without a record of their training are taken as they are.
    """
    for stage in stages:
        if stage.kind != "train" or str(stage.weights) != source:
            continue
        done = run_folder.finished_run(stage.output)
        if done is None:  # LATEST appears when training ends: these weights were brought from elsewhere
            log.info(f"stage {stage.name}: {source} was not trained here and is used as it is")
            return
        now = identity(stage.config)
        before = {key: now.get(key) if key in ignore else value for key, value in done["settings"].items()}
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


def select(stages: Sequence[Stage], wanted: Sequence[str] | None) -> list[Stage]:
    """The stages to run, in the order that was asked for; all of them for None."""
    table = {stage.name: stage for stage in stages}
    return list(stages) if wanted is None else [pick(table, name, "stage") for name in wanted]
