"""The server's page in a browser: keys, streams, errors, two answers side by side, widths."""

import pytest
from sample_report import HOSTILE
from served import TOKENIZER, ask, chat_text, eventually, get, running

from ram.decoding.requests import TokenLogprobs
from ram.serving.loop import Busy, Closed, Done, Piece

LAST = "document.querySelector('.answers:last-child')"
IDLE = f"{LAST}?.getAttribute('aria-busy') === 'false'"
STATUS = "document.getElementById('status').textContent"
FIELD = "document.getElementById('text')"
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, "max_new_tokens=30") as models_and_url:
        yield models_and_url


@pytest.fixture
def visit(browser):
    """A function that opens the page of a server; the page must log and throw nothing."""

    def go(url, ready=True, **view):
        browser.messages.clear()
        browser.open(url, **view)
        browser.until(f"{FIELD}.disabled === {'false' if ready else 'true'}")
        return browser

    yield go
    browser.run("1")  # messages that are on their way arrive before its result
    # Chromium logs statuses like 401, which the tests cause.
    assert [text for text in browser.messages if not text.startswith("Failed to load resource")] == []


class ScriptedEngine:
    """A stand-in for the engine whose answers a test writes piece by piece."""

    def __init__(self):
        self.requests, self.cancelled, self.refusal = [], [], None

    def submit(self, request, listener):
        if self.refusal is not None:
            raise self.refusal
        self.requests.append((request, listener))
        return len(self.requests) - 1

    def cancel(self, ticket):
        self.cancelled.append(ticket)

    def say(self, text, which=-1):
        request, listen = self.requests[which]
        ids = tuple(TOKENIZER(text).input_ids)
        logprobs = None if request.logprobs is None else (TokenLogprobs(-1.0, ()),) * len(ids)
        listen(Piece(ids, text, logprobs))

    def end(self, text="", which=-1):
        self.say(text, which)
        stats = {"fallback_fraction": 0.25, "changed_fraction": 0.12, "mean_kl": float("inf")}
        self.requests[which][1](Done("stop", 5, 7, stats))

    def prompt(self, which=-1):
        """The aligner and the text of a request."""
        request = self.requests[which][0]
        return request.aligner, TOKENIZER.decode(request.prompt_ids)


@pytest.fixture
def scripted(server, monkeypatch):
    engine = ScriptedEngine()
    for name in ("submit", "cancel"):
        monkeypatch.setattr(server[0].engine, name, getattr(engine, name))
    return engine


def send(page, scripted, text, answers=1):
    """Type a message and send it; returns once the server has submitted the answers."""
    before = len(scripted.requests)
    page.type(text)
    page.key("Enter")
    eventually(lambda: len(scripted.requests) == before + answers)


def shown(page, place=0):
    return page.run(f"{LAST}.querySelectorAll('.answer > p:not(.facts)')[{place}].textContent")


def fact(page, place=0):
    text = page.run(f"{LAST}.querySelectorAll('.facts:not(.remark)')[{place}].textContent")
    return text.replace("\u00a0", " ")


def test_page_is_self_contained(server):
    """It has a strict policy, fetches nothing from elsewhere, and never writes HTML."""
    url = server[1]
    page = get(url)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    texts = [page.text] + [get(f"{url}/chat.{kind}").text for kind in ("css", "js")]
    assert not any("http://" in text or "https://" in text for text in texts)
    assert not any(
        word in texts[2] for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
    )


