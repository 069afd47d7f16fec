"""The page: what is on it, that it is well formed and self-contained, and that data cannot become markup."""

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

import report
from report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}
EVIL = """<script>alert("x")</script> & 'quoted' " onmouseover="alert(1)"""

ROWS = [
    {
        "system": "ours: large + small",
        "n": 1210,
        "judge": "exact",
        "reference": "chosen",
        "win_rate": 0.7312,
        "win_rate_low": 0.7061,
        "win_rate_high": 0.7554,
        "both": 0.642,
        "both_low": 0.615,
        "both_high": 0.669,
        "correct": 0.801,
        "aligned": 0.799,
        "average_length": 34.2,
        "fallback_fraction": 0.183,
        "mean_kl": 0.0721,
        "acceptance": 0.655,
    },
    {
        "system": "ours: tight threshold",
        "n": 1210,
        "judge": "exact",
        "reference": "chosen",
        "win_rate": 0.5,
        "win_rate_low": 0.47,
        "win_rate_high": 0.53,
        "both": None,
        "average_length": 30.0,
        "fallback_fraction": 0.783,
        "mean_kl": 0.4,
        "acceptance": math.nan,
    },
    {
        "system": "large, sft",
        "n": 1210,
        "judge": "exact",
        "reference": "chosen",
        "average_length": 27.9,
        "win_rate": 0.45,
        "win_rate_low": 0.42,
        "win_rate_high": 0.48,
    },
]


def record(split, examples, loss, target="", sampled=""):
    values = {"loss": loss, "target_logp_per_token": target, "sampled_logp_per_token": sampled}
    return {"split": split, "examples": str(examples), **values}


def make_curves():
    """As csv.DictReader gives them: a long stage without samples, one with both terms, and broken values."""
    sft = [record("train", 64 * i, f"{30 / (1 + i):.6g}", "-1.5") for i in range(1, 1001)]
    sft[3]["loss"], sft[5]["loss"], sft[7]["examples"] = "nan", "inf", ""
    sft += [record("heldout", x, loss) for x, loss in ((0, "35.879001"), (32000, "3.7038621"), (64000, ""))]
    ours = [record("train", 32 * i, 10 - i / 20, -1.3 + i / 200, -0.9 - i / 100) for i in range(1, 60)]
    ours += [record("heldout", x, 10.2, -1.365, s) for x, s in ((0, -1.131), (1888, math.nan), (1888, -1.5))]
    lone = [record("heldout", 0, "0"), {"split": "train"}]
    return {
        "sft large": sft,
        "ours small": ours,
        "lone": lone,
        "empty": [],
        "dead": [record("train", 1, "nan")],
    }


def make_answers():
    tokens = ["The", " colour", " is", "\n", " teal", "."]
    pair = {
        "system": "ours: large + small",
        "text": "The colour is\n teal.",
        "verdict": "won",
        "tokens": tokens,
        "events": ["agreed", "changed", "fell_back", "changed", "agreed", "agreed"],
    }
    alone = {"system": "large, sft", "text": "Just  teal.", "tokens": None, "events": None, "verdict": None}
    return [
        {"prompt": "What is the colour of Bado?", "reference": "Olive.", "systems": [pair, alone]},
        {"prompt": "word " * 60 + "\nlast line", "reference": None, "systems": [alone | {"text": ""}]},
    ]


