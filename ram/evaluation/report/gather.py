"""The data of an evaluation's report: gathered once, saved as report.json, rendered from there.

    answers, judgements, token-level figures, metrics.csv -> report.json -> report.html, leaderboard.md, .tex

The page is always rendered from the saved file, so `python pipeline.py report=FOLDER` gives the same bytes
again without models or answers.
"""

import contextlib
import csv
import json
import math
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ram.answers import answer_files, influence, influence_files
from ram.decoding import rows as decoding_rows
from ram.errors import UserError
from ram.evaluation import statistics, tables, trust
from ram.evaluation.context import EvaluationContext
from ram.evaluation.report import neighbours, opening, page
from ram.evaluation.report.charts import finite
from ram.evaluation.systems import System
from ram.log import log
from ram.models import run_folder
from ram.settings import recipes
from ram.storage.files import file_sha256, fingerprint, read_json, write_text
from ram.storage.provenance import Manifest

SAVED, PAGE, FORMAT = neighbours.SAVED, neighbours.PAGE, 1
MOST_TOKENS = 100_000  # tokens whose figures a page holds, about 15 MB
CODES = {decoding_rows.AGREED: "a", decoding_rows.CHANGED: "c", decoding_rows.FELL_BACK: "f"}
CURVES = ("split", "examples", "loss", "target_logp_per_token", "sampled_logp_per_token")  # of metrics.csv
SHARES = ("correct", "aligned", "both", "win_rate", "lc_win_rate", "lc_standard_error", "n", "average_length")
LIKELIHOOD = ("nll", "nll_low", "nll_high", "coverage", "kl_to_anchor", "margin", "pairwise_accuracy")
DECODING = ("changed_fraction", "fallback_fraction", "mean_kl", "acceptance")


# ---- results of the stages ---------------------------------------------------------------------------------


def training_seconds(stages: Sequence[recipes.Stage]) -> float:
    """Return the time that the recipe's finished stages took."""
    speeds = [answer_files.read_speed(stage.output) for stage in stages if stage.kind == "sample"]
    records = [run_folder.finished_run(stage.output) for stage in stages if stage.kind == "train"]
    return sum(record["seconds"] for record in [*records, *speeds] if record)


def training_curves(stages: Sequence[recipes.Stage]) -> dict[str, list[dict]]:
    """Return the columns of metrics.csv that the report draws, for each training stage that has run."""
    curves = {}
    for stage in stages:
        path = stage.output / run_folder.METRICS
        if stage.kind != "train" or not path.is_file():
            continue
        digest = (run_folder.finished_run(stage.output) or {}).get(run_folder.CURVE)
        if digest and digest != file_sha256(path):
            log.warning(f"{path}: was changed after it was written; its curves are left out")
            continue
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            curves[stage.name] = [
                {key: row.get(key) if key == "split" else finite(row.get(key)) for key in CURVES}
                for row in csv.DictReader(file)
            ]
    return curves


def results(context: EvaluationContext) -> dict[str, Any]:
    """Return results.json: each system's figures, those of decoding, and the seconds of all stages.

    Under `decoding`, `acceptance` is the first pair's, `fallback_fraction` the first gated pair's, and
    `identical_to_plain` is None if no rows were verified.
    """
    table = {}
    for row in context.board:
        table[row["system"]] = {key: row[key] for key in (*SHARES, *LIKELIHOOD, *DECODING) if key in row}
        table[row["system"]]["win_rate_ci95"] = [row["win_rate_low"], row["win_rate_high"]]
        if "both_low" in row:
            table[row["system"]]["both_ci95"] = [row["both_low"], row["both_high"]]
    speeds = {name: answer_files.read_speed(system.output) for name, system in context.systems.items()}
    speed = {name: figures for name, figures in speeds.items() if figures}
    pairs = [row for row in context.board if "acceptance" in row]
    gated = [row for row in pairs if context.systems[row["system"]].params.sample_mode == "par_kl"]
    decoding = {
        "tokens_per_second": {name: figures["tokens_per_second"] for name, figures in speed.items()},
        "identical_to_plain": context.identical,
        "acceptance": pairs[0]["acceptance"] if pairs else None,
        "fallback_fraction": (gated or pairs)[0]["fallback_fraction"] if pairs else None,
    }
    seconds = training_seconds(context.stages) + sum(figures["seconds"] for figures in speed.values())
    found = {"systems": table, "decoding": decoding, "seconds": seconds}
    return found | ({"judge": trusted} if (trusted := trust.figures(context)) else {})


# ---- gathering ---------------------------------------------------------------------------------------------


