"""The last lines of an evaluation: where its reports are, and the commands that serve the pair."""

import shlex
from collections.abc import Sequence

from ram.evaluation import tables
from ram.evaluation.context import EvaluationContext
from ram.log import brief, log_path, notice
from ram.settings.compose import key_of

# Keys that decide neither which models are served nor how they decode ...
NOT_SERVED = (
    "console",
    "report",
    "report_dir",
    "stages",
    "dry_run",
    "overwrite",
    "judge",
    "evaluation",
    "ablation",
    "wandb",
)
# ... but for these of `evaluation`.
SERVED = ("evaluation.systems", "evaluation.tasks")


def serve_arguments(experiment: str, overrides: Sequence[str]) -> str:
    """Return the arguments by which serve.py finds the models of an evaluation."""

    def is_served(key: str) -> bool:
        return key.startswith(SERVED) or key.split(".")[0] not in ("experiment", *NOT_SERVED)

    kept = [override.lstrip("+") for override in overrides if is_served(key_of(override))]
    return shlex.join([f"experiment={experiment}", *kept])


def say(contexts: Sequence[EvaluationContext], experiment: str | None, overrides: Sequence[str]) -> None:
    """Log the last lines of an evaluation; on a brief console also a short table of each task.

    Args:
        contexts: the tasks that were evaluated.
        experiment: the recipe's file name; None if there is none.
        overrides: the command line.
    """
    lines = []
    for context in contexts:
        config = context.config
        if brief():
            lines += [
                f"{config.experiment_name}, task {context.task}: {len(context.rows)} prompts, judge "
                f"{config.judge.name}, answers compared with {config.evaluation.reference}",
                tables.console(context.board, config.evaluation.columns, short=True),
            ]
        if (page := context.folder / "report.html").is_file():
            lines.append(f"report      {page}")
    if experiment and any(context.pairs for context in contexts):
        arguments = serve_arguments(experiment, overrides)
        lines.append(f"talk to it  bash bin/serve.sh chat {arguments}")
        lines.append(f"serve it    bash bin/serve.sh {arguments}")
    if brief() and log_path():
        lines.append(f"every line  {log_path()}")
    if not lines:
        return
    width = min(max((len(line) for text in lines for line in text.split("\n")), default=0), 100)
    rule = "─" * width  # no frame at the sides: lines can be copied
    notice("\n".join([rule, *lines, rule] if brief() else lines))