def test_page_asks_for_the_key(folder, visit, monkeypatch):
    """With the right key the answer is the server's own, and two answers can be compared.

    The late refusal of a wrong key once removed the right key: the first question was sent without one.
    """
    monkeypatch.setenv("RAM_API_KEY", "sesame")
    with running(folder, "max_new_tokens=30") as (_, url):
        page = visit(url, ready=False, width=400)
        label = "document.getElementById('key-label').textContent"
        page.until(f"{label} === 'This server needs a key:' && {FOCUS} === 'key'")
        page.type("wrong")
        page.key("Enter")
        page.until(f"{label}.startsWith(\"This key is not the server's\") && {FOCUS} === 'key'")
        assert page.run(STATUS) == ""
        page.run("""const plain = window.fetch; window.fetch = async (...options) => {
            const answer = await plain(...options);
            if (options[1].headers.Authorization === "Bearer late")
                await new Promise((go) => { window.letGo = go; });
            return answer; }; 1""")
        page.type("late")
        page.key("Enter")
        page.until("Boolean(window.letGo)")
        page.type("sesame")
        page.key("Enter")
        page.until(f"!{FIELD}.disabled && {FOCUS} === 'text'")
        page.run("letGo(); new Promise((done) => setTimeout(done, 50))")
        assert page.run("document.getElementById('key-form').hidden") and page.run(STATUS) == ""

        names = "Array.from(document.getElementById('model').options, (o) => o.value).join()"
        assert page.run(names) == "proposal,a,b"
        assert page.run("document.getElementById('model').value") == "a"
        page.run("document.getElementById('seed').value = '7'")
        page.type("<b>hello</b>")
        page.key("Enter")
        page.until(IDLE)
        assert page.run("document.querySelector('.said').textContent") == "<b>hello</b>"
        body = {"messages": [{"role": "user", "content": "<b>hello</b>"}], "seed": 7}
        headers = {"Authorization": "Bearer sesame"}
        (choice,) = ask(url, body | {"model": "a"}, headers=headers).json()["choices"]
        assert shown(page) == choice["message"]["content"] != ""
        fallen = round(100 * choice["stats"]["fallback_fraction"])
        changed = round(100 * choice["stats"]["changed_fraction"])
        assert f" · fell back {fallen} % · changed {changed} % · mean KL " in fact(page) and fact(
            page
        ).endswith(" · seed 7")
        page.run("document.getElementById('compare').click()")
        page.type("again")
        page.key("Enter")
        page.until(f"{LAST}.children.length === 2 && {IDLE}")
        assert page.run(f"{LAST}.querySelectorAll('mark').length") > 1

        page.run("key = 'of yesterday'; 1")
        page.type("more")
        page.key("Enter")
        page.until(f'{LAST}.textContent.includes("this key is not the server\'s") && {IDLE}')
        assert page.run(FOCUS) == "key" and page.run(f"{FIELD}.value") == "more"
        page.type("sesame")
        page.key("Enter")
        page.until(f"{FOCUS} === 'text'")
        page.key("Enter")
        page.until(f"document.querySelectorAll('.answers').length === 3 && {IDLE}")
        assert page.run("document.querySelectorAll('.failed').length") == 0


def test_stopped_answer_keeps_its_text(server, scripted, visit):
    """Text typed meanwhile stays in the field; another aligner can continue the dialogue."""
    page = visit(server[1])
    send(page, scripted, "one")
    scripted.say("The first")
    page.until(f"{LAST}.textContent.includes('The first')")
    page.type("two")
    page.key("Enter")
    assert "still being written" in page.run(STATUS) and page.run(f"{FIELD}.value") == "two"
    assert len(scripted.requests) == 1 and page.run(f"{LAST}.getAttribute('aria-busy')") == "true"
    page.run("document.getElementById('model').value = 'b'; document.getElementById('model').focus()")
    scripted.say(" part")
    page.until(f"{LAST}.textContent.includes('part')")
    assert page.run(FOCUS) == "model"
    page.run("document.getElementById('stop').click()")
    page.until(IDLE)
    eventually(lambda: scripted.cancelled)  # the running answer is cancelled
    assert (shown(page), fact(page), page.run(FOCUS)) == ("The first part", "stopped", "model")
    assert page.run(f"{LAST}.querySelector('h2').textContent") == "a"
    page.run(f"{FIELD}.focus()")
    page.key("Enter")
    eventually(lambda: len(scripted.requests) == 2)
    assert scripted.prompt() == ("b", chat_text("one", "The first part", "two"))
    scripted.end("whole")
    page.until(IDLE)
    assert fact(page).startswith("7 tokens · ended by itself · fell back 25 % · changed 12 % · seed ")
    send(page, scripted, "three")
    page.key("Escape")  # nothing of the answer has arrived: the question is forgotten
    page.until(IDLE)
    assert page.run(f"{FIELD}.value") == "three" and page.run(FOCUS) == "text"
    page.key("Enter")
    eventually(lambda: len(scripted.requests) == 4)
    assert scripted.prompt()[1] == chat_text("one", "The first part", "two", "whole", "three")
    assert page.run("document.querySelectorAll('.said').length") == 3
    page.run("document.getElementById('reset').click()")
    assert page.run(STATUS) == "the dialogue is forgotten" and page.run("!document.querySelector('.said')")
    send(page, scripted, "four")
    assert scripted.prompt()[1] == chat_text("four")
    scripted.end()
    page.until(IDLE)


