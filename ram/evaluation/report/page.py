"""One self-contained HTML page per evaluation: leaderboard, plots, training curves, a browser of all answers.

Nothing is fetched. What can be seen without a script is HTML and SVG drawn here; the browser of answers is
assets/report.js, with answers.js for what a row looks like, over the answers embedded as JSON. A model
may write markup, so whatever comes from data passes `charts.text` or a number format, or is JSON that the
script puts into text nodes only; the page's policy lets no other style, script or address in.
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from ram.evaluation.report import charts
from ram.evaluation.report.charts import Curve, Point, finite, text
from ram.storage.files import write_text

PAGE = Path(__file__).parent / "assets"
STYLE = (PAGE / "report.css").read_text(encoding="utf-8") + charts.STYLE
SCRIPT = "".join((PAGE / name).read_text(encoding="utf-8") for name in ("answers.js", "report.js"))

# Columns of the leaderboard: heading, number format (none for text), meaning. Shown where a row has a value.
COLUMNS: dict[str, tuple[str, str, str]] = {
    "system": ("System", "", "what answered: one model alone, or a proposal with an aligner"),
    "n": ("n", ",.0f", "prompts judged"),
    "win_rate": (
        "Win rate",
        ".3f",
        "share of prompts won against the reference, ties half; "
        "dotted line at 0.5; range and whisker: 95 % percentile bootstrap over prompts",
    ),
    "failed": ("Failed", ",.0f", "prompts whose judgement failed; left out of all rates"),
    "length_controlled": (
        "At equal length",
        ".3f",
        "win rate with length taken out by a logistic model; not AlpacaEval's, which knows each prompt",
    ),
    "lc_win_rate": (
        "AlpacaEval LC",
        ".3f",
        "AlpacaEval's length-controlled win rate of its 805 questions: the share that would be won at equal "
        "lengths, by its logistic model with each question's difficulty",
    ),
    "lc_standard_error": (
        "LC error",
        ".3f",
        "its standard error as AlpacaEval gives it, of the mean over questions alone",
    ),
    "p_value": (
        "p",
        ".4f",
        "two-sided sign-flip test of the win rate against the first system's, row by row",
    ),
    "first_shown_wins": ("First wins", ".3f", "how often the judge preferred the answer it was shown first"),
    "both": ("Both", ".3f", "share of answers that are correct and aligned; range and whisker as before"),
    "correct": ("Correct", ".3f", "share of answers that name the right value and no other"),
    "aligned": ("Aligned", ".3f", "share of answers in the wanted style"),
    "average_length": ("Length", ",.0f", "characters per answer, mean over prompts"),
    "changed_fraction": (
        "Changed",
        ".3f",
        "share of tokens that the proposal alone would have drawn otherwise",
    ),
    "fallback_fraction": ("Fell back", ".3f", "share of tokens where KL(P_M||Q) was above div_threshold"),
    "mean_kl": ("Mean KL", ".3f", "KL(P_M||Q) in nats, mean over tokens"),
    "acceptance": (
        "Acceptance",
        ".3f",
        "share of tokens the aligner alone would have drawn with the same "
        "noise, as confirmed by the pair's law",
    ),
    "judge": ("Judge", "", "what compared the answers"),
    "judge_settings": ("Judge's settings", "", "its model, and what it was asked to judge"),
    "reference": ("Reference", "", "the answers compared against"),
    "commit": ("Commit", "", "of the checkout that made the table; +changes: files differ from it"),
}
SHARES = ("win_rate", "both")  # these come with an interval and get a bar
LENGTH_CONTROLLED = (  # the second mark of a win rate: key, what it is
    ("length_controlled", "at equal length"),
    ("lc_win_rate", "AlpacaEval's length-controlled"),
)
MOSTLY_FELL_BACK = "the pair mostly fell back to the proposal, for more than half of its tokens"
MAX_POINTS = 300  # of a train curve; more only cost file size at this width
DASH = "–"


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes the page to `path`, whole or not at all; the same report gives the same bytes.

    report: what `report_data.gather` makes. title; notes, paragraphs of plain text, one that starts with
    "warning:" is set off; board, the leaderboard's rows in the order to show, with "system" and any of
    COLUMNS, win_rate and both with _low and _high; curves, stage -> records of its metrics.csv; reference,
    "output" or the system that answers are compared with; systems; rows, with the answers of all systems.
    Values that are missing, empty or not finite are left out or shown as a dash.
    """
    paragraphs = ""
    for note in report["notes"]:
        kind = ' class="warning"' if note.lower().startswith("warning:") else ""
        paragraphs += f"<p{kind}>{text(note)}</p>\n"
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    policy += "base-uri 'none'; form-action 'none'"
    sections = {
        "Leaderboard": _leaderboard(report["board"]),
        "Plots": _plots(report),
        "Training": _stages(report["curves"]),
        "Answers": _answers(report),
    }
    links = body = ""
    for name, section in sections.items():
        if section:
            links += f'<a href="#{name.lower()}">{name}</a>\n'
            body += (
                f'<section aria-labelledby="{name.lower()}"><h2 id="{name.lower()}">{name}</h2>\n{section}'
            )
            body += "</section>\n"
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(report["title"])}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head>
<body><main><header><h1>{text(report["title"])}</h1>
<nav aria-label="Sections">{links}</nav></header>
{paragraphs}{body}</main>
</body></html>
""",
    )


def _hash(inline: str) -> str:
    """What a policy calls an inline style sheet or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def embedded(value: Any) -> str:
    """JSON that can stand in a script element whatever its strings hold; JSON.parse gives the same value."""
    found = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub(
        "[<>&\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", found
    )


