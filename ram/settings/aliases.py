"""Names that other programs have for keys of config.yaml and serve.yaml, for the hints of refusals."""

import re
from collections.abc import Iterable

from ram.errors import nearest

# Their name -> our keys; the first that a configuration has is meant.
ALIASES = {
    "learning_rate": ["lr"],
    "num_train_epochs": ["n_epochs"],
    "epochs": ["n_epochs"],
    "max_steps": ["n_examples"],
    "per_device_train_batch_size": ["batch_size"],
    "train_batch_size": ["batch_size"],
    "per_device_eval_batch_size": ["eval_batch_size"],
    "gradient_checkpointing": ["activation_checkpointing"],
    "lr_scheduler_type": ["lr_schedule"],
    "lr_scheduler": ["lr_schedule"],
    "warmup_ratio": ["warmup_steps"],
    "optim": ["optimizer"],
    "max_seq_length": ["max_length"],
    "max_seq_len": ["max_length"],
    "max_model_len": ["limits.max_length"],
    "eval_steps": ["eval_every"],
    "save_steps": ["save_every"],
    "save_total_limit": ["keep_steps"],
    "logging_steps": ["minimum_log_interval_secs"],
    "resume_from_checkpoint": ["resume"],
    "run_name": ["exp_name"],
    "report_to": ["wandb.enabled"],
    "torch_compile": ["compile"],
    "bf16": ["model.fsdp_policy_mp", "dtype"],
    "dataset": ["datasets"],
    "dataset_name": ["datasets"],
    "model_name_or_path": ["model.name_or_path", "proposal"],
    "model_name": ["model.name_or_path", "proposal"],
    "beta": ["loss.beta"],
    "alpha": ["loss.alpha"],
    "temperature": ["sampling.temperature"],
    "top_p": ["sampling.top_p"],
    "top_k": ["sampling.top_k"],
    "repetition_penalty": ["sampling.repetition_penalty"],
    "sample_mode": ["sampling.sample_mode"],
    "div_threshold": ["sampling.div_threshold"],
    "model": ["proposal"],
    "base_model": ["proposal", "model.name_or_path"],
    "adapter": ["aligner"],
    "lora_modules": ["aligners"],
    "api_key": ["key_env"],
    "max_tokens": ["max_new_tokens", "max_length"],
    "max_num_seqs": ["engine.max_rows"],
    "device": ["proposal_device", "sampling.proposal_device"],
    "quiet": ["console"],
    "verbose": ["console"],
    "dry": ["dry_run"],
}
HYDRA_FLAGS = re.compile(
    r"-[hmcpri]$|-(sc|cp|cn|cd)$|--(help|hydra-help|version|cfg|resolve|package|run|multirun|shell-completion|"
    r"config-path|config-name|config-dir|experimental-rerun|info)\b"
)


def hint(key: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown key: the key that is meant by another program's name, or the nearest."""
    known = list(known)
    for ours in ALIASES.get(key, []):
        if ours in known:
            return f"did you mean {ours!r}?"
    return nearest(key, known)


def as_override(flag: str, following: str | None, known: Iterable[str]) -> str:
    """Return how an argument such as `--experiment demo` is written here.

    Args:
        flag: the argument, which begins with a dash.
        following: the argument after it, None if there is none.
        known: all keys.
    """
    name, equals, value = flag.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not equals:
        is_value = following is not None and not following.startswith("-") and "=" not in following
        value = following if is_value and following else "VALUE"
    known = list(known)
    key = name if name in known else next((k for k in ALIASES.get(name, []) if k in known), None)
    if key is None:
        return f"{flag}: keys are written key=value, without dashes; {hint(name, known)}"
    return f"{flag}: write {key}={value}, without dashes"
