"""One self-contained HTML page per evaluation: leaderboard, plots, training curves, a browser of all answers.

The page fetches nothing. assets/report.html.j2 is its template; charts.py draws the charts. The browser of
answers is assets/report.js, with answers.js for the look of a row, over the answers embedded as JSON.

A model may write markup. The template therefore escapes every value, the script puts strings into text nodes
only, and the page's policy allows no other style, script or address.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ram.answers import influence
from ram.evaluation import tables
from ram.evaluation.report import charts
from ram.evaluation.report.charts import Curve, Point, finite, text, visible
from ram.evaluation.tables import heading
from ram.storage.files import write_text

PAGE = Path(__file__).parent / "assets"
STYLE = (PAGE / "report.css").read_text(encoding="utf-8") + influence.STYLE + charts.STYLE
SCRIPT = influence.SCRIPT + "".join(
    (PAGE / name).read_text(encoding="utf-8") for name in ("answers.js", "report.js")
)

SHARES = ("win_rate", "both")  # columns with an interval, which get a bar


class Column(NamedTuple):
    """A column of the leaderboard, which is shown if any row has a value for it."""

    heading: str
    number_format: str  # empty for text
    meaning: str

    @property
    def style(self) -> str:
        """The column's class in the style sheet."""
        if self in (COLUMNS[key] for key in SHARES):
            return "share"
        return "number" if self.number_format else "name"


COLUMNS = {
    "system": Column("System", "", "one model alone, or a proposal with an aligner"),
    "n": Column("n", ",.0f", "prompts judged"),
    "win_rate": Column(
        "Win rate",
        ".3f",
        "share of prompts won against the reference; a tie counts half; dotted line at 0.5; "
        "range and whisker: 95 % score interval over prompts",
    ),
    "failed": Column("Failed", ",.0f", "prompts whose judgement failed; excluded from all rates"),
    "length_controlled": Column(
        "At equal length",
        ".3f",
        "win rate with the effect of length removed by a logistic model; unlike AlpacaEval's, it has no "
        "difficulty for each prompt",
    ),
    "lc_win_rate": Column(
        "AlpacaEval LC",
        ".3f",
        "AlpacaEval's length-controlled win rate on its 805 questions: the share that would be won at equal "
        "lengths, by its logistic model with each question's difficulty",
    ),
    "lc_standard_error": Column(
        "LC error", ".3f", "its standard error as AlpacaEval computes it, over questions only"
    ),
    "p_value": Column(
        "p",
        ".4f",
        "two-sided sign-flip test of the win rate against the first system's, row by row; "
        "≤: no random flip reached the difference",
    ),
    "first_shown_wins": Column(
        "First wins", ".3f", "how often the judge preferred the answer that it was shown first"
    ),
    "both": Column(
        "Both", ".3f", "share of answers that are correct and aligned; range and whisker as before"
    ),
    "correct": Column("Correct", ".3f", "share of answers that name the right value and no other"),
    "aligned": Column("Aligned", ".3f", "share of answers in the target style"),
    "nll": Column(
        "Nats/token",
        ".3f",
        "held-out negative log-likelihood of the test file's answers at temperature 1, smoothed with 0.01 of "
        "the anchor's distribution; lower is better; range: 95 % bootstrap over prompts",
    ),
    "nll_difference": Column(
        "Difference",
        "+.3f",
        "of nats per token from the first system that has any, row by row; range: 95 % bootstrap",
    ),
    "nll_undecided": Column(
        "Undecided against", "", "systems whose order in nats per token changes with the share of the anchor"
    ),
    "coverage": Column("Coverage", ".3f", "share of the answers' tokens in the support; a diagnostic"),
    "kl_to_anchor": Column(
        "KL to anchor", ".3f", "divergence from the anchor's distribution, nats per token of the answers"
    ),
    "pairwise_accuracy": Column(
        "Pairwise", ".3f", "share of prompts with the known answer more probable than the worse one"
    ),
    "average_length": Column("Length", ",.0f", "characters per answer, mean over prompts"),
    "changed_fraction": Column(
        "Changed", ".3f", "share of tokens that differ from those the proposal alone would have drawn"
    ),
    "fallback_fraction": Column(
        "Fell back", ".3f", "share of a par_kl pair's tokens whose divergence was above div_threshold"
    ),
    "mean_kl": Column("Mean KL", ".3f", "KL(P_M||Q) in nats, mean over tokens"),
    "acceptance": Column(
        "Acceptance",
        ".3f",
        "share of tokens that the aligner alone would also have drawn with the same random numbers "
        "(the draft acceptance rate)",
    ),
    "judge": Column("Judge", "", "the method that compared the answers"),
    "judge_settings": Column("Judge's settings", "", "its model, and the question it was asked"),
    "reference": Column("Reference", "", "the answers compared against"),
    "test_file": Column("Test file", "", "the file of the questions"),
    "commit": Column("Commit", "", "of the checkout that made the table; +changes: files differ from it"),
}
LENGTH_CONTROLLED = (  # the second mark of a win rate: key, meaning
    ("length_controlled", "at equal length"),
    ("lc_win_rate", "AlpacaEval's length-controlled"),
)
MOSTLY_FELL_BACK = "the pair fell back to the proposal for more than half of its tokens"
HARDLY_CHANGED = (
    "the aligner changed less than 1 % of the tokens: the pair answers almost as its proposal alone"
)
MAX_POINTS = 300  # of a train curve; more points only make the file larger at this width
DASH = "–"


