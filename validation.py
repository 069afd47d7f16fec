"""What a configuration must be, checked before anything is loaded; every refusal is one line."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from losses import LOSSES
from par import PARParams
from preference_datasets import DATASETS, parse_name
from trainers import pick_trainer
from utils import UserError, pick, pick_dtype

# Types of the keys whose default is null, and keys that may be set to null though their default is not.
NULL_DEFAULTS = {
    "n_examples": int,
    "sampling.limit": int,
    "sampling.n_candidates": int,
    "sampling.expert_temperature": float,
    "exp_name": str,
    "exp_flag": str,
}
NULLABLE = {
    "divergence.min_sampled_logp_per_token",
    "save_every",
    "model.fsdp_policy_mp",
    "n_eval_examples",
    "n_epochs",
}


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{quoted}'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(literal(inner) for inner in value) + "]"
    return repr(value)


def check_types(found: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises UserError where a value is not of its default's type; both by dotted key (`recipes.leaves`)."""
    for key, value in found.items():
        default = defaults.get(key)
        wanted = NULL_DEFAULTS.get(key) or (type(default) if default is not None else None)
        if wanted not in (bool, int, float, str, list) or (value is None and _may_be_null(key, default)):
            continue
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if key == "warmup_steps":  # a count, or a share below 1
            fits = isinstance(value, int | float)
        if wanted is not bool and isinstance(value, bool) or not fits:
            raise UserError(f"{key}={value!r}: expected {wanted.__name__}, e.g. {key}={literal(default)}")


def _may_be_null(key: str, default: Any) -> bool:
    return default is None or key in NULLABLE


def check_training(config: DictConfig) -> None:
    """Raises UserError for a training configuration that cannot work."""
    pick_trainer(config.trainer)
    loss = pick(LOSSES, config.loss.name, "loss")
    optimizers = {
        n: c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
    }
    pick(optimizers, config.optimizer, "optimizer")
    pick({"constant": 0, "cosine": 0}, config.lr_schedule, "lr_schedule")
    pick_dtype(config.export_dtype, torch.device("cpu"))
    if OmegaConf.is_missing(config, "datasets") or not config.datasets:
        raise UserError(f"datasets is not set: give e.g. datasets=[hh]; known: {', '.join(sorted(DATASETS))}")
    for name in config.datasets:
        parse_name(name)
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
    if config.batch_size < 1 or config.batch_size % config.gradient_accumulation_steps:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps}: change one of them"
        )
    if config.n_examples is None and config.n_epochs is None:
        raise UserError("n_epochs and n_examples are both null: give one of them")
    for key in ("lr", "eval_every", "max_grad_norm", "eval_batch_size"):
        if config[key] <= 0:
            raise UserError(f"{key}={config[key]}: expected a number > 0")
    if loss.function is LOSSES["ours_sft"].function and not 0 <= config.loss.alpha <= 1:
        raise UserError(f"loss.alpha={config.loss.alpha}: expected a number in [0, 1]")


def check_sampling(sampling: DictConfig) -> PARParams:
    """The decoding settings as PARParams; raises UserError for lengths or values that cannot work."""
    if sampling.max_prompt_length >= sampling.max_length:
        raise UserError(
            f"sampling.max_prompt_length={sampling.max_prompt_length} leaves no room for an answer: "
            f"expected less than sampling.max_length={sampling.max_length}"
        )
    pick_dtype(sampling.dtype, torch.device("cpu"))
    return par_params(sampling)


def par_params(sampling: DictConfig | dict[str, Any]) -> PARParams:
    """The decoding settings as PARParams; raises UserError for a value out of range."""
    try:
        return PARParams(**{key: sampling[key] for key in PARParams.field_names()})
    except ValueError as error:
        raise UserError(f"sampling.{error}") from None
