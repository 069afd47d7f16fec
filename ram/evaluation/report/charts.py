"""Charts as SVG: curves, points with intervals, boxes, histograms.

Each function returns a <figure> with its legend and a text alternative. Its style is assets/charts.css.
The style sheet of the page defines the colours used there (--ink, --blue and so on), for the light and the
dark scheme. Nothing is fetched or scripted.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

STYLE = (Path(__file__).parent / "assets" / "charts.css").read_text(encoding="utf-8")
LOG_FROM = 10.0
WIDTH = 340  # of every drawing, in pixels if the figure has its natural size
# Visible replacements for control characters and for characters that change the direction of a line.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"} | {127: "\u2421"}
VISIBLE |= dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)], "\ufffd"
)


class Point(NamedTuple):
    """One system in a plot; `low` and `high` are the ends of y's interval, `mark` is a second value of y.

    Its `number` is its place in the leaderboard; if it is 0, that in the plot.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    number: int = 0


class Curve(NamedTuple):
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0  # to 5
    style: str = "train"  # train (thin), sampled (thin, dashed) or heldout (with dots)


def visible(value: Any) -> str:
    """A value as text, with control characters replaced by visible ones."""
    return str(value).translate(VISIBLE)


def text(value: Any) -> str:
    """A value as HTML text, or for an attribute."""
    return html.escape(visible(value), quote=True)


def finite(value: Any) -> float | None:
    """The number in a float or in a CSV field; None if it is missing, empty, NaN or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Two or more round values between `low` and `high`."""
    raw = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between positive `low` and `high`, for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        if len(inside := [value for value in found if low <= value <= high]) <= 7:
            return inside
    return inside[:: math.ceil(len(inside) / 7)]


def short(value: float) -> str:
    """12.5k for 12500, 2M for 2000000, with a true minus sign."""
    size, suffix = next((pair for pair in ((1e6, "M"), (1e3, "k")) if pair[0] <= abs(value) < 1e9), (1, ""))
    return f"{value / size:.6g}{suffix}".replace("-", "−")


def figure(
    title: str, label: str, height: float, shapes: str, legend: str = "", width: float = WIDTH
) -> Markup:
    """A drawing with its title above and its legend below.

    Args:
        title: Plain text.
        label: Plain text that describes the drawing for screen readers.
        height: In the units of the drawing.
        shapes: The SVG elements.
        legend: HTML, or empty.
        width: In the units of the drawing.
    """
    key = f'<p class="key">{legend}</p>' if legend else ""
    return Markup(f"""<figure><figcaption>{text(title)}</figcaption>
<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(label)}">{shapes}</svg>
{key}</figure>
""")


def spread(values: Sequence[float], least: float = 1e-6) -> tuple[float, float]:
    """The range of the values with a margin, so that the ticks of a flat curve still differ."""
    low, high = min(values), max(values)
    pad = max(0.05 * (high - low), 1e-3 * max(abs(low), abs(high)), least)
    return low - pad, high + pad


