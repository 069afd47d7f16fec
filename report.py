"""One self-contained HTML page per run: leaderboard, training curves, answers token by token.

Nothing is fetched: the charts are SVG drawn here, the style sheet is below, there is no script. Whatever
comes from data passes `_text` or a number format on its way into the page, for a model may write markup.
"""

import html
import math
from pathlib import Path
from typing import Any

from files import replacing

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
MOSTLY_FELL_BACK = "the pair mostly fell back to the proposal, for more than half of its tokens"
EVENTS = {
    "agreed": "both models agreed",
    "changed": "the aligner changed it",
    "fell_back": "fell back to the proposal",
}
MAX_POINTS = 300  # of a train curve; more only cost file size at this width
DASH = "–"

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2227; --muted: #58626c; --rule: #d8dde2;
  --panel: #f6f7f8; --blue: #0a5f9e; --orange: #ad5200; --fill: #ffe1a8; }
@media (prefers-color-scheme: dark) { :root { --page: #15191d; --ink: #e2e6ea; --muted: #a0abb5;
  --rule: #39424a; --panel: #1d2328; --blue: #74bbf2; --orange: #f3a85c; --fill: #5c3c08; } }
* { box-sizing: border-box; } :focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums; text-underline-offset: .2em;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3, h4 { line-height: 1.25; margin: 0; font-size: 1rem; } h1 { font-size: 1.7rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--rule); }
h4 { font-size: .875rem; display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem; }
p { margin: .5rem 0; max-width: 46rem; } summary { cursor: pointer; }
.warning { background: var(--panel); border-left: .25rem solid var(--orange); padding: .5rem .75rem; }
.small, figcaption, caption, .key { font-size: .8125rem; color: var(--muted); }
.scroll { overflow-x: auto; } caption { text-align: left; } thead th { color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .45rem .6rem; text-align: left; border-bottom: 1px solid var(--rule); }
th:first-child { position: sticky; left: 0; padding-left: 0; background: var(--page); min-width: 8.5rem;
  max-width: 15rem; overflow-wrap: anywhere; }
.number, .share { white-space: nowrap; } .number { text-align: right; }
.alert { color: var(--orange); font-weight: 700; text-decoration: underline; }
.share svg { display: block; width: 8.5rem; height: 1rem; }
.track { fill: var(--rule); } .value { fill: var(--blue); opacity: .6; }
.whisker { stroke: var(--ink); stroke-width: 1.5; } .half { stroke: var(--ink); stroke-dasharray: 1 2; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dd { margin: 0; }
.stages, .charts, .cards { display: grid; gap: 2rem; --least: 20rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
@media (min-width: 46rem) { .stages .two { grid-column: span 2; } }
figure { margin: 0; max-width: 30rem; } figure > svg { display: block; width: 100%; margin: .25rem 0; }
figure text { font-size: 11px; fill: var(--muted); } .grid { stroke: var(--rule); }
.target { color: var(--blue); } .sampled { color: var(--orange); } .sampled.train { stroke-dasharray: 3 3; }
.target, .sampled { stroke: currentColor; fill: none; stroke-linecap: round; stroke-linejoin: round; }
.train { stroke-width: 1.2; opacity: .6; } .heldout { stroke-width: 2; }
circle.target { fill: currentColor; } circle.sampled { fill: var(--page); }
.key, .events { display: flex; flex-wrap: wrap; gap: .1rem 1rem; max-width: none; }
.key svg { width: 1.6rem; height: .7rem; margin-right: .35rem; }
.prompt { border-top: 1px solid var(--rule); padding: .75rem 0; } .prompt h3 { display: inline; }
.cards { margin-top: .6rem; gap: .75rem; --least: 16rem; }
.card { padding: .6rem .75rem; background: var(--panel); border: 1px solid var(--rule); }
.reference { background: none; border-style: dashed; } .verdict { color: var(--muted); font-weight: 400; }
.words { white-space: pre-wrap; } .newline::before { content: "\\21B5"; }
.changed { background: var(--fill); font-weight: 600; text-decoration: underline 2px var(--orange); }
.fell_back { color: var(--blue); text-decoration: underline dashed 1.5px; }
"""


def write_report(
    path: Path,
    *,
    title: str,
    notes: list[str],
    rows: list[dict],
    curves: dict[str, list[dict]],
    answers: list[dict],
) -> None:
    """Writes the page to `path`, whole or not at all.

    notes: paragraphs of plain text; one that starts with "warning:" is set off. rows: the leaderboard in the
    order to show, with "system" and any of COLUMNS; win_rate and both may bring _low and _high. curves: stage
    -> records of its metrics.csv. answers: {"prompt", "reference", "systems": [{"system", "text", "tokens",
    "events", "verdict"}]}; tokens and events are None for one model alone. Values that are missing, empty or
    not finite are left out or shown as a dash.
    """
    paragraphs = ""
    for note in notes:
        kind = ' class="warning"' if note.lower().startswith("warning:") else ""
        paragraphs += f"<p{kind}>{_text(note)}</p>\n"
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CSS}</style></head>
<body><main><h1>{_text(title)}</h1>
{paragraphs}{_leaderboard(rows)}
{_stages(curves)}
{_answers(answers)}
</main></body></html>
"""
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8", errors="replace")  # a model may end inside a surrogate pair


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _finite(value: Any) -> float | None:
    """The number in a float or in a field of a CSV file; None for what is missing, empty, NaN or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ---- leaderboard -------------------------------------------------------------------------------------------


def _leaderboard(rows: list[dict]) -> str:
    if not rows:
        return "<h2>Leaderboard</h2>\n<p>No system was evaluated.</p>"
    shown = [key for key in COLUMNS if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("failed") for row in rows):
        shown = [key for key in shown if key != "failed"]
    common = ""
    for key in ("judge", "judge_settings", "reference", "commit"):
        # One value for the whole table is said once: the width is better spent on numbers.
        if key in shown and len({row.get(key) for row in rows}) == 1:
            shown.remove(key)
            common += f'<p class="small">{COLUMNS[key][0]}: {_text(rows[0][key])}</p>'
    header = meanings = ""
    for key in shown:
        heading, _, meaning = COLUMNS[key]
        header += f'<th scope="col" class="{_style(key)}" title="{_text(meaning)}">{heading}</th>'
        meanings += f"<dt>{heading}</dt><dd>{_text(meaning)}</dd>"
    lines = "\n".join(f"<tr>{''.join(_cell(row, key) for key in shown)}</tr>" for row in rows)
    fallen = [row["system"] for row in rows if (_finite(row.get("fallback_fraction")) or 0) > 0.5]
    warning = f'<p class="warning">{_text(", ".join(fallen))}: {MOSTLY_FELL_BACK}.</p>' if fallen else ""
    return f"""<h2 id="leaderboard">Leaderboard</h2>
<div class="scroll" role="region" aria-labelledby="leaderboard" tabindex="0"><table>
<caption>One system a line; shares run from 0 to 1</caption>
<thead><tr>{header}</tr></thead><tbody>
{lines}
</tbody></table></div>
{common}{warning}
<details class="small"><summary>What the columns mean</summary><dl>{meanings}</dl></details>"""


def _style(key: str) -> str:
    return "share" if key in SHARES else "number" if COLUMNS[key][1] else "name"


def _cell(row: dict, key: str) -> str:
    spec, value = COLUMNS[key][1], row.get(key)
    value = _finite(value) if spec else value
    text = DASH if value in (None, "") else _text(format(value, spec))
    if key == "system":
        return f'<th scope="row">{text}</th>'
    if key in SHARES and value is not None:
        low, high = _finite(row.get(f"{key}_low")), _finite(row.get(f"{key}_high"))
        interval = "" if low is None or high is None else f" {low:{spec}}{DASH}{high:{spec}}"
        bar = _bar(value, low, high, halved=key == "win_rate")
        text = f'<b>{text}</b><span class="small">{interval}</span>{bar}'
    if key == "fallback_fraction" and (value or 0) > 0.5:
        text = f'<span class="alert" title="{MOSTLY_FELL_BACK}">{text}</span>'
    return f'<td class="{_style(key)}">{text}</td>'


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


# ---- training curves ---------------------------------------------------------------------------------------


def _stages(curves: dict[str, list[dict]]) -> str:
    sections = "".join(_stage(stage, records) for stage, records in curves.items())
    return f'<h2>Training</h2>\n<div class="stages">{sections}</div>' if sections else ""


def _stage(stage: str, records: list[dict]) -> str:
    """A chart of the loss and, where there is a sampled term to compare with, one of the two terms."""
    charts = [_chart(stage, "loss", "nats per example", records, {"target": "loss"})]
    terms = {term: f"{term}_logp_per_token" for term in ("target", "sampled")}
    if any(_finite(record.get(terms["sampled"])) is not None for record in records):
        charts.append(_chart(stage, "log-probability by term", "nats per token", records, terms))
    charts = [chart for chart in charts if chart]
    width = ' class="two"' if len(charts) > 1 else ""
    body = f'<h3>{_text(stage)}</h3><div class="charts">{"".join(charts)}</div>'
    return f"<section{width}>{body}</section>\n" if charts else ""


def _points(records: list[dict], split: str, column: str) -> list[tuple[float, float]]:
    """(examples, value) of one split, the train points averaged in equal runs down to MAX_POINTS."""
    pairs = [(_finite(r.get("examples")), _finite(r.get(column))) for r in records if r.get("split") == split]
    points = sorted((x, y) for x, y in pairs if x is not None and y is not None)
    size = math.ceil(len(points) / MAX_POINTS) if split == "train" and points else 1
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _chart(stage: str, what: str, unit: str, records: list[dict], columns: dict[str, str]) -> str:
    """A figure with the train and held-out curves of columns, given as class of the style sheet -> column."""
    curves = [
        (term, split, points)
        for term, column in columns.items()
        for split in ("train", "heldout")
        if (points := _points(records, split, column))
    ]
    if not curves:
        return ""
    left, right, top, bottom = 46, 330, 22, 176
    values = [y for *_, points in curves for _, y in points]
    x_high = max(x for *_, points in curves for x, _ in points) or 1.0
    # A flat curve still gets an axis, and no two ticks of it read the same.
    pad = max(0.05 * (max(values) - min(values)), 1e-3 * max(map(abs, values)), 1e-6)
    y_low, y_high = min(values) - pad, max(values) + pad

    def at(x: float, y: float) -> tuple[str, str]:
        across, up = x / x_high, (y - y_low) / (y_high - y_low)
        return f"{left + (right - left) * across:.1f}", f"{bottom - (bottom - top) * up:.1f}"

    shapes = f'<text x="0" y="11">{unit}</text><text x="{right}" y="207" text-anchor="end">examples</text>'
    for tick in _ticks(y_low, y_high):
        y = at(0, tick)[1]
        shapes += f'<path class="grid" d="M{left} {y}H{right}"/>'
        shapes += f'<text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{_short(tick)}</text>'
    for tick in _ticks(0.0, x_high):
        x = at(tick, y_low)[0]
        shapes += f'<path class="grid" d="M{x} {bottom}v4"/>'
        shapes += f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{_short(tick)}</text>'
    legend = ""
    for term, split, points in curves:
        style, label, dot = f"{term} {split}", "train", ""
        line = "L".join(" ".join(at(*point)) for point in points)
        shapes += f'<path class="{style}" d="M{line}h0"/>'  # h0: a point alone shows too
        if split == "heldout":
            label, dot = f"held out, {points[0][1]:.4g} → {points[-1][1]:.4g}", _dot(style, "13", "6")
            shapes += "".join(_dot(style, *at(x, y), f"{x:,.0f} examples: {y:.4g}") for x, y in points)
        label = f"{term}, {label}" if len(columns) > 1 else label
        sample = f'<svg viewBox="0 0 26 12" aria-hidden="true"><path class="{style}" d="M1 6H25"/>{dot}</svg>'
        legend += f"<span>{sample}{label.replace('-', '−')}</span>"
    label = _text(f"{stage}: {what} in {unit} over examples")
    return f"""<figure><figcaption>{what.capitalize()}</figcaption>
<svg viewBox="0 0 340 212" role="img" aria-label="{label}">{shapes}</svg>
<p class="key">{legend}</p></figure>"""


def _dot(style: str, x: str, y: str, title: str = "") -> str:
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"><title>{title}</title></circle>'


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round values between low and high."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """12.5k for 12500, 2M for 2000000, with a true minus sign."""
    size, suffix = next((pair for pair in ((1e6, "M"), (1e3, "k")) if pair[0] <= abs(value) < 1e9), (1, ""))
    return f"{value / size:.6g}{suffix}".replace("-", "−")


# ---- answers -----------------------------------------------------------------------------------------------


def _answers(answers: list[dict]) -> str:
    if not answers:
        return ""
    legend = ""
    if any(system.get("events") for answer in answers for system in answer["systems"]):
        words = "".join(f'<span class="{event}">{meaning}</span>' for event, meaning in EVENTS.items())
        legend = f'<p class="events">In the answers of a pair: {words}</p>'
    sections = "".join(_prompt(number, answer) for number, answer in enumerate(answers, start=1))
    return f"<h2>Answers</h2>\n{legend}\n{sections}"


def _prompt(number: int, answer: dict) -> str:
    line = " ".join(answer["prompt"].split())
    short = line if len(line) <= 100 else line[:99] + "…"
    # The summary is one line; the body repeats the prompt only where that lost something.
    whole = "" if short == answer["prompt"] else f'<p class="words" dir="auto">{_text(answer["prompt"])}</p>'
    cards = [_card(system) for system in answer["systems"]]
    if answer.get("reference") is not None:
        cards.insert(0, _card({"system": "Reference", "text": answer["reference"]}, " reference"))
    return f"""<details class="prompt" open><summary><h3>{number}. {_text(short)}</h3></summary>
{whole}<div class="cards">{"".join(cards)}</div></details>
"""


def _card(system: dict, style: str = "") -> str:
    tokens, events, counts = system.get("tokens"), system.get("events"), ""
    if tokens is not None and events is not None:
        words = "".join(_token(*pair) for pair in zip(tokens, events, strict=True))
        told = (f"{events.count(event)} {event.replace('_', ' ')}" for event in EVENTS)
        counts = f'<p class="small">Tokens: {", ".join(told)}</p>'
    else:
        words = _text(system["text"])
    words = words or '<span class="small">(empty)</span>'
    verdict = f'<span class="verdict">{_text(system["verdict"])}</span>' if system.get("verdict") else ""
    return f"""<article class="card{style}"><h4>{_text(system["system"])}{verdict}</h4>
<p class="words" dir="auto">{words}</p>{counts}</article>
"""


def _token(token: str, event: str) -> str:
    # A token that is a line break alone has no width to colour, so the style sheet draws a sign for it.
    newline = " newline" if event != "agreed" and "\n" in token and not token.strip() else ""
    return f'<span class="{_text(event)}{newline}" title="{_text(event)}">{_text(token)}</span>'