# ---- leaderboard -------------------------------------------------------------------------------------------


def _leaderboard(rows: list[dict]) -> str:
    if not rows:
        return "<p>No system was evaluated.</p>"
    shown = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("failed") for row in rows):
        shown = [key for key in shown if key != "failed"]
    common = []
    for key in ("judge", "judge_settings", "reference", "commit"):
        # One value for the whole table is said once: the width is better spent on numbers.
        if key in shown and len({row.get(key) for row in rows}) == 1:
            shown.remove(key)
            common.append(f"{COLUMNS[key][0]}: {text(rows[0][key])}")
    header = meanings = ""
    for key in shown:
        heading, _, meaning = COLUMNS[key]
        header += f'<th scope="col" class="{_style(key)}" title="{text(meaning)}">{heading}</th>'
        meanings += f"<dt>{heading}</dt><dd>{text(meaning)}</dd>"
    lines = "\n".join(
        f"<tr>{''.join(_cell(number, row, key) for key in shown)}</tr>" for number, row in enumerate(rows, 1)
    )
    return f"""<div class="scroll" role="region" aria-labelledby="leaderboard" tabindex="0"><table>
<caption><span>One system a line, its number that of the plots; shares run from 0 to 1</span></caption>
<thead><tr>{header}</tr></thead><tbody>
{lines}
</tbody></table></div>
<p class="small">{" · ".join(common)}</p>
<details class="small"><summary>What the columns mean</summary><dl>{meanings}</dl></details>"""


def _style(key: str) -> str:
    return "share" if key in SHARES else "number" if COLUMNS[key][1] else "name"


def _cell(number: int, row: dict, key: str) -> str:
    spec, value = COLUMNS[key][1], row.get(key)
    value = finite(value) if spec else value
    shown = DASH if value in (None, "") else text(format(value, spec))
    if key == "system":
        # A long name breaks where its parts meet.
        name = shown.replace("+", "+<wbr>").replace("[", "<wbr>[")
        return f'<th scope="row"><span class="small">{number}</span>&nbsp;{name}</th>'
    if key in SHARES and value is not None:
        low, high = finite(row.get(f"{key}_low")), finite(row.get(f"{key}_high"))
        interval = "" if low is None or high is None else f" {low:{spec}}{DASH}{high:{spec}}"
        bar = _bar(value, low, high, halved=key == "win_rate")
        shown = f'<b>{shown}</b><span class="small">{interval}</span>{bar}'
    if key == "fallback_fraction" and (value or 0) > 0.5:
        shown = f'<span class="alert" title="{MOSTLY_FELL_BACK}">{shown}</span>'
    return f'<td class="{_style(key)}">{shown}</td>'


def _bar(value: float, low: float | None, high: float | None, halved: bool) -> str:
    """A share from 0 to 1 with its interval; for the eye only, the numbers stand beside it."""
    shapes = '<rect class="track" y="5" width="132" height="6"/>'
    shapes += f'<rect class="value" y="5" width="{132 * value:.1f}" height="6"/>'
    if halved:
        shapes += '<path class="half" d="M66 1V15"/>'
    if low is not None and high is not None:
        left, right = f"{132 * low:.1f}", f"{132 * high:.1f}"
        shapes += f'<path class="whisker" d="M{left} 4V12M{left} 8H{right}M{right} 4V12"/>'
    return f'<svg viewBox="-2 0 136 16" aria-hidden="true">{shapes}</svg>'


# ---- plots -------------------------------------------------------------------------------------------------


def _plots(report: dict[str, Any]) -> str:
    """Win rates, lengths, and of every pair how its answers' figures are spread over the rows."""
    board = {row["system"]: row for row in report["board"] if finite(row.get("win_rate")) is not None}
    if not board or not report["rows"]:
        return ""
    # AlpacaEval's own figure where there is one; never both, which are not to be compared.
    by_alpaca = any(finite(row.get("lc_win_rate")) is not None for row in board.values())
    controlled, mark = LENGTH_CONTROLLED[by_alpaca]
    points = []
    for name, row in board.items():
        ends = [finite(row.get(key)) for key in ("win_rate_low", "win_rate_high", controlled)]
        points.append(Point(name, finite(row.get("average_length")) or 0.0, float(row["win_rate"]), *ends))
    compared = report["reference"]
    against = "the test file's answers" if compared == "output" else compared
    found = charts.intervals("Win rate", points, f"against {against}", 0.5, mark)
    references = [len(row["reference"]) for row in report["rows"] if row["reference"] is not None]
    average = sum(references) / len(references) if compared == "output" and references else None
    units = "characters per answer, mean", "win rate"
    found += charts.scatter("Win rate by length", points, units, (average, 0.5))
    lengths = [(0, "in the test file", references)] if references else []
    for place, system in enumerate(report["systems"]):
        of_system = [row["answers"][place]["length"] for row in report["rows"]]
        lengths.append((place + 1, system["name"], of_system))
    found += charts.boxes("Lengths of answers", lengths, "characters")
    return f'<div class="charts">{found}</div>\n{_histograms(report)}'


