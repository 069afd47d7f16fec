"""The keys of config/config.yaml: types, ranges, choices, and which of them decide a run's identity.

Defaults and explanations are in the YAML files. The settings of a loss or a judge are declared beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig
from pydantic import InstanceOf

from ram.data.catalogue import Source, parse_name
from ram.data.prompts import TEMPLATE
from ram.decoding.par import PARParams
from ram.errors import UserError, pick
from ram.models.lora import LoraSettings
from ram.settings.checks import (
    Count,
    CountOrZero,
    Dtype,
    FolderName,
    Length,
    NotNegative,
    Positive,
    Section,
    check,
    interval,
    nested,
)
from ram.settings.compose import resolved

T = TypeVar("T")
NO_EFFECT = "changes neither weights nor samples"
Neutral = Annotated[T, NO_EFFECT]  # a key that is not part of a run's identity
# Other keys that are younger than finished runs, with the value that those were trained with.
INTRODUCED: dict[str, Any] = {
    "loss.sampled_fraction": 1.0,
}
# Keys that are younger than all records. At this value an identity leaves them out, so it stays the same.
OMITTED: dict[str, Any] = {
    "dropout": "none",
    "last_batch": "whole",
    "weight_decay": None,
    "lora": None,
    "loss.exponent": 1.0,
    "early_stopping": None,
    "template": TEMPLATE,
}


class ModelSettings(Section):
    """Which model to train. Its weights are identified by their content, so their location is neutral."""

    name: Neutral[FolderName]
    name_or_path: Neutral[str | None]
    hub_id: Neutral[str | None]
    tokenizer_name_or_path: Neutral[str | None]
    archive: Neutral[str | None]
    architecture: dict[str, Any] | None
    block_name: Neutral[str | None]
    policy_dtype: str
    fsdp_policy_mp: Dtype | Literal["native"] | None
    reference_dtype: Dtype


class DivergenceSettings(Section):
    min_sampled_logp_per_token: float | None


class WandbSettings(Section):
    enabled: bool
    entity: str | None
    project: str
    mode: Literal["offline", "online"]


class EndpointSettings(Section):
    urls: list[str]
    model: str | None
    send: Literal["ids", "text"]
    key_env: str
    concurrency: Count
    retries: CountOrZero
    timeout: Positive


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(PARParams):
    """How answers are decoded: the next-token law (PARParams) and everything around it."""

    max_length: Length
    max_prompt_length: Count
    stop_str: str | None
    template: str
    multiround: bool
    input_key: str
    output_key: str
    system_key: str | None
    for_aligner: bool
    generator: str | None
    tokenizer_path: str | None
    dtype: Dtype
    proposal_device: str
    aligner_device: str
    backend: Literal["local", "endpoint"]
    endpoint: EndpointSettings
    batch_size: Count
    speculative: bool
    drafter: str | None
    cuda_graphs: bool
    limit: Count | None

    @property
    def params(self) -> PARParams:
        """The settings of the next-token law alone."""
        return PARParams(**{key: getattr(self, key) for key in PARParams.field_names()})


class EvaluationSettings(Section):
    dataset: str | None
    tasks: dict[str, dict[str, Any]]
    systems: dict[str, dict[str, Any]]
    paper: dict[str, dict[str, list[Any]]]
    test_file: str | None
    reference: str
    ablation: dict[str, str]
    steps: list[str]
    columns: list[str]
    bootstrap: Count
    likelihood: str | None
    likelihood_sweep: dict[str, list[Any]]
    verify_rows: CountOrZero
    examples: CountOrZero


class Settings(Section):
    """One run: the root configuration, or that of a stage."""

    data_dir: Neutral[str]
    output_dir: Neutral[str]
    report_dir: Neutral[str]
    report: Neutral[str | None]
    local_dirs: Neutral[list[str]]

    experiment_name: Neutral[FolderName]
    stage: Neutral[dict[str, Any]]
    world: Neutral[dict[str, Any]]  # checked by `build_world` in ram/data/toy_world.py
    baselines: Neutral[bool]
    stages: Neutral[list[str] | None]
    dry_run: Neutral[bool]
    console: Neutral[Literal["auto", "brief", "full"]]
    trust_remote_code: Neutral[bool]
    overwrite: Neutral[bool]
    seed: CountOrZero
    exp_name: Neutral[FolderName | None]
    exp_prefix: Neutral[FolderName]
    exp_flag: Neutral[FolderName | None]
    debug: Neutral[bool]

    datasets: list[str]
    max_length: Length
    max_prompt_length: Count
    add_bos: bool
    template: Literal["ram", "chat"]
    heldout_fraction: Annotated[float, interval("[0, 1)")]
    on_bad_row: Literal["error", "skip"]
    n_epochs: Count | None
    n_examples: Count | None
    n_eval_examples: Neutral[CountOrZero | None]

    proposal: Neutral[str | None]  # its weights are identified by their content
    cache_proposal: Neutral[bool]
    trainer: Neutral[str]
    cpu_offload: Neutral[bool]
    batch_size: Count
    eval_batch_size: Neutral[Count]
    gradient_accumulation_steps: Count
    tokens_per_pass: Neutral[Count | None]
    optimizer: str
    lr: Positive
    weight_decay: NotNegative | None
    lr_schedule: Literal["constant", "cosine"]
    warmup_steps: NotNegative  # a count, or a share below 1
    max_grad_norm: Positive
    lora: InstanceOf[LoraSettings] | None
    last_batch: Literal["whole", "scaled"]
    activation_checkpointing: Neutral[bool]
    packed: Neutral[bool]
    dropout: Literal["none", "config"]
    compile: Neutral[bool]
    divergence: Neutral[DivergenceSettings]

    do_first_eval: Neutral[bool]
    eval_every: Neutral[Count]
    save_every: Neutral[Count | None]
    early_stopping: Count | None
    keep_steps: Neutral[Count | None]
    resume: Neutral[Literal["auto", "never"]]
    keep_states: Neutral[Count]
    export_dtype: Literal["float32", "bfloat16"]
    sample_during_eval: Neutral[bool]
    n_eval_model_samples: Neutral[CountOrZero]
    minimum_log_interval_secs: Neutral[NotNegative]
    wandb: Neutral[WandbSettings]
    fsdp_port: Neutral[Any]

    sampling: Neutral[InstanceOf[SamplingSettings]]
    evaluation: Neutral[EvaluationSettings]
    model: ModelSettings
    loss: Any  # the dataclass beside the loss, see ram/training/losses.py
    judge: Neutral[Any]  # the dataclass beside the judge, see ram/evaluation/judges

    # Only in recipes: names that their other keys refer to.
    pair: Neutral[dict[str, str | bool | None] | None] = None
    hh_negatives: Neutral[Literal["rejected", "sampled"] | None] = None
    hh_data: Neutral[dict[str, str] | None] = None


@dataclass(frozen=True)
class Tables:
    """Names that the files above this package define. A loss or judge brings the type of its settings."""

    datasets: dict[str, Source]
    losses: dict[str, Any]
    judges: dict[str, type[Any]]
    pick_trainer: Callable[[str], Any]
    pick_optimizer: Callable[[str], Any]


def settings_of(composed: DictConfig, tables: Tables) -> Settings:
    """Return a composed configuration as typed settings; raise UserError for one that cannot be right."""
    values = resolved(composed)
    kinds = {"loss": lambda name: pick(tables.losses, name, "loss").settings}
    kinds["judge"] = lambda name: pick(tables.judges, name, "judge")
    for section, kind_of in kinds.items():
        if isinstance(values[section], dict):
            kind = kind_of(values[section].get("name"))
            values[section] = check(kind, values[section], f"{section}.")
    values["sampling"] = sampling_settings(values["sampling"])
    if values["lora"] is not None:
        values["lora"] = check(LoraSettings, values["lora"], "lora.")
    return check(Settings, values)


def sampling_settings(values: Any) -> SamplingSettings:
    """Return `sampling` keys as typed settings; raise UserError for an unknown key or a wrong value."""
    if isinstance(values, dict) and "endpoint" in values:
        endpoint = check(EndpointSettings, values["endpoint"], "sampling.endpoint.")
        values = values | {"endpoint": endpoint}
    return check(SamplingSettings, values, "sampling.")


def merged(sampling: SamplingSettings, *changes: dict[str, Any]) -> SamplingSettings:
    """Return `sampling` keys with changes, later ones winning, checked again."""
    values = nested(sampling)
    for key, value in (item for change in changes for item in change.items()):
        inner = values.get(key)
        values[key] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value
    return sampling_settings(values)


def decisive(section: Section) -> dict[str, Any]:
    """Return a section as nested dicts, without the keys that change neither weights nor samples."""
    fields = type(section).model_fields
    kept = {key: value for key, value in vars(section).items() if NO_EFFECT not in fields[key].metadata}
    return {
        key: decisive(value) if isinstance(value, Section) else nested(value) for key, value in kept.items()
    }


# ---- conditions on several keys ----------------------------------------------------------------------------


def check_training(config: Settings, tables: Tables) -> None:
    """Raise UserError for a training configuration that cannot work."""
    tables.pick_trainer(config.trainer)
    tables.pick_optimizer(config.optimizer)
    if not config.datasets:
        raise UserError(
            "datasets is not set: give a file, datasets=[path/to/file.jsonl], or a name, e.g. datasets=[hh]; "
            f"known: {', '.join(sorted(tables.datasets))}"
        )
    for name in config.datasets:
        parse_name(name, tables.datasets)
    model = config.model
    if not (model.name_or_path or model.hub_id or model.archive or model.architecture):
        raise UserError("no model: give model=NAME (config/model/*.yaml), or model.name_or_path=FOLDER")
    if model.policy_dtype != "float32":
        raise UserError(
            f"model.policy_dtype={model.policy_dtype}: only float32; narrower weights do not move at "
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
    if config.early_stopping is not None:
        check_early_stopping(config)
    n_answers = 2 if tables.losses[config.loss.name].needs_negative else 1
    longest = n_answers * config.max_length  # a packed example has each prompt once, so it is shorter
    if config.tokens_per_pass is not None and config.tokens_per_pass < longest:
        raise UserError(
            f"tokens_per_pass={config.tokens_per_pass}: an example of loss={config.loss.name} can have "
            f"{n_answers} x max_length = {longest} tokens, and a pass has at least one example: expected "
            f"{longest} or more, or null"
        )
    if config.n_examples is None and config.n_epochs is None:
        raise UserError("n_epochs and n_examples are both null: give one of them")
    if config.lora is not None:
        check_lora(config)
    if config.sample_during_eval:
        if tables.pick_trainer(config.trainer).distributed:
            raise UserError(
                f"sample_during_eval=true: {config.trainer} has no whole model to decode with: set false"
            )
        check_sampling(config.sampling)


def check_early_stopping(config: Settings) -> None:
    """Raise UserError if the weights of some held-out evaluation would not be on disk, or steps are rarer."""
    if config.save_every is not None and config.save_every < config.batch_size:
        raise UserError(
            f"early_stopping={config.early_stopping}: it counts saved steps, but save_every="
            f"{config.save_every} examples is less than an update's batch_size={config.batch_size}; raise it"
        )
    if config.save_every is None or config.save_every % config.eval_every or config.n_eval_examples == 0:
        raise UserError(
            f"early_stopping={config.early_stopping}: it chooses among saved steps by their held-out loss, "
            f"but save_every={config.save_every}, eval_every={config.eval_every}, n_eval_examples="
            f"{config.n_eval_examples}; make save_every a multiple of eval_every, and n_eval_examples above 0"
        )


def check_lora(config: Settings) -> None:
    """Raise UserError for keys that low-rank adapters cannot be combined with."""
    assert config.lora is not None
    if config.sample_during_eval:
        raise UserError(
            "sample_during_eval=true: decoding needs merged weights; set it to false, or lora=null"
        )
    if config.lora.base_dtype == "bfloat16" and config.model.fsdp_policy_mp in (None, "float32"):
        raise UserError(
            f"lora.base_dtype=bfloat16, but the forward pass computes in {config.model.fsdp_policy_mp}: set "
            "model.fsdp_policy_mp=bfloat16 too"
        )


def check_sampling(sampling: SamplingSettings) -> None:
    """Raise UserError for lengths or a backend that cannot work."""
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
