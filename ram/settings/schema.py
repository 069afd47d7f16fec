"""What a configuration must be, checked before anything is loaded; every refusal is one line."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ram.data.catalogue import Source, parse_name
from ram.decoding.par import PARParams
from ram.errors import UserError, nearest, pick

SECTIONS = ("model", "loss", "judge", "divergence", "wandb", "sampling", "sampling.endpoint", "evaluation")
SECTIONS += ("engine", "limits", "worker")  # of serve.yaml
OPEN = ("stage", "world", "pair", "hh_negatives", "hh_data", "experiment")  # a recipe's own: any keys inside
OPEN_INSIDE = ("model.architecture.", "evaluation.tasks.", "evaluation.systems.", "evaluation.paper.")
OPEN_INSIDE += ("evaluation.ablation.",)
# Types of the keys whose default is null, and keys that may be set to null though their default is not.
NULL_DEFAULTS = {
    "stages": list,
    "report": str,
    "datasets": list,
    "n_examples": int,
    "keep_steps": int,
    "exp_name": str,
    "exp_flag": str,
    "model.name_or_path": str,
    "model.hub_id": str,
    "model.tokenizer_name_or_path": str,
    "model.archive": str,
    "wandb.entity": str,
    "sampling.limit": int,
    "sampling.n_candidates": int,
    "sampling.expert_temperature": float,
    "sampling.system_key": str,
    "sampling.generator": str,
    "sampling.tokenizer_path": str,
    "sampling.drafter": str,
    "sampling.endpoint.model": str,
    "judge.model": str,
    "judge.criterion": str,
    "judge.hub_id": str,
    "judge.input_price": float,
    "judge.output_price": float,
    "judge.max_price": float,
    "evaluation.dataset": str,
    # serve.yaml
    "proposal": str,
    "aligner": str,
    "add_bos": bool,
    "aligner_root": str,
    "seed": int,
    "limits.max_length": int,
    "worker.address": str,
}
NULLABLE = {
    "divergence.min_sampled_logp_per_token",
    "save_every",
    "model.fsdp_policy_mp",
    "n_eval_examples",
    "n_epochs",
    "sampling.stop_str",
    "judge.model",
    "judge.max_requests",
    "judge.input_price",
    "judge.output_price",
    "judge.max_price",
}
# What a number may be, in interval notation; the law's own settings are checked by PARParams.
INTERVALS = {
    "seed": "[0, inf)",
    "max_length": "[2, inf)",
    "max_prompt_length": "[1, inf)",
    "heldout_fraction": "[0, 1)",
    "n_epochs": "[1, inf)",
    "n_examples": "[1, inf)",
    "n_eval_examples": "[0, inf)",
    "batch_size": "[1, inf)",
    "eval_batch_size": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "lr": "(0, inf)",
    "warmup_steps": "[0, inf)",
    "max_grad_norm": "(0, inf)",
    "eval_every": "[1, inf)",
    "save_every": "[1, inf)",
    "keep_steps": "[1, inf)",
    "keep_states": "[1, inf)",
    "n_eval_model_samples": "[0, inf)",
    "minimum_log_interval_secs": "[0, inf)",
    "loss.alpha": "[0, 1]",
    "loss.sampled_fraction": "(0, 1]",
    "loss.beta": "(0, inf)",
    "loss.label_smoothing": "[0, 0.5)",
    "sampling.max_length": "[2, inf)",
    "sampling.max_prompt_length": "[1, inf)",
    "sampling.batch_size": "[1, inf)",
    "sampling.limit": "[1, inf)",
    "sampling.endpoint.concurrency": "[1, inf)",
    "sampling.endpoint.retries": "[0, inf)",
    "sampling.endpoint.timeout": "(0, inf)",
    "judge.concurrency": "[1, inf)",
    "judge.retries": "[0, inf)",
    "judge.timeout": "(0, inf)",
    "judge.max_requests": "[1, inf)",
    "judge.input_price": "[0, inf)",
    "judge.output_price": "[0, inf)",
    "judge.max_price": "(0, inf)",
    "judge.max_length": "[1, inf)",
    "judge.batch_size": "[1, inf)",
    "evaluation.bootstrap": "[1, inf)",
    "evaluation.verify_rows": "[0, inf)",
    "evaluation.examples": "[0, inf)",
    # serve.yaml
    "port": "[0, 65535]",
    "shutdown_seconds": "[0, inf)",
    "max_new_tokens": "[1, inf)",
    "engine.max_rows": "[1, inf)",
    "engine.max_tokens": "[2, inf)",
    "engine.max_waiting": "[1, inf)",
    "limits.max_length": "[2, inf)",
    "limits.choices": "[1, inf)",
    "limits.body_bytes": "[1, inf)",
    "limits.body_seconds": "(0, inf)",
    "limits.seconds": "(0, inf)",
    "limits.aligners": "[1, inf)",
}
DTYPES = ("auto", "float32", "bfloat16")
CHOICES = {
    "lr_schedule": ("constant", "cosine"),
    "on_bad_row": ("error", "skip"),
    "export_dtype": ("float32", "bfloat16"),
    "model.fsdp_policy_mp": DTYPES,
    "model.reference_dtype": DTYPES,
    "sampling.dtype": DTYPES,
    "sampling.backend": ("local", "endpoint"),
    "sampling.endpoint.send": ("ids", "text"),
    "judge.dtype": DTYPES,
    "dtype": DTYPES,
    "judge.criterion": ("helpful", "harmless", "summary"),
    "wandb.mode": ("offline", "online"),
}
FOLDER_NAMES = ("exp_name", "exp_prefix", "exp_flag", "model.name", "experiment_name")


@dataclass(frozen=True)
class Tables:
    """Names that the files above this package define: data sets, losses, trainers, optimizers."""

    datasets: Mapping[str, Source]
    losses: Mapping[str, Any]
    pick_trainer: Callable[[str], Any]
    pick_optimizer: Callable[[str], Any]


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):  # a backslash is itself there, unless quotes follow it
        quoted = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
        return "'" + re.sub(r"\\+$", lambda m: m[0] * 2, quoted) + "'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(literal(inner) for inner in value) + "]"
    return repr(value)


def check_keys(found: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for a dotted key that a YAML file sets and nothing reads."""
    known = set(known)
    for key in found:
        if (
            key not in {*known, *SECTIONS}
            and key.split(".")[0] not in OPEN
            and not key.startswith(OPEN_INSIDE)
        ):
            raise UserError(f"unknown key {key!r} in a file of config/: {nearest(key, known)}")


