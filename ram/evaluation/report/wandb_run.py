"""An evaluation as a wandb run: its tables, its page and its files."""

import re
from pathlib import Path
from typing import Any

TABLES = ("leaderboard.csv", "leaderboard.md", "leaderboard.tex")
ARTIFACTS = (*TABLES, "results.json", "report.json", "report.html")
COLUMNS: list[Any] = ["row", "system", "length", "preference", "fallback_fraction", "mean_kl", "acceptance"]


def log_evaluation(settings: Any, name: str, folder: Path, report: dict[str, Any]) -> None:
    """Send an evaluation to wandb as a run of its own.

    The run has the leaderboard and the figures of every answer as tables, the page, and the result files as
    an artifact.

    Args:
        settings: the `wandb` keys.
        name: name of the run.
        folder: folder of the result files.
        report: the return value of `gather.save`.
    """
    import wandb

    run = wandb.init(
        project=settings.project,
        entity=settings.entity,
        mode=settings.mode,
        name=name,
        job_type="evaluation",
        dir=str(folder),
    )
    columns: list[Any] = list(dict.fromkeys(key for row in report["board"] for key in row))
    board: list[Any] = [[row.get(key) for key in columns] for row in report["board"]]
    figures: list[Any] = [
        [
            row["id"],
            system["name"],
            answer["length"],
            answer["judged"].get("preference"),
            *(answer.get("stats", {}).get(key) for key in ("fallback", "kl", "acceptance")),
        ]
        for row in report["rows"]
        for system, answer in zip(report["systems"], row["answers"], strict=True)
    ]
    run.log(
        {
            "leaderboard": wandb.Table(columns=columns, data=board, allow_mixed_types=True),
            "answers": wandb.Table(columns=COLUMNS, data=figures),
            "report": wandb.Html(str(folder / "report.html"), inject=False),
        }
    )
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="evaluation")
    for file in ARTIFACTS:
        if (folder / file).is_file():
            artifact.add_file(str(folder / file))
    run.log_artifact(artifact)
    run.finish()
