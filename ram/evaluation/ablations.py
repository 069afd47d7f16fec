"""A recipe repeated over the values of a key (config/ablation/*.yaml): the points and their common plot.

leaderboard of a point -> point.json beside it -> all points -> ablation.html, ablation.csv
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ram.errors import UserError
from ram.evaluation.report import charts, page
from ram.evaluation.report.charts import text
from ram.log import log
from ram.settings.recipes import value_of
from ram.settings.schema import Settings
from ram.storage.files import write_csv, write_text
from ram.storage.records import Form, read_record, write_record

POINT = "point.json"
PANELS = {  # column -> title; a panel is drawn if a curve has values
    "win_rate": "Win rate (95 %)",
    "both": "Right and aligned (95 %)",
    "changed_fraction": "Tokens that the aligner changed",
    "fallback_fraction": "Tokens that fell back",
    "acceptance": "Acceptance",
    "average_length": "Characters per answer",
}
COLOURS = 6  # of report/assets/charts.css
Curves = dict[str, list[tuple[Any, dict[str, Any]]]]  # name -> (value of the key, leaderboard row)


def add_point(folder: Path, task: str, board: Sequence[dict[str, Any]], config: Settings) -> None:
    """Save a point's leaderboard and draw the plot of all points again.

    Args:
        folder: the point's folder.
        task: name of the task.
        board: the leaderboard.
        config: the root configuration. `evaluation.ablation` has `name`, a dotted `key` and, optionally, a
            second key `by` whose values become separate curves.

    Raises:
        UserError: if a key is not in the configuration.
    """
    ablation = config.evaluation.ablation
    point = {"task": task, "rows": list(board)}
    for role in ("key", "by"):
        if ablation.get(role):
            value = value_of(config, ablation[role])
            if value is None:
                raise UserError(f"evaluation.ablation.{role}={ablation[role]!r}: no such key here")
            point[role] = value
    write_record(folder / POINT, point)
    root = Path(config.report_dir).parent
    remedy = "evaluate that point again, or remove its folder"
    form: Form = {"task": str, "rows": list}
    points = [read_record(path, form, remedy) for path in sorted(root.rglob(POINT))]
    draw(root / f"{task}.html", [p for p in points if p["task"] == task], ablation, config.experiment_name)


def draw(path: Path, points: Sequence[dict[str, Any]], ablation: dict[str, str], experiment: str) -> None:
    """Write the plot of a task's points, and a CSV file of their leaderboards beside it."""
    values = sorted({p["key"] for p in points}, key=lambda value: (isinstance(value, str), value))
    figures = ""
    for heading, curves in sections_of(points).items():
        panels = "".join(panel(title, column, curves, values) for column, title in PANELS.items())
        figures += f'<h2>{text(heading)}</h2><div class="all">{panels}</div>\n'
    about = f"{experiment}, {path.stem}: {ablation['key']} from {values[0]} to {values[-1]}"
    about += f", {ablation['by']} by curve" if ablation.get("by") else ""
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{text(ablation["name"])}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{page.STYLE}
.all {{ display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }}
</style></head>
<body><main><h1>{text(ablation["name"])}</h1><p>{text(about)}</p>
{figures}</main></body></html>
""",
    )
    rows = [{"value": p["key"], "by": p.get("by", ""), **row} for p in points for row in p["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path.with_suffix(".csv"), [{key: row.get(key, "") for key in columns} for row in rows])
    log.info(f"ablation {path} ({len(points)} points)")


def sections_of(points: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """Return the curves by heading: all systems over the key or, with a second key, one heading per system.

    Systems whose figures are the same at all points are left out, except the first system.
    """
    all_curves: dict[str, Curves] = {}
    for point in points:
        for row in point["rows"]:
            by = point.get("by")
            heading, name = ("All systems", row["system"]) if by is None else (row["system"], str(by))
            all_curves.setdefault(heading, {}).setdefault(name, []).append((point["key"], row))

    def is_constant(*curves: Sequence[tuple[Any, dict[str, Any]]]) -> bool:
        rows = [row for curve in curves for _, row in curve]
        return all(row.get(key) == rows[0].get(key) for row in rows for key in PANELS)

    sections = {}
    for heading, curves in all_curves.items():
        if heading == "All systems":
            first = next(iter(curves))
            sections[heading] = {n: c for n, c in curves.items() if n == first or not is_constant(c)}
        elif not is_constant(*curves.values()):
            sections[heading] = dict(sorted(curves.items(), key=lambda curve: in_order(curve[0])))
    return sections


def in_order(value: str) -> tuple[bool, float, str]:
    """Return a sort key of a value as text: numbers by size, then words."""
    try:
        return False, float(value), ""
    except ValueError:
        return True, 0.0, value


def panel(title: str, column: str, curves: Curves, values: Sequence[Any]) -> str:
    """Return one column of the leaderboard over the values of the key, which are spaced equally."""
    shown = {
        name: [(values.index(value), row) for value, row in curve if row.get(column) is not None]
        for name, curve in curves.items()
    }
    shown = {name: sorted(curve, key=lambda point: point[0]) for name, curve in shown.items() if curve}
    if not any(row[column] for curve in shown.values() for _, row in curve):
        return ""  # no values, or only zeros
    ends = [
        row[key]
        for curve in shown.values()
        for _, row in curve
        for key in (column, f"{column}_low", f"{column}_high")
        if row.get(key) is not None
    ]
    least = max(0.04, 0.05 * max(map(abs, ends)))  # a nearly constant curve looks constant
    frame = charts.Frame(-0.3, len(values) - 0.7, *charts.spread(ends, least))
    shapes, legend = frame.y_axis(""), ""
    for place, value in enumerate(values):
        x = frame.x(place)
        shapes += f'<path class="grid" d="M{x} {frame.bottom:g}v4"/>'
        shapes += f'<text x="{x}" y="{frame.bottom + 16:g}" text-anchor="middle">{text(value)}</text>'
    for name, curve in shown.items():
        style = f"c{list(curves).index(name) % COLOURS} heldout"
        line = "L".join(f"{frame.x(x)} {frame.y(row[column])}" for x, row in curve)
        shapes += f'<path class="{style}" d="M{line}h0"/>'
        for x, row in curve:
            if row.get(f"{column}_low") is not None:
                low, high = frame.y(row[f"{column}_low"]), frame.y(row[f"{column}_high"])
                shapes += f'<path class="whisker" d="M{frame.x(x)} {low}V{high}"/>'
            shapes += charts.dot(
                style, frame.x(x), frame.y(row[column]), f"{name}, {values[x]}: {row[column]:.3f}"
            )
        sample = f'<path class="{style}" d="M1 6H25"/>'
        legend += f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{sample}</svg>{text(name)}</span>'
    return charts.figure(title, f"{title} over {', '.join(map(str, values))}", 200, shapes, legend)
