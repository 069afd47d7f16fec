"""Entry point of evaluation: `python pipeline.py experiment=llama_uc`, run after train.py.

    generate (answers) -> influence (token-level figures) -> likelihood -> judge -> verify -> leaderboard
    -> report

Finished work is reused. `python pipeline.py report=FOLDER` makes a report again from the data saved there.
"""

import signal
from collections.abc import Callable
from pathlib import Path

from ram import environment

if __name__ == "__main__":
    environment.check()
# No traceback if Ctrl-C is pressed during the imports, which take seconds. `start` in utils.py undoes this.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ram.distributed import processes
from ram.errors import UserError, pick, run_entry_point
from ram.evaluation import closing, length_control, likelihood, steps, tables
from ram.evaluation.context import EvaluationContext, open_context
from ram.evaluation.judges import endpoint
from ram.evaluation.judges.base import Judge
from ram.evaluation.report import gather
from ram.log import notice, use_console
from ram.models import checkpoints
from ram.settings import compose, recipes
from ram.settings.overrides import keys_given
from ram.settings.schema import Settings, settings_of
from ram.storage.files import how_to_get
from utils import TABLES, start

# data set -> task -> file under data_dir/test. Rows: instruction, output (the reference), generator; for HH
# the instruction is the whole dialogue up to and including "\n\nAssistant: ".
test_files = {
    "uc": {"helpful": length_control.QUESTIONS_FILE},
    "alpaca": {"helpful": length_control.QUESTIONS_FILE},
    "hh": {"helpful": "hh_helpful_test_chosen_300.json", "harmless": "hh_harmless_test_chosen_300.json"},
    "summ-sft": {"summ": "openai_summarize_tldr_test_300.json"},
    "toy": {"facts": "toy_test.json"},
}

# The keys of `evaluation.steps`, in the order of execution, whatever their order in the configuration.
STEPS: dict[str, Callable[[EvaluationContext], None]] = {
    "generate": steps.generate,
    "influence": steps.compute_influence,
    "likelihood": steps.measure_likelihood,
    "judge": steps.judge,
    "verify": steps.verify,
    "leaderboard": steps.leaderboard,
    "report": steps.report,
}
ON_ALL_PROCESSES = {"generate", "influence"}
BOARD = {"likelihood", "judge", "verify"}
IMPLIED = {"leaderboard": BOARD, "report": {*BOARD, "leaderboard"}}


def test_file(config: Settings, task: str) -> Path:
    """Return the path of a task's test file."""
    if config.evaluation.test_file is not None:
        return Path(config.evaluation.test_file)
    if config.evaluation.dataset == "pair":
        raise UserError(
            "evaluation.test_file is not set: give a file of questions and answers (docs/data.md)"
        )
    tasks = pick(test_files, config.evaluation.dataset, "evaluation.dataset")
    return Path(config.data_dir) / "test" / pick(tasks, task, f"task of {config.evaluation.dataset}")


def run_steps(context: EvaluationContext) -> None:
    """Run the steps of `evaluation.steps`, and those that they need, in order."""
    selected = set(context.config.evaluation.steps)
    for step in context.config.evaluation.steps:
        selected |= IMPLIED.get(step, set())
    for name, step in STEPS.items():
        if name in selected and (name in ON_ALL_PROCESSES or processes.is_rank0()):
            step(context)
            context.loaded.drop()  # a judge may need the memory


def describe(context: EvaluationContext) -> None:
    """Log a task's systems, for the dry run."""
    for system in context.systems.values():
        notice(
            f"{context.task}: {system.name}\n  proposal {system.pair.proposal}\n  aligner  "
            f"{system.pair.aligner}\n  writes   {system.folder}/output.json ({len(context.rows)} rows)"
        )


def run(composed: DictConfig, overrides: list[str]) -> None:
    """Evaluate every task of a recipe, then rebuild the leaderboard of all systems evaluated so far."""
    config = settings_of(composed, TABLES)
    use_console(config.console)
    if config.report is not None:
        gather.rebuild(Path(config.report))
        return
    if not config.evaluation.systems:
        raise UserError("evaluation.systems is empty: give experiment=NAME (config/experiment/*.yaml)")
    checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
    stages, tasks = recipes.resolve(overrides, TABLES), list(config.evaluation.tasks)
    if not tasks:
        raise UserError("evaluation.tasks is empty: name at least one, e.g. evaluation.tasks.helpful={}")
    for step in config.evaluation.steps:
        pick(STEPS, step, "step")
    judge: Judge = config.judge
    judge.check()
    given = {compose.key_of(override): override.partition("=")[2] for override in overrides}
    overridden = {*given, *(key for _, keys in keys_given(overrides) for key in keys)}
    files = {task: test_file(config, task) for task in tasks}
    # A missing file stops its own task, not the others.
    missing = {task: path for task, path in files.items() if not path.is_file()}
    if len(missing) == len(tasks):
        missing = {}
    processes.start()
    contexts: list[EvaluationContext] = []
    try:
        for task, path in files.items():
            if task in missing:
                continue
            folder = Path(config.report_dir) / (task if len(tasks) > 1 else "")
            context = open_context(config, task, path, folder, stages, judge, overridden)
            likelihood.check(context)
            if config.dry_run:
                describe(context)
            else:
                run_steps(context)
                contexts.append(context)
    finally:
        endpoint.log_spending()
    if processes.is_rank0() and not config.dry_run:
        tables.merge_leaderboards(Path(config.output_dir))
        boards = [context for context in contexts if context.board]
        if boards:
            closing.say(boards, given.get("experiment"), overrides)
    processes.barrier()
    if missing:
        listed = ", ".join(f"{task} ({path})" for task, path in missing.items())
        remedy = how_to_get(next(iter(missing.values())))
        raise UserError(f"not evaluated, because there is no test file: {listed}; {remedy}")


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def main(config: DictConfig) -> None:
    run_entry_point(lambda: run(config, list(HydraConfig.get().overrides.task)))


if __name__ == "__main__":
    start("pipeline", main)
