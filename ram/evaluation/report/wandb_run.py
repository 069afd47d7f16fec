"""An evaluation as a run of wandb: its tables, its page and its files."""

import re
from pathlib import Path
from typing import Any

ARTIFACTS = (
    "leaderboard.csv",
    "leaderboard.md",
    "leaderboard.tex",
    "results.json",
    "report.json",
    "report.html",
)


def log_evaluation(settings, name: str, folder: Path, report: dict[str, Any]) -> None:
    """Sends an evaluation to wandb as a run of its own: as tables the leaderboard and the figures of every
    answer, which the report's plots are made of; the page; the result files in `folder` as an artifact.

    settings: the `wandb` keys. report: what `report_data.save` returned.
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
    columns = list(dict.fromkeys(key for row in report["board"] for key in row))
    board = [[row.get(key) for key in columns] for row in report["board"]]
    figures = [
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
    keys = ["row", "system", "length", "preference", "fallback_fraction", "mean_kl", "acceptance"]
    run.log(
        {
            "leaderboard": wandb.Table(columns=columns, data=board, allow_mixed_types=True),
            "answers": wandb.Table(columns=keys, data=figures),
            "report": wandb.Html(str(folder / "report.html"), inject=False),
        }
    )
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="evaluation")
    for file in ARTIFACTS:
        if (folder / file).is_file():
            artifact.add_file(str(folder / file))
    run.log_artifact(artifact)
    run.finish()