@pytest.mark.parametrize("error", [Busy("9 requests wait already"), Closed("the server is shutting down")])
def test_refused_question_returns_to_the_field(server, scripted, visit, error):
    """The reason is shown in red below the question."""
    page, scripted.refusal = visit(server[1], width=400, scheme="dark"), error
    page.type("one")
    page.key("Enter")
    page.until(IDLE)
    assert (fact(page), page.run(f"{FIELD}.value")) == (str(error), "one")
    colour = "getComputedStyle(document.querySelector('.facts.failed')).color"
    assert page.run(colour) == "rgb(255, 154, 145)"
    scripted.refusal = None
    page.key("Enter")
    eventually(lambda: scripted.requests)
    scripted.say("part")
    scripted.requests[-1][1](Done("error", 1, 1, {}, "decoding failed"))
    page.until(f"document.querySelectorAll('.said').length === 1 && {IDLE}")
    assert (shown(page), fact(page)) == ("part", "decoding failed")
    assert scripted.prompt()[1] == chat_text("one")


def test_two_answers_side_by_side(server, scripted, visit):
    """Tokens that the other answer does not have are marked, whole characters at a time.

    The proposal alone gets none of the aligner's settings.
    """
    page = visit(server[1])
    for name, value in (("base_temperature", "0.5"), ("temperature", "2"), ("mode", "product")):
        page.run(f"document.getElementById('{name}').value = '{value}'")
    page.run("document.getElementById('compare').click()")

    def compare(question, left, right):
        before = len(scripted.requests)
        send(page, scripted, question, 2)
        for place in (before, before + 1):
            scripted.end(right if scripted.prompt(place)[0] else left, place)
        page.until(IDLE)
        marks = "Array.from({}.children[{}].querySelectorAll('mark'), (mark) => mark.textContent).join('|')"
        return [page.run(marks.format(LAST, side)) for side in (0, 1)]

    assert compare("1", "It is teal.\nNot  red", "It's teal!\nNot red") == ["i|.", "'|!"]
    assert (shown(page), shown(page, 1)) == ("It is teal.\nNot  red", "It's teal!\nNot red")
    tops = [page.run(f"{LAST}.children[{place}].getBoundingClientRect().top") for place in (0, 1)]
    assert tops[0] == tops[1] and "marked" in page.run(STATUS)
    laws = {request.aligner: request.params for request, _ in scripted.requests}
    assert (laws["a"].temperature, laws["a"].base_temperature, laws["a"].sample_mode) == (2, 0.5, "product")
    assert laws[None].base_temperature == 0.5 and len({r.seed for r, _ in scripted.requests}) == 1
    assert compare("2", "我喜欢红色", "我喜欢蓝色") == ["红", "蓝"]
    assert scripted.prompt()[1] == chat_text("1", "It's teal!\nNot red", "2")
    assert compare("2", "a🙂b", "a🙃b") == ["🙂", "🙃"]
    assert compare("3", "same", "same") == ["", ""] and page.run(STATUS) == "both answers are the same"
    page.run("document.getElementById('other').value = 'a'")
    send(page, scripted, "4")
    scripted.end("alone")
    page.until(IDLE)
    assert "not compared with itself" in page.run(STATUS)


PEEK = "document.getElementById('peek')"


