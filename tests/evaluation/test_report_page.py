"""The report page in a browser: rows, filters, keys, links, the policy, load time and width."""

import pytest
from sample_report import HOSTILE, make_hostile, make_report, single

from ram.evaluation.report.page import write_report

IDS = "[...document.querySelectorAll('.row')].map(row => row.id)"
LATER = "new Promise(done => setTimeout(done, 200))"
PEEK = "document.getElementById('peek')"


@pytest.fixture
def visit(browser, tmp_path):
    """A function that writes a report and opens it; the page must log and throw nothing."""

    def go(report, hash="", **view):
        write_report(tmp_path / "report.html", report)
        browser.messages.clear()
        browser.open((tmp_path / "report.html").as_uri() + hash, **view)
        return browser

    yield go
    browser.run("1")  # messages that are on their way arrive before its result
    assert browser.messages == []


def choose(browser, name, value):
    browser.run(
        f"""(() => {{ const box = document.getElementById("by-{name}"); box.value = "{value}";
        box.dispatchEvent(new Event("change")); }})()"""
    )
    return browser.run(IDS)


def find(browser, text):
    browser.run(
        f"""(() => {{ const box = document.getElementById("find"); box.value = "{text}";
        box.dispatchEvent(new Event("input")); }})()"""
    )
    browser.run(LATER)
    return browser.run(IDS)


def test_hostile_strings_are_shown_as_text(visit):
    page = visit(make_hostile())
    assert page.run("window.hacked === undefined && Object.prototype.hacked === undefined")
    assert page.run("document.images.length + document.querySelectorAll('iframe,object,form').length") == 0
    assert page.run("document.scripts.length") == 2
    # The first page has ten rows. Open every judgement, and focus the first token of each row.
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    for place in range(10):
        text = HOSTILE[place]
        shown = page.run(f"document.querySelectorAll('.row')[{place}].textContent")
        for part in (piece for piece in text.split() if piece.isascii() and piece.isprintable()):
            assert shown.count(part) >= 5, part
        page.run(f"document.querySelectorAll('.row')[{place}].querySelector('.token').focus()")
        assert page.run(f"{PEEK}.hidden") is False
        assert text.split()[-1] in page.run(f"{PEEK}.textContent") or not text.isprintable()
    shown = page.run("document.getElementById('browser').textContent")
    assert "nul ␀ bell ␇ escape ␛[31m" in shown and "\u202e" not in shown and "\0" not in shown
    assert page.run("[...document.links].every(link => ['file:', 'about:'].includes(link.protocol))")
    assert page.run("window.hacked === undefined")


def test_policy_blocks_injected_markup(visit):
    """If a string became markup in spite of the escapes, its scripts, handlers and styles would not work."""
    page = visit(make_report())
    page.run(
        """document.body.insertAdjacentHTML("beforeend", '<img src=x onerror="window.hacked=1">'
        + '<p id=p style="color: rgb(1, 2, 3)" onclick="window.hacked=1">x</p>'
        + '<style>#p { color: rgb(1, 2, 3) }</style>'
        + '<iframe srcdoc="<script>parent.hacked=1<\\/script>"></iframe>');
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        document.getElementById("p").click();
        new Promise(done => setTimeout(done, 100))"""
    )
    assert page.run("window.hacked === undefined")
    assert page.run("getComputedStyle(document.getElementById('p')).color") != "rgb(1, 2, 3)"
    refusals = page.messages
    assert len(refusals) >= 4 and all("Content Security Policy" in text for text in refusals)
    page.messages.clear()


def test_rows_are_filtered_and_sorted(visit):
    page = visit(make_report(rows=25))
    assert page.run("document.querySelectorAll('.row').length") == 10
    assert page.run("document.querySelectorAll('.row:first-child .card').length") == 4  # and the reference
    assert find(page, "TEAL1") == ["row-2", *[f"row-{2 * i}" for i in range(10, 19)]]
    assert page.run("document.querySelector('.status').textContent") == "11 of 25 rows"
    assert find(page, "Bado 7?") == ["row-14"]
    assert find(page, "nothing of the kind") == []
    find(page, "")
    assert choose(page, "outcome", "failed") == ["row-2"]
    choose(page, "outcome", "loss")
    assert page.run("document.querySelector('.status').textContent") == "25 rows"
    assert choose(page, "system", 0) == []
    choose(page, "outcome", "win")
    assert choose(page, "tokens", "figures") == ["row-0"]
    choose(page, "tokens", "")
    assert len(choose(page, "judged", "correct")) == 10 and choose(page, "judged", "not aligned") == []
    choose(page, "judged", "")
    choose(page, "outcome", "")
    assert choose(page, "sort", "longest")[:2] == ["row-20", "row-22"]  # two digits, in their order
    choose(page, "system", 2)
    assert choose(page, "sort", "worst")[0] == "row-0"
    assert choose(page, "tokens", "changed") == []  # a model alone has none


