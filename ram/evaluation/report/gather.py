"""What an evaluation's report is made of: gathered once, saved as report.json, made into files from there.

    answers, judgements, figures of tokens, metrics.csv -> report.json -> report.html, leaderboard.md and .tex

Because the page is always made from the saved file, `python pipeline.py report=FOLDER` gives the same bytes
again without models or answers.
"""

import csv
import json
import math
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ram.answers import answer_files, influence
from ram.answers.jobs import AnswerJob
from ram.decoding import reference
from ram.errors import UserError
from ram.evaluation import statistics
from ram.evaluation.report import page
from ram.evaluation.report.charts import finite
from ram.evaluation.systems import System
from ram.log import log
from ram.models import run_folder
from ram.settings import recipes
from ram.storage.files import fingerprint, read_json, write_text

SAVED, FORMAT = "report.json", 1
CODES = {reference.AGREED: "a", reference.CHANGED: "c", reference.FELL_BACK: "f"}
CURVES = ("split", "examples", "loss", "target_logp_per_token", "sampled_logp_per_token")  # of metrics.csv


# ---- what stages left --------------------------------------------------------------------------------------


def training_seconds(stages: Sequence[recipes.Stage]) -> float:
    """Time that the recipe's finished stages took."""
    speeds = [answer_files.speed_path(stage.output) for stage in stages if stage.kind == "sample"]
    records = [run_folder.finished_run(stage.output) for stage in stages if stage.kind == "train"]
    records += [read_json(path) for path in speeds if path.is_file()]
    return sum(record["seconds"] for record in records if record)


def training_curves(stages: Sequence[recipes.Stage]) -> dict[str, list[dict]]:
    """The columns of metrics.csv that the report draws, of every training stage that has run."""
    curves = {}
    for stage in stages:
        path = stage.output / run_folder.METRICS
        if stage.kind == "train" and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                records = [{key: row.get(key) for key in CURVES} for row in csv.DictReader(file)]
            curves[stage.name] = [
                {key: value if key == "split" else finite(value) for key, value in record.items()}
                for record in records
            ]
    return curves


def results(
    rows: list[dict[str, Any]], systems: dict[str, System], identical: bool | None, seconds: float
) -> dict[str, Any]:
    """results.json: every system's figures, and those of decoding: speed, whether it equals the plain loop
    token by token (None: not asked), the first pair's acceptance, the first gated pair's fall-back fraction;
    seconds of all.

    seconds: of training.
    """
    keys = (
        "correct",
        "aligned",
        "both",
        "win_rate",
        "lc_win_rate",
        "lc_standard_error",
        "n",
        "average_length",
        "changed_fraction",
        "fallback_fraction",
        "mean_kl",
        "acceptance",
    )
    table = {}
    for row in rows:
        table[row["system"]] = {key: row[key] for key in keys if key in row}
        table[row["system"]]["win_rate_ci95"] = [row["win_rate_low"], row["win_rate_high"]]
        if "both_low" in row:
            table[row["system"]]["both_ci95"] = [row["both_low"], row["both_high"]]
    files = {name: answer_files.speed_path(system.output) for name, system in systems.items()}
    speed = {name: read_json(path) for name, path in files.items() if path.is_file()}
    pairs = [row for row in rows if "acceptance" in row]
    gated = [row for row in pairs if systems[row["system"]].params.sample_mode == "par_kl"]
    decoding_figures = {
        "tokens_per_second": {name: figures["tokens_per_second"] for name, figures in speed.items()},
        "identical_to_plain": identical,
        "acceptance": pairs[0]["acceptance"] if pairs else None,
        "fallback_fraction": (gated or pairs)[0]["fallback_fraction"] if pairs else None,
    }
    seconds += sum(figures["seconds"] for figures in speed.values())
    return {"systems": table, "decoding": decoding_figures, "seconds": seconds}


# ---- gathering ---------------------------------------------------------------------------------------------


def gather(
    systems: dict[str, System],
    jobs: dict[str, AnswerJob],
    answers: dict[str, list[dict]],
    judgements: dict[str, tuple[Path, list[dict]]],
    rows: list[tuple[int, dict]],
    board: list[dict[str, Any]],
    curves: dict[str, list[dict]],
    config: DictConfig,
    task: str,
    folder: Path,
) -> dict[str, Any]:
    """Everything that a report shows, as JSON takes it; the form of `report.write_report`'s argument.

    judgements: by system, the file that they lie in and the rows of it. folder: the report's; files are named
    from there.
    """
    notes = [
        f"{config.experiment_name}: {len(rows)} test rows of {config.evaluation.dataset}/{task}, seed "
        f"{config.seed}, judge {config.judge.name}, answers compared with {config.evaluation.reference}."
    ]
    notes += [warning for row in board if (warning := statistics.gate_warning(row))]
    figures = {name: influence.read_figures(system.output, jobs[name]) for name, system in systems.items()}
    settings = next(iter(systems.values())).settings
    return {
        "title": f"{config.experiment_name}: {task}",
        "notes": notes,
        "board": board,
        "curves": curves,
        "reference": config.evaluation.reference,
        "systems": [
            {
                "name": name,
                "folder": os.path.relpath(system.folder, folder),
                "judgements": os.path.relpath(judgements[name][0], folder),
                "pair": bool(system.pair.proposal and system.pair.aligner),
                "note": note_on(system, answers[name], figures[name], config.evaluation.examples),
            }
            for name, system in systems.items()
        ],
        "rows": [
            {
                "id": row_id,
                "prompt": record[settings.input_key],
                "reference": record[settings.output_key],
                "answers": [
                    answer_entry(answers[name][place], judgements[name][1][place], figures[name].get(place))
                    for name in systems
                ],
            }
            for place, (row_id, record) in enumerate(rows)
        ],
    }


