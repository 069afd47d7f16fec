"""Train: a recipe with `python train.py experiment=llama_uc`, one run with `python train.py model=… loss=…`.

All stages are resolved and checked first, then run one after the other. Finished stages are not run again.
"""

import copy
import signal
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ram import environment

if __name__ == "__main__":
    environment.check()
# No traceback if Ctrl-C is pressed during the imports, which take seconds. `start` in utils.py undoes this.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from preference_datasets import get_dataset, load_tokenized
from ram.answers import answer_files
from ram.answers.jobs import AnswerJob, Pair
from ram.data import toy_world
from ram.data.catalogue import CUT, hub_cache
from ram.data.chat import ChatTemplate
from ram.data.prompts import CHAT
from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.errors import UserError, run_entry_point
from ram.log import brief, labelled, log, log_path, notice, pick_device, pick_dtype, redacted, use_console
from ram.models import checkpoints, hub, lora, run_folder, vocabulary
from ram.settings import recipes
from ram.settings.checks import nested
from ram.settings.schema import INTRODUCED, settings_of
from ram.storage import provenance
from ram.storage.files import BadRows, only_run, set_aside, write_text
from ram.training import frozen, passes, resume
from ram.training.losses import LOSSES
from trainers import BasicTrainer, pick_trainer
from utils import TABLES, seed_everything, start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Runs a stage, even a finished one if the second argument is true; returns what a brief console says.
Runner = Callable[[recipes.Stage, bool], str]
BEFORE = "done before"