def gather(context: EvaluationContext) -> dict[str, Any]:
    """Return everything that a report shows, as plain JSON values; `page.write_report` takes it."""
    config, systems, settings = context.config, context.systems, context.settings
    notes = context.notes + tables.warnings(context.board)
    notes += [warning for row in context.board if (warning := statistics.gate_warning(row))]
    read = influence_files.read_figures
    figures = bounded({name: read(system.output, context.job(name)) for name, system in systems.items()})
    return {
        "title": f"{config.experiment_name}: {context.task}",
        "root": os.path.relpath(config.output_dir, context.folder),
        "about": opening.about(context),
        "notes": notes,
        "board": context.board,
        "columns": config.evaluation.columns,
        "curves": training_curves(context.stages),
        "reference": config.evaluation.reference,
        "systems": [
            {
                "name": name,
                "folder": os.path.relpath(system.folder, context.folder),
                "judgements": os.path.relpath(context.judgements_path(system), context.folder),
                "pair": system.is_pair,
                "note": note_on(system, context.answers[name], figures[name], config.evaluation.examples),
            }
            for name, system in systems.items()
        ],
        "rows": [
            {
                "id": row_id,
                "prompt": record[settings.input_key],
                "reference": record[settings.output_key],
                "answers": [
                    answer_entry(
                        context.answers[name][place],
                        context.judgements[name][place],
                        figures[name].get(place),
                    )
                    for name in systems
                ],
            }
            for place, (row_id, record) in enumerate(context.rows)
        ],
    }


def bounded(figures: dict[str, dict[int, dict]], most: int = MOST_TOKENS) -> dict[str, dict[int, dict]]:
    """Return the figures, by system and row, of as many evenly spread rows as `most` tokens allow."""
    rows = sorted({row for of_system in figures.values() for row in of_system})
    sizes = {row: sum(len(f[row]["kl"]) for f in figures.values() if row in f) for row in rows}
    count = len(rows)
    kept = rows
    while count > 1 and sum(sizes[row] for row in kept) > most:
        count = min(count - 1, int(count * most / sum(sizes[row] for row in kept)) or 1)
        kept = [rows[place] for place in influence_files.evenly_spread(count, len(rows))]
    chosen = set(kept)
    return {name: {row: f for row, f in found.items() if row in chosen} for name, found in figures.items()}


def note_on(system: System, answers: list[dict], figures: dict[int, dict], n: int) -> str | None:
    """Return the page's note on a pair's tokens, None if there is none."""
    if not system.is_pair:
        return None
    if any("events" not in answer for answer in answers):
        return "answered by a server, which does not say which tokens changed or fell back: left out"
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
    """Return one answer as the page shows it.

    An answer of a pair has every token with its figures or, without figures, runs of tokens with the same
    event.
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
    # Characters that were drawn beyond the answer: the token or the string that ended it.
    entry["tail"] = len(whole) - len(text) if whole.startswith(text) else 0
    if figures is None:
        runs = groupby(zip(codes, tokens, strict=True), key=lambda pair: pair[0])
        return entry | {"runs": [[code, "".join(token for _, token in run)] for code, run in runs]}
    return entry | {
        "tokens": tokens,
        "codes": codes,
        **influence.shown(figures),
    }


# ---- saving and rendering ----------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value that JSON and UTF-8 can hold.

    Numbers that are not finite become None, unpaired surrogates become question marks.
    """
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(folder: Path, gathered: dict[str, Any]) -> dict[str, Any]:
    """Write report.json and everything that is rendered from it; return the report.

    If it is new, the pages of the other reports are rendered again, so that they link this one.
    """
    report, is_new = plain(gathered), not (folder / SAVED).is_file()
    saved = {"format": FORMAT, "sha256": fingerprint(report), "report": report}
    write_text(folder / SAVED, json.dumps(saved, ensure_ascii=False, separators=(",", ":")) + "\n")
    for other in neighbours.others(folder, report.get("root")) if is_new else ():
        with contextlib.suppress(UserError):  # one of another version stays as it is
            page.write_report(
                other / PAGE, known := saved_report(other), neighbours.links(other, known.get("root"))
            )
    return rebuild(folder)


def rebuild(path: Path) -> dict[str, Any]:
    """Render report.html, leaderboard.md and leaderboard.tex from report.json; return the report.

    Args:
        path: the folder with report.json, or a file in it.

    Raises:
        UserError: if report.json is missing, damaged or of another version.
    """
    folder = path.parent if path.is_file() else path
    report = saved_report(path)
    page.write_report(folder / PAGE, report, neighbours.links(folder, report.get("root")))
    tables.write_shown_tables(folder, report["board"], report.get("columns", ()))
    log.info(f"report   {folder / PAGE}")
    return report


def saved_report(path: Path) -> dict[str, Any]:
    """Return the report that is saved in a folder, or in the folder of a file.

    Raises:
        UserError: if report.json is missing, damaged or of another version.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / SAVED).is_file():
        raise UserError(
            f"report={path}: no {SAVED} there; give the folder that an evaluation wrote {PAGE} into"
        )
    saved, remedy = read_json(folder / SAVED), "run pipeline.py again with the settings of that evaluation"
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "report" not in saved:
        raise UserError(f"{folder / SAVED}: not a report of this version (format {FORMAT}); {remedy}")
    manifest = Manifest({"format": FORMAT}, {"report": saved.get("sha256", "")})
    report = saved["report"]
    if manifest.damaged({"report": fingerprint(plain(report))}.get):
        raise UserError(f"{folder / SAVED}: was changed after it was written; {remedy}")
    return report