def check_types(found: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises UserError where a value is not of its default's type or out of its range.

    Both by dotted key (`configs.leaves`).
    """
    for key, value in found.items():
        if key in SECTIONS:
            raise UserError(f"{key}={value!r}: expected keys below it, e.g. {_example(key, defaults)}")
        default = defaults.get(key)
        wanted = NULL_DEFAULTS.get(key) or (type(default) if default is not None else None)
        if wanted not in (bool, int, float, str, list):
            continue
        if value is None:
            if default is not None and key not in NULLABLE:
                raise UserError(f"{key}=null: expected {wanted.__name__}, e.g. {key}={literal(default)}")
            continue
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if key == "warmup_steps":  # a count, or a share below 1
            fits = isinstance(value, int | float)
        if wanted is not bool and isinstance(value, bool) or not fits:
            example = f"[{value}]" if wanted is list else literal(default)
            raise UserError(f"{key}={value!r}: expected {wanted.__name__}, e.g. {key}={example}")
        if wanted is list and (wrong := [item for item in value if not isinstance(item, str)]):
            raise UserError(f"{key}={value!r}: expected a list of names, but {wrong[0]!r} is none")
        _check_value(key, value)


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value) and key != "sampling.div_threshold":
        raise UserError(f"{key}={value}: expected a finite number")
    if key in INTERVALS:
        low, high = INTERVALS[key][1:-1].split(", ")
        above = value > float(low) or (value == float(low) and INTERVALS[key][0] == "[")
        below = value < float(high) or (value == float(high) and INTERVALS[key][-1] == "]")
        if not (above and below):
            raise UserError(f"{key}={value}: expected a number in {INTERVALS[key]}")
    if key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{key}={value!r}: expected one of {', '.join(CHOICES[key])}")
    if key in FOLDER_NAMES and value and (Path(value).name != value or value in (".", "..")):
        raise UserError(f"{key}={value!r}: expected a name that a folder can have, without '/'")


def _example(section: str, defaults: dict[str, Any]) -> str:
    key = next((key for key in defaults if key.startswith(f"{section}.")), section)
    return f"{key}={literal(defaults[key])}"


def check_training(config: DictConfig, tables: Tables) -> None:
    """Raises UserError for a training configuration that cannot work."""
    tables.pick_trainer(config.trainer)
    pick(tables.losses, config.loss.name, "loss")
    tables.pick_optimizer(config.optimizer)
    if OmegaConf.is_missing(config, "datasets") or not config.datasets:
        raise UserError(
            f"datasets is not set: give e.g. datasets=[hh]; known: {', '.join(sorted(tables.datasets))}"
        )
    for name in config.datasets:
        parse_name(name, tables.datasets)
    if not (
        config.model.name_or_path or config.model.hub_id or config.model.archive or config.model.architecture
    ):
        raise UserError("no model: give model=NAME (config/model/*.yaml), or model.name_or_path=FOLDER")
    if config.model.policy_dtype != "float32":
        raise UserError(
            f"model.policy_dtype={config.model.policy_dtype}: only float32; narrower weights do not move at "
            "small learning rates (model.fsdp_policy_mp sets what the forward pass computes in)"
        )
    if config.max_prompt_length >= config.max_length:
        raise UserError(
            f"max_prompt_length={config.max_prompt_length} leaves no room for an answer: "
            f"expected less than max_length={config.max_length}"
        )
    if config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}: change one of them"
        )
    if config.n_examples is None and config.n_epochs is None:
        raise UserError("n_epochs and n_examples are both null: give one of them")
    if config.sample_during_eval:
        check_sampling(config.sampling)


def check_sampling(sampling: DictConfig) -> PARParams:
    """The decoding settings as PARParams; raises UserError for lengths or values that cannot work."""
    if sampling.max_prompt_length >= sampling.max_length:
        raise UserError(
            f"sampling.max_prompt_length={sampling.max_prompt_length} leaves no room for an answer: "
            f"expected less than sampling.max_length={sampling.max_length}"
        )
    if sampling.backend == "endpoint" and not sampling.endpoint.urls:
        raise UserError(
            "sampling.backend=endpoint: give the servers, e.g. "
            "sampling.endpoint.urls=[http://localhost:8000/v1]"
        )
    return par_params(sampling)


def par_params(sampling: DictConfig | dict[str, Any]) -> PARParams:
    """The decoding settings as PARParams; raises UserError for a value out of range."""
    try:
        return PARParams(**{key: sampling[key] for key in PARParams.field_names()})
    except ValueError as error:
        raise UserError(f"sampling.{error}") from None
