"""Charts: positions of the shapes, and counts."""

import itertools
import re

import pytest

from ram.evaluation.report import charts
from ram.evaluation.report.charts import Curve, Point


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 44800), (-2.3, -0.4), (5, 5.0001), (1e-7, 3e-7), (-1e9, 3e9)]
)
def test_ticks_are_few_round_and_inside(low, high):
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-9 * abs(low) <= ticks[0] and ticks[-1] <= high + 1e-9 * abs(high)
    assert len({charts.short(tick) for tick in ticks}) == len(ticks)
    assert charts.short(12500) == "12.5k" and charts.short(-2e6) == "−2M" and charts.short(0.25) == "0.25"


def test_frame_maps_the_ends_to_its_edges():
    frame = charts.Frame(2.0, 4.0, -1.0, 1.0)
    assert (frame.x(2.0), frame.x(4.0)) == (f"{frame.left:.1f}", f"{frame.right:.1f}")
    assert (frame.y(-1.0), frame.y(1.0)) == (f"{frame.bottom:.1f}", f"{frame.top:.1f}")
    assert float(frame.x(3.0)) == (frame.left + frame.right) / 2


@pytest.mark.parametrize("share, expected", [(0.0, 1.0), (1.0, 9.0), (0.5, 3.0), (0.25, 2.0), (0.9, 7.0)])
def test_quantiles_are_linear_between_neighbours(share, expected):
    assert charts.quantile([1.0, 2.0, 3.0, 4.0, 9.0], share) == pytest.approx(expected)
    assert charts.quantile([4.0], share) == 4.0


def test_histogram_counts_every_value_once():
    """The last bin includes its upper end; the heights of the bars are their counts."""
    svg = charts.histogram("T", "label", [0.0, 0.04, 0.5, 0.99, 1.0, 1.0], 1.0, "u", bins=10)
    assert re.findall(r"<title>(.*?)</title>", svg) == ["0 to 0.1: 2", "0.5 to 0.6: 1", "0.9 to 1: 3"]
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', svg)]
    assert heights == pytest.approx([40, 20, 60], abs=0.11)


def test_flat_curve_and_single_point_have_an_axis():
    for points in ([(0.0, 2.0)], [(0.0, 0.0), (5.0, 0.0)], [(1.0, -3.0), (2.0, -3.0)]):
        svg = charts.lines("t", "label", "u", "x", [Curve("a", points)])
        assert "nan" not in svg and svg.count('class="grid"') >= 4


def test_axis_of_a_long_curve_is_logarithmic():
    """Equal ratios have equal distances; a curve with a value of 0 or below keeps its linear axis."""
    svg = charts.lines("t", "l", "u", "x", [Curve("a", [(0, 100.0), (1, 10.0), (2, 1.0)], 0, "heldout")])
    places = [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)" r="2.5"><title>\d', svg)]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.11) and "logarithmic" in svg
    for points in ([(0, 100.0), (1, 0.0)], [(0, -1.0), (1, 100.0)], [(0, 9.0), (1, 1.0)]):
        assert "logarithmic" not in charts.lines("t", "l", "u", "x", [Curve("a", points)])


@pytest.mark.parametrize("low, high", [(0.9, 11), (1e-6, 40), (2, 21), (3e-9, 4e9)])
def test_logarithmic_ticks_are_few_and_inside(low, high):
    ticks = charts.log_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
    assert len({charts.short(tick) for tick in ticks}) == len(ticks)


def test_stacks_have_parts_as_wide_as_their_shares():
    svg = charts.stacks("t", [(1, "a", [0.25, 0.0, 0.75])], ["x", "y", "z"], "share")
    bars = re.findall(r'class="part c(\d)" x="([\d.]+)" y="\d+" width="([\d.]+)" height="10"><title>', svg)
    assert [part for part, *_ in bars] == ["0", "2"]
    assert float(bars[1][1]) == pytest.approx(float(bars[0][1]) + float(bars[0][2]), abs=0.11)
    assert float(bars[1][2]) == pytest.approx(3 * float(bars[0][2]), abs=0.3) and "z 0.750" in svg


def test_intervals_and_boxes_are_drawn_at_their_values():
    point = Point("a", 0.0, 0.5, 0.25, 0.75)
    svg = charts.intervals("t", [point], "u", None, "mark")
    a, b = re.search(r'class="whisker" d="M([\d.]+) .*?H([\d.]+)M', svg).groups()
    middle = float(re.search(r'class="point" cx="([\d.]+)"', svg)[1])
    assert float(a) + float(b) == pytest.approx(2 * middle, abs=0.2)
    box = charts.boxes("t", [(1, "a", [float(i) for i in range(101)])], "u")
    x, width = re.search(r'class="box" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', box).groups()
    median = float(re.search(r'class="median" d="M([\d.]+)', box)[1])
    assert float(x) + float(width) / 2 == pytest.approx(median, abs=0.2) and "median 50" in box


def test_neighbouring_points_share_one_text():
    """Every number appears once, beside its point; a chain of neighbours is one group."""
    near = [Point("a", 1.0, 0.5)] * 3 + [Point("b", 3.0, 0.6), Point("c", 1.01, 0.5), Point("d", 3.0, 0.9)]
    svg = charts.scatter("t", near, ("x", "y"), (None, 0.5))
    words = re.findall(r'class="number" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', svg)
    assert sorted(text for *_, text in words) == ["1–3, 5", "4", "6"]
    points = [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    for x, y, anchor, text in words:
        px, py = points[int(text[0]) - 1]
        assert 0 < (px - float(x) if anchor == "end" else float(x) - px) < 15 and abs(py - float(y)) < 8
    assert charts.clusters([(0, 0), (20, 0), (10, 0), (10, 30)]) == [[0, 1, 2], [3]]
    assert charts.ranges([1, 2, 4, 5, 6, 9]) == "1, 2, 4–6, 9"


def test_points_have_their_numbers_in_the_leaderboard():
    """Systems between them may have no value for a chart."""
    points = [Point("a", 0.0, 0.5, number=1), Point("c", 9.0, 0.9, number=3)]
    svg = charts.scatter("t", points, ("x", "y"), (None, 0.5))
    assert re.findall(r'class="number"[^>]*>([^<]*)<', svg) == ["1", "3"]
    assert "<b>3</b> c" in svg and "3 c: 9.0, 0.900" in svg


def test_numbers_do_not_cover_each_other():
    """A text that would overlap another one is moved above it."""
    points = [Point("a", 0.0, 0.5), Point("b", 0.1, 0.5), Point("c", 2.0, 0.5)]
    svg = charts.scatter("t", points, ("x", "y"), (None, 0.5))
    boxes = [(float(x), float(y)) for x, y in re.findall(r'class="number" x="([\d.]+)" y="([\d.]+)"', svg)]
    assert all(abs(a - c) > 6 or abs(b - d) >= 11 for (a, b), (c, d) in itertools.combinations(boxes, 2))


def test_text_is_escaped_with_visible_control_characters():
    assert charts.text('<a b="c">&\'') == "&lt;a b=&quot;c&quot;&gt;&amp;&#x27;"
    assert charts.text("a\0b\x7fc\u202ed\ud83d\n") == "a␀b␡c\ufffdd\ufffd\n"