class Cell(NamedTuple):
    """A cell of the leaderboard."""

    style: str
    text: str
    number: int | None = None  # of the system, in its first cell
    interval: str = ""
    bar: Markup | None = None
    alert: str = ""  # the reason why a value stands out


def write_report(path: Path, report: dict[str, Any], others: Sequence[tuple[str, str]] = ()) -> None:
    """Write the page; the same report gives the same bytes.

    Values that are missing, empty or not finite are left out or shown as a dash.

    Args:
        path: The file to write, completely or not at all.
        report: The result of `gather`, with the keys
            title: a text;
            about: the opening, as `opening.about` makes it; reports of earlier versions have none;
            columns: further columns of the board, if any;
            notes: paragraphs of plain text; one that begins with "warning:" is highlighted;
            board: the leaderboard's rows in order, each with "system" and any of COLUMNS; win_rate and both
            come with _low and _high;
            curves: stage -> records of its metrics.csv;
            reference: "output", or the system that answers are compared with;
            systems, rows: the systems, and the answers of all systems to each prompt.
        others: name and address of the other reports of the same output folder.
    """
    policy = f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
    policy += "base-uri 'none'; form-action 'none'"
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=report["title"],
            policy=policy,
            style=Markup(STYLE),
            script=Markup(SCRIPT),
            notes=report["notes"],
            about=report.get("about"),
            others=others,
            board=_leaderboard(report["board"], report.get("columns", ())),
            plots=_plots(report),
            stages=_stages(report["curves"]),
            answers=_answers(report),
        )
    )
    write_text(path, page)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else visible(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    return environment


def breakable(name: str) -> Markup:
    """The name of a system, which may be broken into lines between its parts."""
    return Markup(text(name).replace("+", "+<wbr>").replace("[", "<wbr>["))


def _hash(inline: str) -> str:
    """The source expression of a policy that allows one inline style sheet or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def embedded(value: Any) -> Markup:
    """JSON for a script element. No string can end the element; JSON.parse gives the same value."""
    encoded = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    special = "[<>&\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]"
    return Markup(re.sub(special, lambda match: f"\\u{ord(match[0]):04x}", encoded))


# ---- leaderboard -------------------------------------------------------------------------------------------


def _leaderboard(rows: list[dict], further: Sequence[str] = ()) -> dict[str, Any] | None:
    """The columns and cells of the table, and the values that all rows have in common.

    Args:
        rows: The leaderboard.
        further: Columns of leaderboard.csv that are shown too (`evaluation.columns`).
    """
    if not rows:
        return None
    columns: dict[str, Column] = {}
    for known, column in COLUMNS.items():
        columns[known] = column
        if known != "aligned":
            continue
        for key in further:  # beside the judge's other shares, so that they need no scrolling
            is_style = key.startswith("style_")
            meaning = "share of answers in this style" if is_style else f"{key} of leaderboard.csv"
            form = ".3f" * any(isinstance(row.get(key), float) for row in rows)
            columns.setdefault(key, COLUMNS.get(key) or Column(heading(key).capitalize(), form, meaning))
    keys = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("failed") for row in rows):
        keys = [key for key in keys if key != "failed"]
    common = []
    for key in ("judge", "judge_settings", "reference", "test_file", "commit"):
        # A value that is the same in the whole table is stated once below it, to save width.
        if key in keys and len({row.get(key) for row in rows}) == 1:
            keys.remove(key)
            common.append((COLUMNS[key].heading, rows[0][key]))
    cells = [
        [_cell(number, row, key, columns[key]) for key in keys] for number, row in enumerate(rows, start=1)
    ]
    return {"columns": [columns[key] for key in keys], "rows": cells, "common": common}


def _cell(number: int, row: dict[str, Any], key: str, column: Column) -> Cell:
    value = row.get(key)
    spec = column.number_format
    value = finite(value) if spec else value
    shown = DASH if value in (None, "") else format(value, spec)
    if key == "system":
        return Cell(column.style, shown, number=number)
    if key in SHARES and isinstance(value, float):
        low, high = finite(row.get(f"{key}_low")), finite(row.get(f"{key}_high"))
        interval = "" if low is None or high is None else f" {low:{spec}}{DASH}{high:{spec}}"
        return Cell(column.style, shown, interval=interval, bar=_bar(value, low, high, key == "win_rate"))
    low, high = finite(row.get(f"{key}_low")), finite(row.get(f"{key}_high"))
    if isinstance(value, float) and low is not None and high is not None:
        shown += f" ({low:{spec}} to {high:{spec}})"
    if key == "p_value" and value is not None:
        shown = tables.p_value(row)
    alert = ""
    if key == "fallback_fraction" and isinstance(value, float) and value > influence.MOST_FALLEN:
        alert = MOSTLY_FELL_BACK
    if key == "changed_fraction" and isinstance(value, float) and value < influence.LEAST_CHANGED:
        alert = HARDLY_CHANGED
    return Cell(column.style, shown, alert=alert)


def _bar(value: float, low: float | None, high: float | None, half: bool) -> Markup:
    """A drawing of a share from 0 to 1 with its interval; the numbers are beside it.

    Args:
        value: The share.
        low: Lower end of its interval, or None.
        high: Upper end of its interval, or None.
        half: Draw a line at 0.5.
    """
    shapes = '<rect class="track" y="5" width="132" height="6"/>'
    shapes += f'<rect class="value" y="5" width="{132 * value:.1f}" height="6"/>'
    if half:
        shapes += '<path class="half" d="M66 1V15"/>'
    if low is not None and high is not None:
        left, right = f"{132 * low:.1f}", f"{132 * high:.1f}"
        shapes += f'<path class="whisker" d="M{left} 4V12M{left} 8H{right}M{right} 4V12"/>'
    return Markup(f'<svg viewBox="-2 0 136 16" aria-hidden="true">{shapes}</svg>')


# ---- plots -------------------------------------------------------------------------------------------------


def _plots(report: dict[str, Any]) -> dict[str, Any] | None:
    """Charts of win rates and lengths, and for each pair the distribution of its figures over the rows."""
    board = {row["system"]: row for row in report["board"] if finite(row.get("win_rate")) is not None}
    if not board or not report["rows"]:
        return None
    # AlpacaEval's own figure if there is one. The two kinds are not comparable, so never both.
    by_alpaca = any(finite(row.get("lc_win_rate")) is not None for row in board.values())
    controlled, mark = LENGTH_CONTROLLED[by_alpaca]
    keys, points = ("average_length", "win_rate_low", "win_rate_high", controlled), []
    for name, row in board.items():
        x, low, high, other = map(finite, map(row.get, keys))
        points.append(Point(name, x or 0.0, float(row["win_rate"]), low, high, other))
    reference = report["reference"]
    against = "the test file's answers" if reference == "output" else reference
    reference_lengths = [len(row["reference"]) for row in report["rows"] if row["reference"] is not None]
    average = None
    if reference == "output" and reference_lengths:
        average = sum(reference_lengths) / len(reference_lengths)
    lengths = [(0, "in the test file", reference_lengths)] if reference_lengths else []
    for place, system in enumerate(report["systems"]):
        of_system = [row["answers"][place]["length"] for row in report["rows"]]
        lengths.append((place + 1, system["name"], of_system))
    units = ("characters per answer, mean", "win rate")
    drawings = [
        charts.intervals("Win rate", points, f"against {against}", 0.5, mark),
        charts.scatter("Win rate by length", points, units, (average, 0.5)),
        charts.boxes("Lengths of answers", lengths, "characters"),
    ]
    styles = [
        (at, row) for at, row in enumerate(report["board"], 1) if any(k in row for k in style_keys(row))
    ]
    if styles:
        names = [heading(key) for key in style_keys(styles[0][1])]
        parts = [
            (at, row["system"], [finite(row.get(k)) or 0.0 for k in style_keys(row)]) for at, row in styles
        ]
        drawings.append(charts.stacks("Styles of answers", parts, names, "share of answers"))
    likely = [
        Point(row["system"], x, y, finite(row.get("nll_low")), finite(row.get("nll_high")), number=number)
        for number, row in enumerate(report["board"], start=1)
        if (x := finite(row.get("kl_to_anchor"))) is not None and (y := finite(row.get("nll"))) is not None
    ]
    if likely:
        units = ("KL to the anchor, nats per token", "nats per token")
        drawings.append(charts.scatter("Held-out likelihood", likely, units, (None, likely[0].y)))
    return {"charts": drawings, "pairs": _histograms(report)}


def style_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.startswith("style_")]


# Figures of a pair's answers that get a histogram: key, title, unit.
BY_ROW = (
    ("fallback", "Fell back", "of its tokens"),
    ("kl", "Mean KL(P_M‖Q)", "nats a token"),
    ("acceptance", "Acceptance", "of its tokens"),
)


def _histograms(report: dict[str, Any]) -> list[tuple[int, str, list[Markup]]]:
    """For each pair its number, name and histograms; figures that are 0 in every row have none.

    A figure has the same range in all pairs.
    """
    values: dict[tuple[int, str], list[float]] = {}
    for place in range(len(report["systems"])):
        for key, *_ in BY_ROW:
            figures = [finite(row["answers"][place].get("stats", {}).get(key)) for row in report["rows"]]
            values[place, key] = [value for value in figures if value is not None]
    highs = dict.fromkeys((key for key, *_ in BY_ROW), 1.0)
    highs["kl"] = max((max(v) for (_, key), v in values.items() if key == "kl" and v), default=0.0) or 1.0
    pairs = []
    for place, system in enumerate(report["systems"]):
        drawings = [
            charts.histogram(title, system["name"], values[place, key], highs[key], unit)
            for key, title, unit in BY_ROW
            if any(values[place, key])
        ]
        if drawings:
            pairs.append((place + 1, system["name"], drawings))
    return pairs


# ---- training curves ---------------------------------------------------------------------------------------


def _stages(curves: dict[str, list[dict]]) -> list[tuple[str, list[Markup]]]:
    """Each stage that has records, with its charts."""
    stages = [(stage, _stage(stage, records)) for stage, records in curves.items()]
    return [(stage, drawings) for stage, drawings in stages if drawings]


def _stage(stage: str, records: list[dict]) -> list[Markup]:
    """A chart of the loss and, if the loss has a sampled term, one of its two terms."""
    drawings = [_chart(stage, "loss", "nats per example", records, {"": "loss"})]
    terms = {term: f"{term}_logp_per_token" for term in ("target", "sampled")}
    if any(finite(record.get(terms["sampled"])) is not None for record in records):
        drawings.append(_chart(stage, "log-probability by term", "nats per token", records, terms))
    return [drawing for drawing in drawings if drawing is not None]


def points_of(records: list[dict], split: str, column: str) -> list[tuple[float, float]]:
    """The (examples, value) points of one split; train points are averaged in groups down to MAX_POINTS."""
    pairs = [(finite(r.get("examples")), finite(r.get(column))) for r in records if r.get("split") == split]
    points = sorted((x, y) for x, y in pairs if x is not None and y is not None)
    size = math.ceil(len(points) / MAX_POINTS) if split == "train" and points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _chart(
    stage: str, quantity: str, unit: str, records: list[dict], columns: dict[str, str]
) -> Markup | None:
    """A chart with the train and held-out curves of some columns, or None if there are no points.

    Args:
        columns: Name of each curve (empty if there is one) -> column of the records.
    """
    curves = []
    for colour, (term, column) in enumerate(columns.items()):
        for split, words in (("train", "train"), ("heldout", "held out")):
            style = "sampled" if split == "train" and colour else split
            if points := points_of(records, split, column):
                curves.append(Curve(f"{term}, {words}" if term else words, points, colour, style))
    label = f"{stage}: {quantity} in {unit} over examples"
    return charts.lines(quantity.capitalize(), label, unit, "examples", curves) if curves else None


# ---- answers -----------------------------------------------------------------------------------------------


def _answers(report: dict[str, Any]) -> dict[str, Any] | None:
    """The data of the script, and the figures for readers without scripts."""
    if not report["rows"]:
        return None
    data = embedded({key: report[key] for key in ("reference", "systems", "rows")})
    return {"data": data, "systems": report["systems"], "rows": f"{len(report['rows']):,}"}
