"""The report page without its script: its contents, well-formed HTML, and data that cannot become markup."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from sample_report import BOARD, HOSTILE, make_about, make_hostile, make_report, record

from ram.evaluation.report import page as report_page
from ram.evaluation.report.page import write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "wbr"}
EMPTY = {
    "title": "Demo",
    "notes": [],
    "board": [],
    "curves": {},
    "reference": "output",
    "systems": [],
    "rows": [],
}


class Page(HTMLParser):
    """Checks that every element but the void ones is closed in order; records attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.inline = [], [], [], []
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
        if self.open and self.open[-1] in ("style", "script"):
            self.inline.append((self.elements[-1], data))
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    @property
    def data(self):
        (data,) = [data for (_, attrs), data in self.inline if attrs.get("id") == "data"]
        return json.loads(data)

    def find(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


@pytest.fixture
def render(tmp_path):
    """A function that writes a page and returns it, parsed and as text."""

    def write(report):
        write_report(tmp_path / "run" / "report.html", report)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
        raw = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        return Page(raw), raw

    return write


def test_page_is_well_formed_self_contained_and_in_order(render):
    page, raw = render(make_report())
    assert page.find("html", lang="en") and page.find("meta", charset="utf-8")
    assert page.find("meta", name="viewport") and page.find("div", id="browser")
    assert not re.search(r"https?:|url\(|@import|<link|<img|\ssrc=|\shref=\"[^#]", raw)
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:], strict=False))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [link["href"][1:] for link in page.find("a")] == ["leaderboard", "plots", "training", "answers"]
    assert {"leaderboard", "plots", "training", "answers"} <= set(ids)


def test_policy_allows_only_the_inline_style_and_script(render):
    """The policy has the hashes of both; no element has a style or an event handler."""
    page, _ = render(make_hostile())
    (policy,) = page.find("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in policy["content"].split("; "))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'"
    code = {tag: data for (tag, attrs), data in page.inline if attrs.get("type") != "application/json"}
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(code[tag].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]
    assert "</script" not in report_page.SCRIPT and "</style" not in report_page.STYLE
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", report_page.SCRIPT
    )


def test_charts_are_well_formed_and_finite(render):
    _, raw = render(make_report())
    pictures = re.findall(r"<svg.*?</svg>", raw, flags=re.DOTALL)
    assert len(pictures) > 15
    for picture in pictures:
        ElementTree.fromstring(picture)  # the stricter parser
        assert not re.search(r"\b(nan|inf|None)\b", picture)


def test_systems_and_numbers_are_shown(render):
    page, raw = render(make_report())
    for row in BOARD:
        assert row["system"] in page.text
        assert f"{row['win_rate']:.3f} {row['win_rate_low']:.3f}–{row['win_rate_high']:.3f}" in page.text
    for number in ("1,210", "0.642", "0.615–0.669", "0.801", "0.799", "34", "0.183", "0.072", "0.655"):
        assert number in page.text
    assert "Judge: exact · Reference: output" in page.text  # the same in all rows: stated once
    assert (
        len(page.find("p", **{"class": "warning"})) == 2
    )  # a note, and the text for readers without scripts
    assert len(page.find("svg", viewbox="-2 0 136 16")) == 4  # three win rates, one share of both
    alerts = page.find("span", **{"class": "alert"})
    assert [alert["title"] for alert in alerts] == [report_page.MOSTLY_FELL_BACK] and ">0.783<" in raw
    assert len(page.find("th", scope="row")) == 3 and page.find("caption")
    # Not by hovering alone.
    assert all(header["title"] in page.text for header in page.find("th", scope="col"))


def test_pair_whose_aligner_changes_next_to_nothing_stands_out(render):
    rows = [BOARD[0] | {"changed_fraction": 0.009}, BOARD[1] | {"fallback_fraction": 0.4}]
    page, raw = render(make_report(board=rows))
    alerts = page.find("span", **{"class": "alert"})
    assert [alert["title"] for alert in alerts] == [report_page.HARDLY_CHANGED] and ">0.009<" in raw


def test_styles_of_all_systems_are_drawn(render):
    styles = {"style_well_formed": 0.75, "style_rude": 0.25}
    page, _ = render(make_report(board=[BOARD[0] | styles, *BOARD[1:]]))
    labels = [a["aria-label"] for a in page.find("svg", role="img")]
    assert "Styles of answers: ours: large + small well formed 0.750, rude 0.250" in labels
    assert not [a for a in render(make_report())[0].find("svg", role="img") if "Styles" in a["aria-label"]]


def test_columns_without_values_are_left_out(render):
    rows = [{"system": "a", "n": 2, "win_rate": 0.5}, {"system": "b", "win_rate": None}]
    page, _ = render(EMPTY | {"board": rows})
    assert len(page.find("th", scope="col")) == 3
    assert "Acceptance" not in page.text and "Both" not in page.text and "Judge" not in page.text
    assert "b––" in page.text
    differing = [{"system": "a", "judge": "exact"}, {"system": "b", "judge": None}]
    assert len(render(EMPTY | {"board": differing})[0].find("th", scope="col")) == 2


def test_curves_have_a_line_for_each_split_and_term(render):
    page, _ = render(make_report())
    labels = [a["aria-label"] for a in page.find("svg", role="img") if "over examples" in a["aria-label"]]
    assert labels == [
        "sft large: loss in nats per example over examples",
        "ours small: loss in nats per example over examples",
        "ours small: log-probability by term in nats per token over examples",
        "lone: loss in nats per example over examples",
    ]
    assert "held out, 35.88 → 3.704" in page.text and "sampled, held out, −1.131 → −1.5" in page.text
    assert "dead" not in page.text and "empty:" not in page.text
    lines = [a["d"] for a in page.find("path", **{"class": "c0 train"})]
    assert 100 < max(line.count("L") for line in lines) < report_page.MAX_POINTS