def test_tokens_of_a_pair_show_the_aligners_influence(server, visit):
    """They are coloured once the answer has ended; pointer, finger and keys show figures; Esc hides them."""
    page = visit(server[1], width=400)
    page.run("document.getElementById('seed').value = '3'")
    page.type("hello")
    page.key("Enter")
    page.until(f"{IDLE} && {LAST}.querySelectorAll('.token').length > 5")
    answer = ask(server[1], {"model": "a", "messages": [{"role": "user", "content": "hello"}], "seed": 3})
    assert shown(page) == answer.json()["choices"][0]["message"]["content"]
    assert page.run(f"{LAST}.querySelectorAll('.up1, .up2, .up3, .up4, .down1, .down2').length") > 3
    assert page.run("!document.getElementById('scale').hidden")
    token = f"{LAST}.querySelectorAll('.token')[2]"
    x, y = page.run(
        f"(() => {{ const box = {token}.getClientRects()[0];"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    page.page.mouse.move(x, y)
    assert page.run(f"{PEEK}.hidden") is False
    text = page.run(f"{PEEK}.textContent")
    assert "nats" in text and "KL(P_M‖Q)" in text and "candidateP_MQp" in text
    page.page.mouse.move(x, 2)
    assert page.run(f"{PEEK}.hidden")
    for kind in ("touchStart", "touchEnd"):
        points = [{"x": x, "y": y}] if kind == "touchStart" else []
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    page.until(f"{PEEK}.hidden === false")
    left, right = page.run(
        f"(() => {{ const box = {PEEK}.getBoundingClientRect(); return [box.left, box.right]; }})()"
    )
    assert left >= 0 and right <= 400
    page.run(f"{LAST}.querySelector('.token').focus()")
    page.key("ArrowRight")
    assert page.run(f"document.activeElement === {LAST}.querySelectorAll('.token')[1] && !{PEEK}.hidden")
    page.key("Escape")
    assert page.run(f"{PEEK}.hidden")
    page.run("document.getElementById('reset').click()")
    assert page.run("document.getElementById('scale').hidden")


def test_compared_answer_keeps_its_marks_when_it_is_coloured(server, scripted, visit):
    page = visit(server[1])
    page.run("document.getElementById('compare').click()")
    send(page, scripted, "1", 2)
    for place in (0, 1):
        scripted.end("It's teal!" if scripted.prompt(place)[0] else "It is teal.", place)
    page.until(f"{IDLE} && {LAST}.querySelectorAll('.token').length > 0")
    marks = "Array.from({}.querySelectorAll('mark'), (mark) => mark.textContent).join('|')"
    assert page.run(marks.format(LAST)) == "i|.|'|!" and shown(page, 1) == "It's teal!"
    assert page.run(f"[...{LAST}.querySelectorAll('mark.token')].length") == 2
    assert page.run(f"{LAST}.children[0].querySelectorAll('.token').length") == 0  # the proposal alone


def test_settings_show_the_servers_defaults(server, visit):
    page = visit(server[1])
    hints = {id: page.run(f"document.getElementById('{id}').placeholder") for id in ("tokens", "seed")}
    assert hints == {"tokens": "30", "seed": "a new one"}
    assert page.run("document.getElementById('temperature').placeholder") == "1"
    assert page.run("document.getElementById('mode').options[0].textContent") == "par (default)"


def test_servers_seed_is_used_and_unreadable_numbers_are_told(folder, visit):
    """A number field has no value while its text is none."""
    with running(folder, "max_new_tokens=4", "seed=11") as (_, url):
        page = visit(url)
        page.type("one")
        page.key("Enter")
        page.until(IDLE)
        assert fact(page).endswith(" · seed 11")
        field = "document.getElementById('temperature')"
        page.run(f"Object.defineProperty({field}, 'validity', {{value: {{badInput: true}}}})")
        page.type("two")
        page.key("Enter")
        assert "expected a number" in page.run(STATUS) and page.run(f"{FIELD}.value") == "two"


def test_answer_that_the_aligner_hardly_changed_says_so(server, visit):
    page = visit(server[1])
    page.run("document.getElementById('mode').value = 'par_kl'")
    page.run(
        "document.getElementById('div_threshold').value = '0'; document.getElementById('seed').value = '3'"
    )
    page.type("hello")
    page.key("Enter")
    page.until(f"Boolean({LAST}?.querySelector('.remark'))")
    line = page.run(f"{LAST}.querySelector('.remark').textContent")
    assert line.startswith("The aligner changed none of the ") and "100 % of them fell back" in line
    page.run("document.getElementById('mode').value = 'par'")
    page.type("more")
    page.key("Enter")
    page.until(f"document.querySelectorAll('.answers').length === 2 && {IDLE}")
    assert page.run(f"{LAST}.querySelector('.remark')") is None


def test_hostile_text_is_shown_as_text(server, scripted, visit):
    page = visit(server[1])
    page.run("document.getElementById('compare').click()")
    for text in [text for text in HOSTILE if "\ud83d" not in text]:
        send(page, scripted, text, 2)
        scripted.end(text, -1)
        scripted.end(f"{text} {text}", -2)
        page.until(IDLE)
        assert {shown(page), shown(page, 1)} == {text, f"{text} {text}"}
        assert page.run("[...document.querySelectorAll('.said')].at(-1).textContent") == text.strip()
    assert page.run("window.hacked === undefined && Object.prototype.hacked === undefined")
    assert page.run("document.images.length + document.forms.length + document.scripts.length") == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_long_dialogues_fit(server, scripted, visit, width, scheme):
    """Nothing is wider than the window; the end stays visible unless the reader has scrolled up."""
    page = visit(server[1], width=width, height=750, scheme=scheme)
    page.run("document.getElementById('compare').click(); document.querySelector('details').open = true")
    box = "document.getElementById('dialogue')"
    end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight"
    for number in range(2):
        send(page, scripted, f"{number} {'word ' * 8}{'x' * 150}", 2)
        for which in (-1, -2):
            for part in range(4):
                scripted.say(f"{part} {'an answer ' * 15}{'y' * 120}\n", which)
            scripted.end("z", which)
        page.until(IDLE)
        assert page.run(end) < 2
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(f"{box}.scrollWidth <= {box}.clientWidth")
    ask = "document.getElementById('send').getBoundingClientRect()"
    assert page.run(f"{ask}.bottom <= innerHeight && {box}.clientHeight >= 128")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
    send(page, scripted, "last", 2)
    page.run(f"{box}.scrollTop = 0")
    for which in (-1, -2):
        scripted.end("late " * 50, which)
    page.until(IDLE)
    assert page.run(f"{box}.scrollTop") == 0


def test_page_can_be_used_with_the_keyboard(server, scripted, visit):
    """Tab reaches every control in order; the focus is visible and is not moved by answers."""
    page = visit(server[1])
    reached = []
    for _ in range(8):
        page.key("Tab", shift=True)
        reached.append(page.run(f"{FOCUS} || document.activeElement.localName"))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if reached[-1] == "model":
            break
    assert reached == ["dialogue", "summary", "other", "compare", "model"]
    page.key("ArrowDown")
    page.until("document.getElementById('model').value === 'b'")
    page.key("Tab")
    page.key(" ")
    for _ in range(4):
        page.key("Tab")
    send(page, scripted, "one", 2)
    assert sorted(filter(None, (scripted.prompt(place)[0] for place in (0, 1)))) == ["b"]
    page.key("Tab")
    assert page.run(FOCUS) == "stop"
    page.key("Enter")
    page.until(IDLE)
    assert page.run(FOCUS) == "text" and page.run(f"{FIELD}.value") == "one"
    page.key("Enter", shift=True)
    page.type("two")
    assert page.run(f"{FIELD}.value") == "one\ntwo"


def test_removed_aligner_disappears_from_the_list(server, visit):
    """The list is updated when it gets the focus, and the user is informed."""
    models, url = server
    page = visit(url)
    page.run("document.getElementById('model').value = 'b'")
    served = models.served.pop("b")
    try:
        page.run("document.getElementById('model').focus()")
        page.until(f"{STATUS} === 'b is not served any more'")
        assert page.run("document.getElementById('model').value") == "a"
    finally:
        models.served["b"] = served
