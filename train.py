"""Entry point of training: `python train.py experiment=llama_uc`, or one run: `python train.py model=…
loss=…`.

Resolves and checks all stages first, then runs them one after the other; what is finished is left alone.
"""

import copy
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the seconds that the imports take needs no traceback
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from preference_datasets import get_dataset, load_tokenized
from ram.answers import answer_files
from ram.answers.jobs import AnswerJob, Pair
from ram.data import toy_world
from ram.data.catalogue import hub_cache
from ram.decoding.par import PARParams
from ram.distributed import processes
from ram.errors import UserError, run_entry_point
from ram.log import log, pick_dtype, setup_logging
from ram.models import checkpoints, run_folder
from ram.settings import compose, recipes
from ram.storage import provenance
from ram.storage.files import BadRows, differences, only_run, set_aside, write_json
from ram.training import resume
from ram.training.losses import LOSSES
from trainers import pick_trainer
from utils import TABLES, seed_everything


def train_stage(stage: recipes.Stage, overwrite: bool) -> None:
    """Trains one model into its run folder; a finished run of other settings there is set aside."""
    config, run_dir = stage.config, stage.output
    identity = recipes.identity(config)
    done = None if overwrite else run_folder.finished_run(run_dir)
    source, architecture = None, None
    if not config.model.architecture or config.model.archive:
        source = checkpoints.find_model(stage.source, None if config.model.archive else config.model.hub_id)
    else:
        architecture = OmegaConf.to_container(config.model.architecture, resolve=True)
    checkpoints.check_context(source, config.max_length, architecture)
    tokenizer = checkpoints.load_tokenizer(config.model.tokenizer_name_or_path or source)
    loss = LOSSES[config.loss.name]
    bad = BadRows(config.on_bad_row)
    with processes.first_goes_first():  # it leaves the token ids in the cache
        data = {
            split: load_tokenized(list(config.datasets), split, tokenizer, config, bad, loss.needs_negative)
            for split in ("train", "heldout")
        }
    inputs = {"data": data["train"].key, "weights": source and checkpoints.weights_fingerprint(source)}
    if done is not None:
        changed = differences(done["settings"] | done["inputs"], identity | inputs)
        if not changed:
            run_folder.check_finished(run_dir, done)
            log.info(f"stage {stage.name}: done before, {run_dir}")
            return

    if source and Path(source).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"stage {stage.name}: starts from {source}, which lies in its own run folder and would be "
            "replaced; set exp_flag=NAME"
        )
    processes.wait()  # all have seen what is there
    if done is not None and processes.is_first():
        set_aside(run_dir, f"trained with other settings, data or weights ({changed})")
    processes.wait()
    origin = {"settings": identity, "inputs": inputs}
    wanted = config.resume == "auto" and not overwrite and not config.debug
    state = resume.newest(run_dir, origin) if wanted else None
    start = time.monotonic()
    with processes.in_turn():
        trainer = make_trainer(stage, source, architecture, tokenizer, data, origin)
    if not config.debug and processes.is_first():
        if state is None:
            run_folder.clear_run(run_dir)
            resume.clear(run_dir)
        bad.report(run_dir / run_folder.BAD_ROWS)
        OmegaConf.save(config, run_dir / "config.yaml", resolve=True)
    processes.wait()
    metrics = trainer.train(state)
    if not config.debug and processes.is_first():
        weights = checkpoints.weights_fingerprint(str(run_dir / run_folder.LATEST))
        record = origin | {"weights": weights, "metrics": metrics}
        record |= {"seconds": time.monotonic() - start, "finished": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        write_json(run_dir / run_folder.DONE, record)
        resume.clear(run_dir)
    processes.wait()


def make_trainer(stage: recipes.Stage, source: str | None, architecture, tokenizer, data, origin: dict):
    """The stage's trainer with its models, loaded from `source` or made from `architecture`."""
    config, run_dir, loss = stage.config, stage.output, LOSSES[stage.config.loss.name]
    seed_everything(config.seed)
    if source is None:
        model = checkpoints.new_model(architecture, tokenizer, config.seed)
    else:
        model = checkpoints.load_model(source, "float32")
    reference = None
    if loss.needs_reference and not config.loss.reference_free:
        dtype = config.model.reference_dtype
        if source is None:
            reference = copy.deepcopy(model).to(pick_dtype(dtype, model.device))
        else:
            reference = checkpoints.load_model(source, dtype)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log.info(
        f"stage {stage.name}: {config.loss.name} of {config.model.name} ({size:.2f} M weights) into {run_dir}"
    )
    card = {
        "add_bos": config.add_bos,
        "max_length": config.max_length,
        "run": run_dir.name,
        "max_prompt_length": config.max_prompt_length,
    }
    return pick_trainer(config.trainer)(
        config, model, tokenizer, data["train"], data["heldout"], run_dir, card, reference, origin
    )


def sample_job(stage: recipes.Stage) -> tuple[AnswerJob, BadRows]:
    """What a sample stage has to decode: every training prompt once, the answer under the key `sampling`."""
    config, settings = stage.config, stage.config.sampling
    name, bad = config.datasets[0], BadRows(config.on_bad_row)
    examples = get_dataset(
        name, "all", data_dir=config.data_dir, cache_dir=hub_cache(config.local_dirs), bad=bad
    )
    examples = examples[: settings.limit]
    job = AnswerJob(
        label=f"stage {stage.name}",
        pair=Pair(checkpoints.find_model(stage.source), None, settings.dtype, settings.tokenizer_path),
        params=PARParams(**{key: settings[key] for key in PARParams.field_names()}),
        settings=settings,
        records=[example.record for example in examples],
        prompts=[example.prompt for example in examples],
        row_ids=[example.row for example in examples],
        seed=config.seed,
        add_bos=config.add_bos,
        key="sampling",
        extra={},
    )
    return job, bad


def sample_stage(stage: recipes.Stage, overwrite: bool) -> None:
    """The sample stage: answers every training prompt once with the proposal."""
    job, bad = sample_job(stage)
    if processes.is_first():
        bad.report(stage.output.with_name(f"{stage.output.name}.bad_rows.jsonl"))
    answer_files.answer_file(stage.output, job, overwrite)


def locked(run_stage):
    """The stage, alone in what it writes."""

    def alone(stage: recipes.Stage, overwrite: bool) -> None:
        with only_run(stage.output):
            run_stage(stage, overwrite)

    return alone


def world_stage(stage: recipes.Stage, overwrite: bool) -> None:
    """Writes the toy world's data files and tokenizer."""
    settings = OmegaConf.to_container(stage.config.world, resolve=True)
    with processes.first_goes_first():
        toy_world.build_world(stage.output, settings, stage.config.seed, overwrite and processes.is_first())


RUN = {"train": locked(train_stage), "sample": sample_stage, "world": locked(world_stage)}


def whereabouts(stage: recipes.Stage) -> str:
    """Size of a folder of weights, or where they will come from instead."""
    folder, hub_id = Path(stage.source), stage.config.model.hub_id
    if folder.is_dir():
        return f"{sum(f.stat().st_size for f in folder.glob('*.safetensors')) / 1e6:,.1f} MB"
    return f"hub: {hub_id}" if hub_id and not stage.config.model.archive else "not there yet"


def describe(stage: recipes.Stage) -> str:
    """A stage for the dry run: inputs, outputs, sizes."""
    config = stage.config
    lines = [
        f"{stage.name} ({stage.kind})",
        f"  writes  {stage.output}{'/LATEST' if stage.kind == 'train' else ''}",
    ]
    if stage.source:
        lines.append(f"  weights {stage.source} ({whereabouts(stage)})")
    for path in stage.reads:
        size = f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "not there yet"
        lines.append(f"  reads   {path} ({size})")
    if stage.kind == "train":
        length = f"n_examples {config.n_examples}" if config.n_examples else f"n_epochs {config.n_epochs}"
        lines.append(
            f"  run     {config.loss.name}, {length}, batch {config.batch_size} in "
            f"{config.gradient_accumulation_steps} micro-batches, lr {config.lr}, lengths "
            f"{config.max_length}/"
            f"{config.max_prompt_length}, seed {config.seed}"
        )
    if stage.kind == "sample":
        s = config.sampling
        lines.append(
            f"  draws   temperature {s.base_temperature}, top-p {s.base_top_p}, top-k {s.base_top_k}, "
            "penalty "
            f"{s.base_repetition_penalty}, lengths {s.max_length}/{s.max_prompt_length}, seed {config.seed}"
        )
    return "\n".join(lines)


def check_samples(stages: list[recipes.Stage], running: list[recipes.Stage]) -> None:
    """Raises UserError where a stage reads samples that a sample stage left out of this run would make
    otherwise.

    Samples can be carried to where their proposal is not; then only the files are checked, as they are read.
    """
    for stage in stages:
        read = any(stage.output in other.reads for other in running)
        if stage.kind == "sample" and stage not in running and read and Path(stage.source).is_dir():
            recipes.check_trained(stages, stage.source)
            job, _ = sample_job(stage)
            provenance.check(stage.output, job.made_from, job.label)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    run_entry_point(lambda: run(config, list(HydraConfig.get().overrides.task)))


def run(config: DictConfig, overrides: list[str]) -> None:
    """Resolves and checks all stages, then runs those that were asked for."""
    checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
    stages = recipes.resolve(overrides, TABLES)
    running = recipes.select(stages, config.stages)
    if config.dry_run:
        for stage in running:
            log.info(describe(stage))
    recipes.check_inputs(stages, running)
    check_samples(stages, running)
    if config.dry_run:
        log.info(f"{len(running)} stages: everything they need is there or made by an earlier one")
        return
    processes.start()
    for stage in running:
        RUN[stage.kind](stage, config.overwrite)
    processes.wait()  # whoever leaves early breaks the others' connections


def start() -> None:
    """`main` with a log file and a command line that were checked."""
    sys.argv[1:] = compose.preflight(sys.argv[1:])
    setup_logging(Path("_log") / f"train-{datetime.now():%Y%m%d-%H%M%S}.log")
    main()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    processes.run(start)