def note_on(system: System, answers: list[dict], figures: dict[int, dict], n: int) -> str | None:
    """What a reader must know of a pair's tokens in the page; None where there is nothing to say."""
    if not (system.pair.proposal and system.pair.aligner):
        return None
    if not figures and n:
        if any("token_ids" not in answer for answer in answers):
            return (
                "no influence per token: these answers were kept without their token ids; generate them "
                "again (overwrite=true)"
            )
        return "no influence per token: run evaluation.steps=[influence,report]"
    if system.params.sample_mode == "snis" and figures:
        return (
            "snis draws new candidates at every position and has no fixed law: p and influence are left out"
        )
    return None


def answer_entry(answer: dict, judgement: dict, figures: dict | None) -> dict[str, Any]:
    """One answer as the page has it. Of a pair either runs of tokens with the same event, or, where there are
    figures, every token with its own.
    """
    text = answer["text"]
    entry = {"judged": judgement, "length": len(text), "n": answer["n_tokens"]}
    if answer["finish_reason"] == "length":
        entry["cut"] = True
    if answer.get("events") is None:
        return entry | {"text": text}
    tokens, codes = answer["tokens"], "".join(CODES[event] for event in answer["events"])
    stats = answer["stats"]
    entry["stats"] = {
        "fallback": influence.finite(stats["fallback_fraction"]),
        "kl": influence.finite(stats["mean_kl"]),
        "acceptance": influence.finite(stats["accepted"] / stats["drafted"]) if stats["drafted"] else None,
    }
    entry["events"] = {code: codes.count(code) for code in CODES.values()}
    whole = "".join(tokens)
    # What was drawn beyond the answer: the token or the string that ended it.
    entry["tail"] = len(whole) - len(text) if whole.startswith(text) else 0
    if figures is None:
        runs = groupby(zip(codes, tokens, strict=True), key=lambda pair: pair[0])
        return entry | {"runs": [[code, "".join(token for _, token in run)] for code, run in runs]}
    return entry | {
        "tokens": tokens,
        "codes": codes,
        "influence": influences(figures),
        "kl": [rounded(value) for value in figures["kl"]],
        "candidates": [
            [[word, *map(rounded, shares)] for word, *shares in kept] for kept in figures["candidates"]
        ],
    }


def influences(figures: dict[str, Any]) -> list[float | str | None]:
    """log p - log P_M of every token in nats; "outside" where the proposal's own law excludes it, None where
    there is no p.
    """
    given = figures["logp"] or [None] * len(figures["kl"])
    return [
        None if p is None else "outside" if own is None else rounded(p - own)
        for p, own in zip(given, figures["logp_proposal"], strict=True)
    ]


def rounded(value: float | None) -> float | None:
    """To the digits that the page shows."""
    return None if value is None else float(f"{value:.3g}")


# ---- saved and made again ----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as JSON and UTF-8 hold it: numbers that are not finite become None, halves of surrogate pairs
    question marks.
    """
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(folder: Path, gathered: dict[str, Any]) -> dict[str, Any]:
    """Writes report.json and everything that is made from it."""
    found = plain(gathered)
    saved = {"format": FORMAT, "sha256": fingerprint(found), "report": found}
    write_text(folder / SAVED, json.dumps(saved, ensure_ascii=False, separators=(",", ":")) + "\n")
    return rebuild(folder)


def rebuild(path: Path) -> dict[str, Any]:
    """Makes report.html, leaderboard.md and leaderboard.tex from the report.json in a folder; returns what it
    holds.

    path: the folder, or a file in it. Raises UserError where there is none, or it is not what was written.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / SAVED).is_file():
        raise UserError(
            f"report={path}: no {SAVED} there; give the folder that an evaluation wrote report.html into"
        )
    saved = read_json(folder / SAVED)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(
            f"{folder / SAVED}: not a report of this version (format {FORMAT}); run pipeline.py again with "
            "the settings of that evaluation"
        )
    found = saved.get("report")
    if fingerprint(plain(found)) != saved.get("sha256"):
        raise UserError(
            f"{folder / SAVED}: was changed after it was written; run pipeline.py again with the settings of "
            "that evaluation"
        )
    page.write_report(folder / "report.html", found)
    write_text(folder / "leaderboard.md", statistics.markdown(found["board"]))
    write_text(folder / "leaderboard.tex", statistics.latex(found["board"]))
    log.info(f"report   {folder / 'report.html'}")
    return found