@dataclass(frozen=True)
class Frame:
    """The plot area of a drawing: the coordinates of its edges, and the values at them."""

    x_low: float
    x_high: float
    y_low: float = 0.0
    y_high: float = 1.0
    left: float = 46
    right: float = 330
    top: float = 22
    bottom: float = 176
    y_log: bool = False  # y_low and y_high are positive; the axis has their logarithms

    def x(self, value: float) -> str:
        """The horizontal coordinate of a value."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return f"{self.left + (self.right - self.left) * share:.1f}"

    def y(self, value: float) -> str:
        """The vertical coordinate of a value."""
        low, high = self.y_low, self.y_high
        if self.y_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return f"{self.bottom - (self.bottom - self.top) * share:.1f}"

    def x_axis(self, unit: str = "", grid: bool = False, at_most: int = 5) -> str:
        """Ticks and unit below the plot area; `grid` draws lines through it."""
        shapes = ""
        for tick in ticks(self.x_low, self.x_high, at_most):
            x, line = self.x(tick), f"{self.top:g}V{self.bottom:g}" if grid else f"{self.bottom:g}v4"
            shapes += f'<path class="grid" d="M{x} {line}"/>'
            shapes += f'<text x="{x}" y="{self.bottom + 16:g}" text-anchor="middle">{short(tick)}</text>'
        if unit:
            place = f'x="{self.right:g}" y="{self.bottom + 31:g}" text-anchor="end"'
            shapes += f"<text {place}>{text(unit)}</text>"
        return shapes

    def y_axis(self, unit: str) -> str:
        """Lines through the plot area, with their values, and the unit above."""
        shapes = f'<text x="0" y="11">{text(unit)}</text>'
        for tick in (log_ticks if self.y_log else ticks)(self.y_low, self.y_high):
            y = self.y(tick)
            shapes += f'<path class="grid" d="M{self.left:g} {y}H{self.right:g}"/>'
            shapes += f'<text x="{self.left - 6:g}" y="{y}" dy="4" text-anchor="end">{short(tick)}</text>'
        return shapes


# ---- kinds of charts ---------------------------------------------------------------------------------------


def lines(title: str, label: str, unit: str, x_unit: str, curves: Sequence[Curve]) -> Markup:
    """Curves over one axis; those of style heldout show their points, and first and last in the legend.

    The axis is logarithmic if all values are positive and the largest is LOG_FROM times the smallest or more.
    """
    values = [y for curve in curves for _, y in curve.points]
    x_high = max(x for curve in curves for x, _ in curve.points) or 1.0
    if min(values) > 0 and max(values) >= LOG_FROM * min(values):
        frame = Frame(0.0, x_high, min(values) / 1.1, max(values) * 1.1, y_log=True)
        unit += ", logarithmic"
    else:
        frame = Frame(0.0, x_high, *spread(values))
    shapes, legend = frame.y_axis(unit) + frame.x_axis(x_unit), ""
    for curve in curves:
        style, words, dots = f"c{curve.colour} {curve.style}", curve.label, ""
        line = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in curve.points)
        shapes += f'<path class="{style}" d="M{line}h0"/>'  # h0 makes a single point visible
        if curve.style == "heldout":
            (_, first), (_, last) = curve.points[0], curve.points[-1]
            words, dots = f"{words}, {first:.4g} → {last:.4g}".replace("-", "−"), dot(style, "13", "6")
            for x, y in curve.points:
                shapes += dot(style, frame.x(x), frame.y(y), f"{x:,.0f} {x_unit}: {y:.4g}")
        sample = f'<path class="{style}" d="M1 6H25"/>{dots}'
        legend += f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{sample}</svg>{text(words)}</span>'
    return figure(title, label, 212, shapes, legend)


def dot(style: str, x: str, y: str, title: str = "") -> str:
    """A point of a curve, with a tooltip."""
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"><title>{text(title)}</title></circle>'


def cut(label: str, width: int) -> str:
    """The first `width` characters of a label."""
    return label if len(label) <= width else f"{label[: width - 1]}…"


def row_label(number: int, y: float, label: str, value: str) -> str:
    """The line of text above a bar: number and label at the left, the value at the right."""
    name = (
        f'<tspan class="number">{number}</tspan> {text(cut(label, 40))}' if number else text(cut(label, 42))
    )
    right = f'<text class="figure" x="{WIDTH - 4}" y="{y:g}" text-anchor="end">{text(value)}</text>'
    return f'<text x="4" y="{y:g}">{name}<title>{text(label)}</title></text>{right}'


def intervals(title: str, points: Sequence[Point], unit: str, half: float | None, mark: str) -> Markup:
    """The y of every point with its interval, one line per point, on one scale.

    Args:
        half: Value at which a dotted line is drawn, or None.
        mark: Name of the points' second value, for the legend.
    """
    ends = [end for p in points for end in (p.y, p.low, p.high, p.mark, half) if end is not None]
    frame = Frame(*spread(ends), left=8, right=332, top=4, bottom=8 + 34 * len(points))
    shapes = frame.x_axis(unit, grid=True)
    if half is not None:
        shapes += f'<path class="half" d="M{frame.x(half)} {frame.top:g}V{frame.bottom:g}"/>'
    for number, point in enumerate(points, start=1):
        y = 34 * number - 10
        shapes += row_label(number, y - 8, point.label, f"{point.y:.3f}")
        if point.low is not None and point.high is not None:
            a, b = frame.x(point.low), frame.x(point.high)
            shapes += f'<path class="whisker" d="M{a} {y}v8M{a} {y + 4}H{b}M{b} {y}v8"/>'
        if point.mark is not None:
            x = float(frame.x(point.mark))
            shapes += f'<path class="mark" d="M{x:.1f} {y - 1}l5 5l-5 5l-5 -5z"/>'
        shapes += f'<circle class="point" cx="{frame.x(point.y)}" cy="{y + 4}" r="4"/>'
    legend = (
        '<span><svg viewBox="0 0 26 12" aria-hidden="true"><path class="whisker" d="M2 2v8M2 6H24M24 2v8"/>'
    )
    legend += '<circle class="point" cx="13" cy="6" r="4"/></svg>95 % interval</span>'
    if any(point.mark is not None for point in points):
        diamond = '<path class="mark" d="M13 1l5 5l-5 5l-5 -5z"/>'
        legend += f'<span><svg viewBox="0 0 26 12" aria-hidden="true">{diamond}</svg>{text(mark)}</span>'
    values = "; ".join(f"{point.label} {point.y:.3f}" for point in points)
    return figure(title, f"{title}: {values}", frame.bottom + 36, shapes, legend)


def scatter(
    title: str, points: Sequence[Point], units: tuple[str, str], lines_at: tuple[float | None, float]
) -> Markup:
    """Points with intervals, numbered in order; `lines_at` draws dotted lines at an x (or None) and a y."""
    xs = [p.x for p in points] + [x for x in lines_at[:1] if x is not None]
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    frame = Frame(*spread(xs), *spread([*ends, lines_at[1]]), bottom=216, top=22)
    shapes = frame.y_axis(units[1]) + frame.x_axis(units[0])
    shapes += f'<path class="half" d="M{frame.left:g} {frame.y(lines_at[1])}H{frame.right:g}"/>'
    if lines_at[0] is not None:
        shapes += f'<path class="half" d="M{frame.x(lines_at[0])} {frame.top:g}V{frame.bottom:g}"/>'
    legend = ""
    numbers = [point.number or place for place, point in enumerate(points, start=1)]
    for number, point in zip(numbers, points, strict=True):
        x, y = frame.x(point.x), frame.y(point.y)
        if point.low is not None and point.high is not None:
            shapes += f'<path class="whisker" d="M{x} {frame.y(point.low)}V{frame.y(point.high)}"/>'
        name = f"{number} {point.label}: {point.x:,.1f}, {point.y:.3f}"
        shapes += f'<circle class="point" cx="{x}" cy="{y}" r="3.5"><title>{text(name)}</title></circle>'
        legend += f"<span><b>{number}</b> {text(point.label)}</span>"
    shapes += _numbers([(float(frame.x(p.x)), float(frame.y(p.y))) for p in points], numbers, frame)
    return figure(title, f"{title}: {units[1]} over {units[0]}", 252, shapes, legend)


def _numbers(places: Sequence[tuple[float, float]], numbers: Sequence[int], frame: Frame) -> str:
    """The numbers of points, beside them.

    Points that are too close together share one text. It is on the side with more room, above any text that
    it would overlap.
    """
    shapes, taken = "", []
    for cluster in clusters(places):
        xs, ys = ([places[i][axis] for i in cluster] for axis in (0, 1))
        words = ranges([numbers[i] for i in cluster])
        width, left = 6.5 * len(words), sum(xs) / len(xs) > (frame.left + frame.right) / 2
        x, y = min(xs) - 8 - width if left else max(xs) + 8, sum(ys) / len(ys) + 4
        while any(x < b and a < x + width and abs(y - c) < 11 for a, b, c in taken):
            y -= 11
        taken.append((x, x + width, y))
        at, anchor = (x + width, "end") if left else (x, "start")
        shapes += f'<text class="number" x="{at:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
    return shapes


def clusters(places: Sequence[tuple[float, float]], near: float = 11.0) -> list[list[int]]:
    """Group the indices of points that are within `near` pixels of another one, in both directions."""
    groups: list[list[int]] = []
    for i, (x, y) in enumerate(places):
        neighbours = [
            group
            for group in groups
            if any(abs(x - places[j][0]) < near and abs(y - places[j][1]) < near for j in group)
        ]
        groups = [group for group in groups if group not in neighbours]
        groups.append(sorted([i, *(j for group in neighbours for j in group)]))
    return groups


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 1, 2, 4–7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def quantile(ranked: Sequence[float], share: float) -> float:
    """A quantile of sorted values, linear between neighbours."""
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def boxes(title: str, rows: Sequence[tuple[int, str, Sequence[float]]], unit: str) -> Markup:
    """Quartiles, median, mean and the middle 90 % of the values of each row.

    Args:
        rows: Number (0 for none), label and values of each row.
    """
    ranked = [sorted(values) for _, _, values in rows]
    frame = Frame(
        *spread([quantile(v, share) for v in ranked for share in (0.05, 0.95)]),
        left=8,
        right=332,
        top=4,
        bottom=8 + 34 * len(rows),
    )
    shapes = frame.x_axis(unit, grid=True)
    for place, ((number, label, _), values) in enumerate(zip(rows, ranked, strict=True), start=1):
        y = 34 * place - 10
        a, b, c, d, e = (frame.x(quantile(values, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
        shapes += row_label(number, y - 8, label, f"median {quantile(values, 0.5):,.0f}")
        shapes += f'<path class="whisker" d="M{a} {y + 4}H{b}M{d} {y + 4}H{e}"/>'
        shapes += f'<rect class="box" x="{b}" y="{y - 1}" width="{float(d) - float(b):.1f}" height="10"/>'
        shapes += f'<path class="median" d="M{c} {y - 1}v10"/>'
        shapes += f'<circle class="point" cx="{frame.x(sum(values) / len(values))}" cy="{y + 4}" r="2.5"/>'
    legend = '<span><svg viewBox="0 0 26 12" aria-hidden="true"><path class="whisker" d="M1 6H7M19 6H25"/>'
    legend += '<rect class="box" x="7" y="1" width="12" height="10"/><path class="median" d="M12 1v10"/>'
    legend += '<circle class="point" cx="15" cy="6" r="2.5"/></svg>middle half and 90 %, median, mean</span>'
    medians = "; ".join(
        f"{label} {quantile(v, 0.5):,.0f}" for (_, label, _), v in zip(rows, ranked, strict=True)
    )
    return figure(title, f"{title}, medians: {medians}", frame.bottom + 36, shapes, legend)


def stacks(
    title: str, rows: Sequence[tuple[int, str, Sequence[float]]], names: Sequence[str], unit: str
) -> Markup:
    """Shares of a whole, one bar per row.

    Args:
        rows: number, label and shares of each row, in the order of `names`.
        names: of the parts.
    """
    frame = Frame(0.0, 1.0, left=8, right=332, top=4, bottom=8 + 34 * len(rows))
    shapes = frame.x_axis(unit)
    for place, (number, label, shares) in enumerate(rows, start=1):
        y, left = 34 * place - 10, 0.0
        largest = max(range(len(names)), key=lambda part: shares[part])
        shapes += row_label(number, y - 8, label, f"{names[largest]} {shares[largest]:.3f}")
        for part, share in enumerate(shares):
            x, width = float(frame.x(left)), float(frame.x(share)) - frame.left
            left += share
            if share:
                words = f"{names[part]}: {share:.3f}"
                shapes += (
                    f'<rect class="part c{part}" x="{x:.1f}" y="{y - 1}" width="{width:.1f}" height="10">'
                )
                shapes += f"<title>{text(words)}</title></rect>"
    legend = "".join(
        f'<span><svg viewBox="0 0 26 12" aria-hidden="true"><rect class="part c{part}" x="4" y="1" '
        f'width="18" height="10"/></svg>{text(name)}</span>'
        for part, name in enumerate(names)
    )
    described = "; ".join(
        f"{label} " + ", ".join(f"{name} {share:.3f}" for name, share in zip(names, shares, strict=True))
        for _, label, shares in rows
    )
    return figure(title, f"{title}: {described}", frame.bottom + 36, shapes, legend)


def histogram(
    title: str, label: str, values: Sequence[float], high: float, unit: str, bins: int = 20
) -> Markup:
    """The number of values in each of `bins` equal parts of [0, high], and the mean as a line."""
    counts = [0] * bins
    for value in values:
        counts[min(int(bins * value / high), bins - 1)] += 1
    frame = Frame(0.0, high, 0.0, max(counts), left=4, right=216, top=6, bottom=66)
    shapes, width = "", (frame.right - frame.left) / bins
    for place, count in enumerate(counts):
        if count:
            top = float(frame.y(count))
            x, height = frame.left + place * width, frame.bottom - top
            edge = f"{high * place / bins:.3g} to {high * (place + 1) / bins:.3g}: {count:,}"
            shapes += f'<rect class="bar" x="{x + 0.5:.1f}" y="{top:.1f}" width="{width - 1:.1f}" '
            shapes += f'height="{height:.1f}"><title>{edge}</title></rect>'
    mean = sum(values) / len(values)
    x = frame.x(min(mean, high))
    shapes += (
        f'<path class="grid" d="M{frame.left:g} {frame.bottom:g}H{frame.right:g}"/>{frame.x_axis(at_most=4)}'
    )
    shapes += f'<path class="median" d="M{x} {frame.top:g}V{frame.bottom:g}"/>'
    legend = f"<span>mean of the rows {mean:.3f}, most {max(values):.3g} {text(unit)}</span>"
    description = f"{label}: {title}, mean {mean:.3f} over {len(values):,} rows"
    return figure(title, description, 84, shapes, legend, width=220)