def test_answers_that_ended_in_other_ways_are_the_same(visit):
    """By a token or a string; characters beyond 16 bits count once."""
    report = make_report(rows=12)
    for at, end in ((0, "</s>"), (1, "\n\nHuman\U0001f600")):
        report["rows"][3]["answers"][at] |= {"runs": [["a", "Yes.\U0001f600"], ["c", end]], "tail": len(end)}
    page = visit(report)
    assert choose(page, "texts", "differ") == []


def test_rows_whose_pairs_differ_are_found_and_escape_clears_the_filters(visit):
    report = make_report(rows=12)
    report["rows"][3]["answers"][1]["runs"][4] = ["c", " blue"]
    page = visit(report)
    assert choose(page, "texts", "differ") == ["row-6"]
    choose(page, "system", 1)
    assert page.run(IDS) == ["row-6"] and len(choose(page, "texts", "same")) == 10
    page.run("document.querySelector('.token').focus()")  # figures of a token are closed first
    page.key("Escape")
    assert page.run(f"{PEEK}.hidden") and page.run("document.getElementById('by-texts').value") == "same"
    page.key("Escape")
    assert page.run("document.querySelector('.status').textContent") == "12 rows"
    assert page.run("[...document.querySelectorAll('select')].every(box => box.selectedIndex === 0)")


def test_opening_says_who_was_compared_and_links_the_files(visit):
    about = {
        "lead": "No pair does better than A+B[par].",
        "facts": [["Judge", "exact"]],
        "systems": [
            {
                "name": "A+B[par]",
                "what": "a pair",
                "proposal": "A, 1.00 M weights",
                "aligner": "B",
                "mode": "par",
            }
            | {"temperatures": "proposal 0.5", "alpha": 0.0, "command": "bash bin/serve.sh chat proposal=A"},
            {"name": "C", "what": "one model alone", "proposal": "C", "aligner": None, "mode": None}
            | {"temperatures": "", "alpha": None, "command": None},
        ],
        "links": [["leaderboard.csv", "leaderboard.csv"]],
    }
    page = visit(make_report(about=about, columns=["style_terse"]))
    assert page.run("document.querySelector('.lead').textContent") == about["lead"]
    rows = "[...document.querySelectorAll('.systems tbody tr')]"
    cells = f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))"
    assert page.run(cells) == [
        [
            "A+B[par]",
            "a pair",
            "A, 1.00 M weights",
            "B",
            "par",
            "proposal 0.5",
            "0.0",
            about["systems"][0]["command"],
        ],
        ["C", "one model alone", "C", "–", "–", "", "–", "–"],
    ]
    assert page.run("document.querySelector('a[href=\"leaderboard.csv\"]') !== null")


def test_pages_turn_and_systems_can_be_hidden(visit):
    page = visit(make_report(rows=25))
    page.run("document.querySelectorAll('.pager button')[1].click()")
    page.run("document.querySelectorAll('.pager button')[1].click()")
    assert page.run(IDS) == [f"row-{2 * i}" for i in range(20, 25)]
    assert page.run("document.querySelectorAll('.pager button')[1].disabled")
    page.run("document.querySelectorAll('.boxes input')[1].click()")
    names = page.run("[...document.querySelectorAll('.row:first-child h4')].map(title => title.textContent)")
    assert names == ["Reference", "1\u00a0ours: large + small", "3\u00a0large, sft"]


def test_keys_move_between_rows_and_tokens(visit):
    page = visit(make_report(rows=12))
    focus = "document.activeElement.id"
    for expected in ("row-0", "row-2", "row-4"):
        page.key("j")
        assert page.run(focus) == expected
    page.key("k")
    assert page.run(focus) == "row-2" and page.run("location.hash") == "#row-2"
    for _ in range(9):
        page.key("j")  # beyond the end of the page
    assert page.run(focus) == "row-20" and page.run(IDS) == ["row-20", "row-22"]
    for _ in range(10):
        page.key("k")
    assert page.run(focus) == "row-0"
    page.key("Tab")  # the link of the row
    assert page.run("document.activeElement.textContent") == "Row 0"
    page.key("Tab")
    assert page.run("document.activeElement.textContent") == "The"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.key("ArrowRight")
    shown = page.run(f"{PEEK}.textContent")
    assert "␣colour" in shown and "+∞ the proposal gives this token no probability" in shown
    assert "the aligner changed it" in shown and "0.5000.500" not in shown and "<.001" in shown
    assert page.run("document.activeElement.getAttribute('aria-describedby')") == "peek"
    page.key("ArrowRight")
    assert "−0.30 nats 1.35 times less likely" in page.run(f"{PEEK}.textContent")
    page.key("Escape")
    assert page.run(f"{PEEK}.hidden")
    page.key("/")
    assert page.run(focus) == "find"
    page.key("j")
    assert page.run("document.activeElement.value") == "j"