def train_stage(stage: recipes.Stage, overwrite: bool) -> str:
    """Train one model into its run folder; a finished run of other settings there is renamed."""
    config, run_dir = stage.config, stage.output
    identity = recipes.identity(config)
    done = None if overwrite else run_folder.finished_run(run_dir)
    source, architecture = None, None
    if not config.model.architecture or config.model.archive:
        source = checkpoints.find_model(stage.source, None if config.model.archive else config.model.hub_id)
    else:
        architecture = config.model.architecture
    checkpoints.check_context(source, config.max_length, architecture)
    tokenizer_source = config.model.tokenizer_name_or_path or source
    if tokenizer_source is None:
        raise UserError("model.architecture has no tokenizer: give model.tokenizer_name_or_path=FOLDER")
    tokenizer = checkpoints.load_tokenizer(tokenizer_source)
    chat = ChatTemplate(tokenizer) if config.template == CHAT else None
    loss = LOSSES[config.loss.name]
    bad = BadRows(config.on_bad_row)
    with processes.rank0_first():  # the first process caches the token ids, the others read them
        data = {
            split: load_tokenized(
                config.datasets,
                split,
                tokenizer,
                config,
                bad,
                loss.needs_negative,
                loss.needs_reference,
                chat,
            )
            for split in ("train", "heldout")
        }
    if source is not None:
        rows = vocabulary.rows_in(source)
        used = [int(ids.max()) for part in data.values() for ids in part.ids.values() if len(ids)]
        vocabulary.check_ids(used, rows, source, f"{tokenizer_source}, with which the data were encoded,")
    inputs = {"data": data["train"].key, "weights": source and checkpoints.weights_fingerprint(source)}
    earlier = {
        "data": data["train"].earlier_key or data["train"].key,
        "weights": source and checkpoints.earlier_fingerprint(source),
    }
    if config.early_stopping is not None:
        inputs["heldout"] = data["heldout"].key  # they choose the weights to keep
    if stage.proposal:
        checkpoints.load_pair(stage.proposal, source)  # checks that they fit together
        inputs["proposal"] = earlier["proposal"] = checkpoints.weights_fingerprint(stage.proposal)
    changed = ""
    if done is not None:
        manifest = run_folder.manifest_of(done | {"settings": recipes.recorded_identity(done, identity)})
        changed = manifest.changes(identity | inputs, identity | earlier)
        if not changed:
            run_folder.check_finished(run_dir, done)
            log.info(f"stage {stage.name}: {BEFORE}, {run_dir}")
            if processes.is_rank0() and not config.debug:
                resume.clear(run_dir)  # left by a stop between the record and their removal
            return BEFORE

    passes.check_device(config)
    if source and Path(source).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"stage {stage.name}: starts from {source}, which is in its own run folder and would be "
            "replaced; set exp_flag=NAME"
        )
    processes.barrier()  # all processes have read the folder's state
    if done is not None and processes.is_rank0():
        set_aside(run_dir, f"trained with other settings, data or weights ({changed})")
    processes.barrier()
    origin = {"settings": identity, "inputs": inputs}
    resumable = config.resume == "auto" and not overwrite and not config.debug
    earlier_origin = origin | {"inputs": earlier}
    state = resume.newest(run_dir, origin, earlier_origin, INTRODUCED) if resumable else None
    start = time.monotonic()
    with processes.in_turn():
        trainer = make_trainer(stage, source, architecture, tokenizer, data, origin)
    if not config.debug and processes.is_rank0():
        if state is None:
            run_folder.clear_run(run_dir)
            resume.clear(run_dir)
        bad.report(run_dir / run_folder.BAD_ROWS)
        text = yaml.safe_dump(nested(config), allow_unicode=True, sort_keys=False)
        write_text(run_dir / "config.yaml", redacted(text))
    processes.barrier()
    trainer.began = start
    metrics = trainer.train(state)
    if not config.debug and processes.is_rank0():
        record = origin | {"metrics": metrics, "seconds": time.monotonic() - trainer.began}
        record |= {"finished": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        run_folder.write_done(run_dir, record)
        resume.clear(run_dir)
    processes.barrier()
    return f"{config.loss.name} of {config.model.name}" + (
        f", held-out loss {metrics['loss']:.3f}" if "loss" in metrics else ""
    )


def make_trainer(
    stage: recipes.Stage,
    source: str | None,
    architecture: dict[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase",
    data: dict[str, TokenizedDataset],
    origin: dict[str, Any],
) -> BasicTrainer:
    """Return a stage's trainer with its models, loaded from `source` or made from `architecture`.

    Args:
        data: the data sets `train` and `heldout`.
        origin: settings and inputs of the run, for its states.
    """
    config, run_dir, loss = stage.config, stage.output, LOSSES[stage.config.loss.name]
    seed_everything(config.seed)
    if source is None:
        assert architecture is not None
        model = checkpoints.new_model(architecture, tokenizer, config.seed)
    else:
        dtype = "float32" if config.lora is None else config.lora.base_dtype
        model = checkpoints.load_model(source, dtype)
    if config.lora is not None:
        lora.add_adapters(model, config.lora, config.seed)
    reference = None
    if loss.needs_reference and not config.loss.reference_free:
        dtype = config.model.reference_dtype
        if source is None:
            # transformers wraps `to` so that its signature loses `self`.
            reference = copy.deepcopy(model)
            reference.to(pick_dtype(dtype, model.device))  # pyright: ignore[reportArgumentType]
        else:
            reference = checkpoints.load_model(source, dtype)
    proposal = None
    if stage.proposal:
        cache = Path(config.output_dir) / "cache" if config.cache_proposal else None
        dtype, device = config.model.reference_dtype, pick_device()
        proposal = frozen.open_proposal(
            stage.proposal, model, tokenizer, data, dtype, device, cache, config.loss.exponent
        )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log.info(
        f"stage {stage.name}: {config.loss.name} of {config.model.name} ({size:.2f} M weights) into {run_dir}"
    )
    card = {
        "add_bos": config.add_bos,
        "max_length": config.max_length,
        "run": run_dir.name,
        "max_prompt_length": config.max_prompt_length,
        "template": config.template,
    }
    return pick_trainer(config.trainer)(
        config, model, tokenizer, data["train"], data["heldout"], run_dir, card, reference, origin, proposal
    )


def sample_job(stage: recipes.Stage) -> tuple[AnswerJob, BadRows]:
    """Return a sample stage's job, one answer per training prompt, and the rows that cannot be read."""
    config, settings = stage.config, stage.config.sampling
    name, bad = config.datasets[0], BadRows(config.on_bad_row)
    pair = Pair(checkpoints.find_model(stage.source), None, settings.dtype, settings.tokenizer_path)
    cache_dir, chat = hub_cache(config.local_dirs), pair.chat(config.template)
    examples = get_dataset(name, "all", data_dir=config.data_dir, cache_dir=cache_dir, bad=bad, chat=chat)
    examples = examples[: settings.limit]
    job = AnswerJob(
        label=f"stage {stage.name}",
        pair=pair,
        params=settings.params,
        settings=settings,
        records=[example.record or {} for example in examples],
        prompts=[example.prompt for example in examples],
        row_ids=[example.row for example in examples],
        seed=config.seed,
        add_bos=config.add_bos,
        key="sampling",
        extra={},
        cut_key=CUT,
    )
    return job, bad


def sample_stage(stage: recipes.Stage, overwrite: bool) -> str:
    """Answer every training prompt once with the proposal."""
    job, bad = sample_job(stage)
    if processes.is_rank0():
        bad.report(stage.output.with_name(f"{stage.output.name}.bad_rows.jsonl"))
    made = answer_files.answer_file(stage.output, job, overwrite)
    return f"{len(job.prompts):,} answers" if made else BEFORE


def locked(run_stage: Runner) -> Runner:
    """Return a function that runs a stage while no other process writes its output."""

    def alone(stage: recipes.Stage, overwrite: bool) -> str:
        with only_run(stage.output):
            return run_stage(stage, overwrite)

    return alone


def world_stage(stage: recipes.Stage, overwrite: bool) -> str:
    """Write the toy data set's files and tokenizer."""
    config = stage.config
    with processes.rank0_first():
        toy_world.build_world(stage.output, config.world, config.seed, overwrite and processes.is_rank0())
    return "the toy data set"


def given_stage(stage: recipes.Stage, overwrite: bool) -> str:
    """Use a model as it is."""
    return f"{stage.output}, as it is"


RUN: dict[str, Runner] = {
    "given": given_stage,
    "train": locked(train_stage),
    "sample": sample_stage,
    "world": locked(world_stage),
}


def describe_weights(stage: recipes.Stage, source: str) -> str:
    """Return the size of a folder of weights, or their origin if there is no such folder."""
    folder = Path(source)
    if folder.is_dir():
        return f"{sum(f.stat().st_size for f in folder.glob('*.safetensors')) / 1e6:,.1f} MB"
    return f"hub: {hub_id}" if (hub_id := hub_id_of(stage)) else "missing"


def hub_id_of(stage: recipes.Stage) -> str | None:
    """Return the hub id that a stage's weights are loaded from, None if they are local, made here or new."""
    model = stage.config.model
    if stage.kind != "train" or model.archive or model.architecture or Path(stage.source or "").is_dir():
        return None
    return model.hub_id


def describe(stage: recipes.Stage) -> str:
    """Return a stage's inputs, outputs and sizes, for the dry run."""
    config = stage.config
    lines = [f"{stage.name} ({stage.kind})"]
    if stage.kind != "given":
        lines.append(f"  writes  {stage.output}{'/LATEST' if stage.kind == 'train' else ''}")
    if stage.source:
        lines.append(f"  weights {stage.source} ({describe_weights(stage, stage.source)})")
    if stage.proposal:
        lines.append(f"  proposal {stage.proposal} ({describe_weights(stage, stage.proposal)})")
    for path in stage.reads:
        size = f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "missing"
        lines.append(f"  reads   {path} ({size})")
    if stage.kind == "train":
        length = f"n_examples {config.n_examples}" if config.n_examples else f"n_epochs {config.n_epochs}"
        cut = f"{config.gradient_accumulation_steps} micro-batches"
        if config.tokens_per_pass is not None:
            cut = f"passes of {config.tokens_per_pass:,} tokens"
        lines.append(
            f"  run     {config.loss.name}, {length}, batch {config.batch_size} in {cut}, lr {config.lr}, "
            f"lengths {config.max_length}/{config.max_prompt_length}, seed {config.seed}"
        )
    if stage.kind == "sample":
        s = config.sampling
        lines.append(
            f"  samples temperature {s.base_temperature}, top-p {s.base_top_p}, top-k {s.base_top_k}, "
            f"penalty {s.base_repetition_penalty}, lengths {s.max_length}/{s.max_prompt_length}, "
            f"seed {config.seed}"
        )
    return "\n".join(lines)


def check_samples(stages: list[recipes.Stage], running: list[recipes.Stage]) -> None:
    """Check samples that this run reads but does not make.

    Samples can be copied to a machine without their proposal. Then only the files are checked, when read.

    Raises:
        UserError: their sample stage, which is not run, would now make other samples.
    """
    for stage in stages:
        read = any(stage.output in other.reads for other in running)
        skipped = stage.kind == "sample" and stage not in running
        if skipped and read and stage.source and Path(stage.source).is_dir():
            recipes.check_trained(stages, stage.source)
            job, _ = sample_job(stage)
            provenance.check(stage.output, job.made_from, job.label, job.earlier_made_from)


def check_templates(running: list[recipes.Stage]) -> None:
    """Check the tokenizers of stages with `template=chat`, as far as they are in folders that exist now.

    Raises:
        UserError: one has no chat template, two have different ones, or one does not fit its model.
    """
    templates: dict[str, str] = {}
    for stage in running:
        own = stage.config.model.tokenizer_name_or_path if stage.kind in ("train", "given") else None
        folder = own or stage.source
        if stage.config.template != CHAT or not folder or not Path(folder).is_dir() or folder in templates:
            continue
        if own and stage.source and Path(stage.source).is_dir():
            checkpoints.load_pair(stage.source, None, own)  # checks that the vocabularies are the same
        templates[folder] = ChatTemplate(checkpoints.load_tokenizer(folder)).text
        first, text = next(iter(templates.items()))
        if templates[folder] != text:
            raise UserError(
                f"template=chat: {first} and {folder} have different chat templates; give the folder of the "
                f"right one for both, model.tokenizer_name_or_path={first}"
            )


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    run_entry_point(lambda: run(config, list(HydraConfig.get().overrides.task)))


def run(composed: DictConfig, overrides: list[str]) -> None:
    """Resolve and check all stages, then run those in `stages`."""
    config = settings_of(composed, TABLES)
    use_console(config.console)
    checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
    stages = recipes.resolve(overrides, TABLES)
    running = recipes.select(stages, config.stages)
    reasons: dict[str, str] = {}
    if config.dry_run:
        for stage in running:
            notice(describe(stage))
        hub_ids = dict.fromkeys(filter(None, map(hub_id_of, running)))
        reasons = {hub_id: reason for hub_id in hub_ids if (reason := hub.unreachable(hub_id))}
        for hub_id, reason in reasons.items():
            log.warning(f"weights of {hub_id} cannot be reached: {reason}")
    recipes.check_inputs(stages, running)
    check_templates(running)
    check_samples(stages, running)
    if config.dry_run:
        rest = "everything else they need is" if reasons else "everything they need is"
        notice(f"{len(running)} stages: {rest} there or made by an earlier one")
        return
    processes.start()
    if brief():
        notice(f"{config.experiment_name}: {len(running)} stages; every line is in {log_path()}")
    width, before = max((len(stage.name) for stage in running), default=0), []
    for number, stage in enumerate(running, start=1):
        label = f"stage {number:>{len(str(len(running)))}} of {len(running)}  {stage.name:<{width}}"
        began = time.monotonic()
        with labelled(label.rstrip()):
            said = RUN[stage.kind](stage, config.overwrite)
        if said == BEFORE:
            before.append(stage.name)
            if number < len(running):
                continue
        if before:
            notice(f"{BEFORE}: {', '.join(before)}")
            before = []
        if said != BEFORE:
            notice(f"{label}  {said}, {time.monotonic() - began:.0f} s")
    processes.barrier()  # a process that ends early breaks the others' connections


if __name__ == "__main__":
    start("train", main)