def test_averaged_points_keep_the_mean():
    records = [record("train", i, str(float(i % 7))) for i in range(900)]
    points = report_page.points_of(records, "train", "loss")
    assert len(points) == report_page.MAX_POINTS
    assert sum(y for _, y in points) / 300 == pytest.approx(sum(i % 7 for i in range(900)) / 900)
    assert report_page.points_of(records, "heldout", "loss") == []


def test_plots_show_every_system_and_histograms_of_pairs(render):
    page, _ = render(make_report(rows=8))
    labels = [a["aria-label"] for a in page.find("svg", role="img")]
    assert labels[0] == "Win rate: ours: large + small 0.731; ours: tight threshold 0.500; large, sft 0.450"
    assert labels[1] == "Win rate by length: win rate over characters per answer, mean"
    assert labels[2].startswith("Lengths of answers, medians: in the test file 8; ours: large + small 21; ")
    fallen = [label for label in labels if "Fell back" in label]
    assert fallen == [
        "ours: large + small: Fell back, mean 0.143 over 8 rows"
    ]  # the other pair has 0 in every row
    assert sum("Acceptance" in label or "KL" in label for label in labels) == 4


def test_length_controlled_marks_are_of_one_kind(render):
    """They are AlpacaEval's own figures if the leaderboard has any, else ours."""
    plot = re.compile(r"<figcaption>Win rate</figcaption>.*?</figure>", re.DOTALL)
    marks = re.compile(r'class="mark" d="M(\d+\.\d) \d+l')

    def win_rates(*figures):
        rows = [row | changes for row, changes in zip(BOARD, figures, strict=False)]
        return plot.search(render(make_report(board=rows))[1])[0]

    plain = win_rates({}, {}, {})
    assert "at equal length" in plain and "AlpacaEval" not in plain and len(marks.findall(plain)) == 3
    alpaca = win_rates({"lc_win_rate": 0.5}, {"lc_win_rate": 0.731}, {"lc_win_rate": None})
    assert "AlpacaEval&#x27;s length-controlled" in alpaca and "at equal length" not in alpaca
    low, high = map(float, marks.findall(alpaca))
    half = float(re.search(r'class="half" d="M([\d.]+)', alpaca)[1])
    assert low == half and high > half  # at the first system's figure, not at its win rate of 0.731


def test_all_data_are_embedded(render):
    report = make_report()
    page, raw = render(report)
    assert page.data == {key: report[key] for key in ("reference", "systems", "rows")}
    assert "browser of all 3 prompts with the answers of 3 systems" in page.text.replace("\n", " ")
    assert "large, sft: a/b#2/output.json" in page.text


def test_data_never_becomes_markup(render):
    """If every string of the data is hostile, the page still has only its usual elements."""
    page, raw = render(make_hostile())
    tags = {tag for tag, _ in page.elements}
    usual, _ = render(make_report(about=make_about(["large+small"])))
    assert tags == {tag for tag, _ in usual.elements}
    assert len(page.find("script")) == 2
    assert not re.search(r"<(script|img)[^>]*hacked|<!--", raw)
    assert "\0" not in raw and "\x1b" not in raw and "\u202e" not in raw.split('id="data"')[0]
    assert "half ? pair" not in raw and "␀" in page.text and "half \ufffd pair" in page.text
    assert [row["prompt"] for row in page.data["rows"]] == HOSTILE
    assert page.data["systems"][2]["name"] == HOSTILE[2]
    assert page.text.count(" ".join(HOSTILE[0].split())) >= 8


@pytest.mark.parametrize("text", HOSTILE)
def test_embedded_json_gives_the_same_text(text):
    encoded = report_page.embedded({text: [text]})
    assert json.loads(encoded) == {text: [text]}
    assert not set(encoded) & set("<>&\u2028\u2029\0\x7f\ud83d")
    with pytest.raises(ValueError):
        report_page.embedded(float("nan"))


def test_empty_report_is_a_page(render):
    page, _ = render(EMPTY)
    assert "No system was evaluated." in page.text
    assert not page.find("h2", id="training") and not page.find("h2", id="answers")
    page, _ = render(EMPTY | {"curves": {"sft": []}, "rows": make_report()["rows"]})
    assert not page.find("h2", id="training") and page.find("h2", id="answers")


def test_failure_keeps_the_previous_page(render, tmp_path):
    _, before = render(EMPTY | {"title": "first"})
    with pytest.raises(KeyError):
        render(EMPTY | {"board": [{"n": 1, "win_rate": 0.5}], "rows": [{}]})
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == before


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast_in_both_colour_schemes(scheme):
    """Every colour of text has a contrast of at least 4.5 on every background that it is used on."""
    blocks = re.findall(r":root \{(.*?)\}", report_page.STYLE, flags=re.DOTALL)
    assert len(blocks) == 4  # of the report and of the tokens, each for both schemes
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]+)", blocks[scheme] + blocks[scheme + 2]))
    shades = [f"{side}{depth}" for side in ("up", "down") for depth in range(1, 5)]
    pairs = [("ink", ground) for ground in ("page", "panel", *shades)]
    named = ("muted", "blue", "orange", "green", "red")
    pairs += [(name, ground) for name in named for ground in ("page", "panel")]
    for name, ground in pairs:
        low, high = sorted(luminance(colours[key]) for key in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