def test_token_under_the_pointer_or_finger_shows_its_figures(visit):
    page = visit(make_report(), width=400)
    page.run("document.querySelector('.token').scrollIntoView({block: 'center'})")
    page.run(LATER)
    x, y = page.run(
        "(() => { const box = document.querySelector('.token').getBoundingClientRect();"
        " return [box.x + 3, box.y + 3]; })()"
    )
    page.page.mouse.move(x, y)
    assert page.run(f"{PEEK}.hidden") is False
    left, right, top, bottom = page.run(
        f"(() => {{ const box = {PEEK}.getBoundingClientRect();"
        " return [box.left, box.right, box.top, box.bottom]; })()"
    )
    assert left >= 0 and right <= 400 and top >= 0 and bottom <= 900
    page.page.mouse.move(x, 2)
    assert page.run(f"{PEEK}.hidden")
    for kind in ("touchStart", "touchEnd"):
        points = [{"x": x, "y": y}] if kind == "touchStart" else []
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.run(LATER)
    assert page.run(f"{PEEK}.hidden") is False and "0.750" in page.run(f"{PEEK}.textContent")


def test_links_open_a_row_and_its_judgement(visit):
    page = visit(make_report(rows=25), hash="#row-44/3")
    assert page.run("document.activeElement.closest('.row').id") == "row-44"
    opened = "document.querySelector('.judgement[open]')"
    assert page.run(f"{opened}.querySelector('dl').textContent") == "preference0.5000"
    assert page.run(f"{opened}.textContent").endswith("Line 23 of a/b#2/judged.jsonllink to this judgement")
    assert page.run(f"{opened}.querySelector('a').getAttribute('href')") == "a/b%232/judged.jsonl"
    page.run("location.hash = '#row-2/3'")
    page.run(LATER)
    assert "judgement failed" in page.run("document.activeElement.textContent")
    assert "failedHTTP 500" in page.run("document.querySelector('#row-2 .judgement[open]').textContent")
    find(page, "Bado 7?")  # a link also shows a row that the filter hides
    page.run("location.hash = '#row-6'")
    page.run(LATER)
    assert page.run("document.activeElement.id") == "row-6" and len(page.run(IDS)) == 10
    page.run("document.querySelectorAll('.boxes input')[0].click()")  # and a system that is not shown
    for place in (2, 1):
        page.run(f"location.hash = '#row-8/{place}'")
        page.run(LATER)
        title = "document.activeElement.closest('.card').querySelector('h4').textContent"
        assert page.run(title).startswith(str(place)) and page.run("location.hash").endswith(f"/{place}")


def test_page_without_scripts_has_table_and_charts(browser, tmp_path):
    write_report(tmp_path / "report.html", make_report())
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.page.goto((tmp_path / "report.html").as_uri())
        root = browser.send("DOM.getDocument")["root"]["nodeId"]
        for selector, least in (("figure", 12), ("tbody tr", 3), ("noscript .warning", 1), (".row", 0)):
            nodes = browser.send("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
            assert len(nodes) >= least and (least or not nodes), selector
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_large_page_loads_in_three_seconds(visit, width, scheme):
    """It has 2,000 rows of eight systems, 11 MB; nothing is wider than the window."""
    text = "An answer of some length, as a model gives it. " * 12
    rows = [
        {
            "id": i,
            "prompt": f"Question {i}? " * 8,
            "reference": f"Reference {i}",
            "answers": [single(f"{i} {k} {text}", preference=k / 7) for k in range(8)],
        }
        for i in range(2000)
    ]
    systems = [
        {"name": f"proposal+aligner[{k}]", "folder": "f", "judgements": "f/j", "pair": False, "note": None}
        for k in range(8)
    ]
    page = visit(make_report(rows=1) | {"rows": rows, "systems": systems}, width=width, scheme=scheme)
    assert page.load_seconds < 3
    assert len(page.run(IDS)) == 10
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[scheme]
    assert find(page, "question 1999?") == ["row-1999"]