# Of every answer of a pair: key of its figures, title, unit.
BY_ROW = (
    ("fallback", "Fell back", "of its tokens"),
    ("kl", "Mean KL(P_M‖Q)", "nats a token"),
    ("acceptance", "Acceptance", "of its tokens"),
)


def _histograms(report: dict[str, Any]) -> str:
    """Histograms of every pair over ranges that are the same in all of them; none where all rows have 0."""
    values: dict[tuple[int, str], list[float]] = {}
    for place in range(len(report["systems"])):
        for key, *_ in BY_ROW:
            given = [finite(row["answers"][place].get("stats", {}).get(key)) for row in report["rows"]]
            values[place, key] = [value for value in given if value is not None]
    highs = dict.fromkeys((key for key, *_ in BY_ROW), 1.0)
    highs["kl"] = max((max(v) for (_, key), v in values.items() if key == "kl" and v), default=0.0) or 1.0
    found = ""
    for place, system in enumerate(report["systems"]):
        drawn = "".join(
            charts.histogram(title, system["name"], values[place, key], highs[key], unit)
            for key, title, unit in BY_ROW
            if any(values[place, key])
        )
        if drawn:
            name = f'<span class="small">{place + 1}</span> {text(system["name"])}'
            found += f'<div><h4>{name}</h4><div class="charts three">{drawn}</div></div>\n'
    return f'<h3>Rows of each pair</h3>\n<div class="pairs">{found}</div>' if found else ""


# ---- training curves ---------------------------------------------------------------------------------------


def _stages(curves: dict[str, list[dict]]) -> str:
    sections = "".join(_stage(stage, records) for stage, records in curves.items())
    return f'<div class="stages">{sections}</div>\n' if sections else ""


def _stage(stage: str, records: list[dict]) -> str:
    """A chart of the loss and, where there is a sampled term to compare with, one of the two terms."""
    drawn = [_chart(stage, "loss", "nats per example", records, {"": "loss"})]
    terms = {term: f"{term}_logp_per_token" for term in ("target", "sampled")}
    if any(finite(record.get(terms["sampled"])) is not None for record in records):
        drawn.append(_chart(stage, "log-probability by term", "nats per token", records, terms))
    drawn = [chart for chart in drawn if chart]
    width = ' class="two"' if len(drawn) > 1 else ""
    body = f'<h3>{text(stage)}</h3><div class="charts">{"".join(drawn)}</div>'
    return f"<div{width}>{body}</div>\n" if drawn else ""


def points_of(records: list[dict], split: str, column: str) -> list[tuple[float, float]]:
    """(examples, value) of one split, the train points averaged in equal runs down to MAX_POINTS."""
    pairs = [(finite(r.get("examples")), finite(r.get(column))) for r in records if r.get("split") == split]
    points = sorted((x, y) for x, y in pairs if x is not None and y is not None)
    size = math.ceil(len(points) / MAX_POINTS) if split == "train" and points else 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _chart(stage: str, what: str, unit: str, records: list[dict], columns: dict[str, str]) -> str:
    """A figure with the train and held-out curves of columns, given as name (or "") -> column."""
    curves = []
    for colour, (term, column) in enumerate(columns.items()):
        for split, words in (("train", "train"), ("heldout", "held out")):
            style = "sampled" if split == "train" and colour else split
            if points := points_of(records, split, column):
                curves.append(Curve(f"{term}, {words}" if term else words, points, colour, style))
    label = f"{stage}: {what} in {unit} over examples"
    return charts.lines(what.capitalize(), label, unit, "examples", curves) if curves else ""


# ---- answers -----------------------------------------------------------------------------------------------


def _answers(report: dict[str, Any]) -> str:
    """What the script needs, and what is said where it cannot run."""
    systems, rows = report["systems"], report["rows"]
    if not rows:
        return ""
    files = "".join(
        f"<li>{text(system['name'])}: {text(system['folder'])}/output.json</li>" for system in systems
    )
    data = embedded({key: report[key] for key in ("reference", "systems", "rows")})
    return f"""<noscript><p class="warning">Here stands a browser of all {len(rows):,} prompts with the
answers of {len(systems)} systems, their judgements and, token by token, what the aligner changed. It needs
scripts, which are off; the answers themselves lie beside this page.</p>
<ul class="small">{files}</ul></noscript>
<div id="browser"></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
"""