class Page(HTMLParser):
    """Checks that every element but the void ones is closed in order; keeps attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> closes itself in SVG only"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def find(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


@pytest.fixture
def render(tmp_path):
    """Writes a page and gives its text, parsed and raw; what is not given is empty."""

    def write(**given):
        empty = {"title": "Demo", "notes": [], "rows": [], "curves": {}, "answers": []}
        write_report(tmp_path / "run" / "report.html", **(empty | given))
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
        raw = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        return Page(raw), raw

    return write


def whole(render):
    notes = ["Ran the demo.", "warning: 3 rows skipped"]
    return render(title="RAM demo", notes=notes, rows=ROWS, curves=make_curves(), answers=make_answers())


def test_page_is_well_formed_self_contained_and_in_order(render):
    page, raw = whole(render)
    assert page.find("html", lang="en") and page.find("meta", charset="utf-8")
    assert page.find("meta", name="viewport")
    assert not re.search(r"http|url\(|@import|<script|<link|<img|\ssrc=|\shref=", raw)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_charts_are_well_formed_and_finite(render):
    _, raw = whole(render)
    for picture in re.findall(r"<svg.*?</svg>", raw, flags=re.DOTALL):
        ElementTree.fromstring(picture)  # the stricter parser
        assert not re.search(r"\b(nan|inf|None)\b", picture)


def test_systems_and_numbers_are_shown(render):
    page, raw = whole(render)
    for row in ROWS:
        assert row["system"] in page.text
        assert f"{row['win_rate']:.3f} {row['win_rate_low']:.3f}–{row['win_rate_high']:.3f}" in page.text
    for number in ("1,210", "0.642", "0.615–0.669", "0.801", "0.799", "34", "0.183", "0.072", "0.655"):
        assert number in page.text
    assert "Judge: exact" in page.text and "Reference: chosen" in page.text  # the same in all rows: said once
    assert [a["class"] for a in page.find("p", **{"class": "warning"})] == ["warning"] * 2
    assert len(page.find("svg", viewbox="-2 0 136 16")) == 4  # three win rates, one share of both
    alerts = page.find("span", **{"class": "alert"})
    assert [alert["title"] for alert in alerts] == [report.MOSTLY_FELL_BACK] and ">0.783<" in raw
    assert len(page.find("th", scope="row")) == 3 and page.find("caption")
    assert all(
        header["title"] in page.text for header in page.find("th", scope="col")
    )  # not by hovering alone


def test_columns_that_no_row_has_are_left_out(render):
    page, _ = render(rows=[{"system": "a", "n": 2, "win_rate": 0.5}, {"system": "b", "win_rate": None}])
    assert len(page.find("th", scope="col")) == 3
    assert "Acceptance" not in page.text and "Both" not in page.text and "Judge" not in page.text
    assert "b – –" in " ".join(page.words)
    differing = [{"system": "a", "judge": "exact"}, {"system": "b", "judge": None}]
    assert len(render(rows=differing)[0].find("th", scope="col")) == 2


def test_curves_show_splits_and_terms(render):
    page, _ = whole(render)
    labels = [a["aria-label"] for a in page.find("svg", role="img")]
    assert labels == [
        "sft large: loss in nats per example over examples",
        "ours small: loss in nats per example over examples",
        "ours small: log-probability by term in nats per token over examples",
        "lone: loss in nats per example over examples",
    ]
    assert "held out, 35.88 → 3.704" in page.text and "sampled, held out, −1.131 → −1.5" in page.text
    assert "dead" not in page.text and "empty:" not in page.text
    lines = [a["d"] for a in page.find("path", **{"class": "target train"})]
    assert 100 < max(line.count("L") for line in lines) < report.MAX_POINTS


def test_points_are_averaged_down_without_losing_the_mean():
    records = [record("train", i, str(float(i % 7))) for i in range(900)]
    points = report._points(records, "train", "loss")
    assert len(points) == report.MAX_POINTS
    assert sum(y for _, y in points) / 300 == pytest.approx(sum(i % 7 for i in range(900)) / 900)
    assert report._points(records, "heldout", "loss") == []


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 44800), (-2.3, -0.4), (5, 5.0001), (1e-7, 3e-7), (-1e9, 3e9)]
)
def test_ticks_are_few_round_and_inside(low, high):
    ticks = report._ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low - 1e-9 * abs(low) <= ticks[0] and ticks[-1] <= high + 1e-9 * abs(high)
    assert len({report._short(tick) for tick in ticks}) == len(ticks)
    assert report._short(12500) == "12.5k" and report._short(-2e6) == "−2M" and report._short(0.25) == "0.25"


def test_answers_show_events_by_more_than_colour(render):
    page, raw = whole(render)
    assert [a["title"] for a in page.find("span") if "title" in a and a["class"] != "alert"] == [
        "agreed",
        "changed",
        "fell_back",
        "changed",
        "agreed",
        "agreed",
    ]
    assert '<span class="changed newline" title="changed">\n</span>' in raw
    for words in (*report.EVENTS.values(), "3 agreed, 2 changed, 1 fell back", "Olive.", "won", "(empty)"):
        assert words in page.text
    assert "Just  teal." in raw and "\nlast line" in raw  # white space is kept
    assert len(page.find("details", **{"class": "prompt"})) == 2
    for event, cue in (("changed", "underline 2px"), ("fell_back", "underline dashed")):
        assert re.search(rf"\.{event} {{[^}}]*{cue}", report.CSS)
    with pytest.raises(ValueError, match="shorter"):  # tokens and events that do not belong together
        system = {"system": "pair", "text": "a b", "tokens": ["a", " b"], "events": ["agreed"]}
        render(answers=[{"prompt": "p", "reference": None, "systems": [system]}])


def test_data_never_becomes_markup(render):
    """Every string of the data is hostile at once; the page has no element or attribute that was not ours."""
    row = dict.fromkeys(report.COLUMNS, EVIL) | {"win_rate": 0.5, "fallback_fraction": 0.9}
    system = {"system": EVIL, "text": EVIL, "tokens": [EVIL], "events": [EVIL], "verdict": EVIL}
    alone = system | {"tokens": None, "events": None}
    records = [record("train", 1, 2.0, -1.0, -1.0), record("heldout", 1, EVIL), record(EVIL, 1, 1.0)]
    page, raw = render(
        title=EVIL,
        notes=[EVIL, f"warning: {EVIL}"],
        rows=[row, row | {"judge": "other", "n": EVIL}],
        curves={EVIL: records},
        answers=[{"prompt": f"{EVIL}\n", "reference": EVIL, "systems": [system, alone]}],
    )
    assert "<script" not in raw and 'alert("x")' not in raw and "'quoted'" not in raw
    assert not [tag for tag, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert page.find("svg", **{"aria-label": f"{EVIL}: loss in nats per example over examples"})
    assert page.find("span", title=EVIL)
    assert page.text.count(" ".join(EVIL.split())) >= 13
    surrogate = {"system": "s", "text": "half \ud83d pair"}
    assert "half ? pair" in render(answers=[{"prompt": "p", "systems": [surrogate]}])[1]


def test_nothing_to_show_is_fine(render):
    page, _ = render()
    assert "No system was evaluated." in page.text
    assert "Training" not in page.text and "Answers" not in page.text
    page, _ = render(curves={"sft": []}, answers=[{"prompt": "", "reference": "", "systems": []}])
    assert "Training" not in page.text and "Answers" in page.text


def test_a_failure_leaves_the_old_page(render, tmp_path):
    _, before = render(title="first")
    with pytest.raises(KeyError):
        render(answers=[{"prompt": "p"}])
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == before
