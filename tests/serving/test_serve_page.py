"""The server's page in a browser: keys, answers that grow, stop and fail, two side by side, widths."""

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
    with running(folder, "max_new_tokens=30") as found:
        yield found


@pytest.fixture
def visit(browser):
    """Opens the page of a server; afterwards it must have thrown nothing and been refused nothing by its
    policy.
    """

    def go(url, ready=True, **view):
        browser.said.clear()
        browser.open(url, **view)
        browser.until(f"{FIELD}.disabled === {'false' if ready else 'true'}")
        return browser

    yield go
    browser.run("1")  # whatever is still on its way arrives before the answer
    # The network's own entries are statuses like 401, which the tests bring about.
    assert [each for each in browser.said if each.get("entry", {}).get("source") != "network"] == []


class Told:
    """In the engine's place: answers say what a test has them say, when it says so."""

    def __init__(self):
        self.asked, self.left, self.refusal = [], [], None

    def submit(self, request, listener):
        if self.refusal is not None:
            raise self.refusal
        self.asked.append((request, listener))
        return len(self.asked) - 1

    def cancel(self, ticket):
        self.left.append(ticket)

    def say(self, text, which=-1):
        request, hear = self.asked[which]
        ids = tuple(TOKENIZER(text).input_ids)
        hear(Piece(ids, text, None if request.logprobs is None else (TokenLogprobs(-1.0, ()),) * len(ids)))

    def end(self, text="", which=-1):
        self.say(text, which)
        stats = {"fallback_fraction": 0.25, "changed_fraction": 0.12, "mean_kl": float("inf")}
        self.asked[which][1](Done("stop", 5, 7, stats))

    def prompt(self, which=-1):
        """(aligner, text) that an answer was asked of."""
        request = self.asked[which][0]
        return request.aligner, TOKENIZER.decode(request.prompt_ids)


@pytest.fixture
def told(server, monkeypatch):
    found = Told()
    for name in ("submit", "cancel"):
        monkeypatch.setattr(server[0].engine, name, getattr(found, name))
    return found


def send(page, told, text, answers=1):
    """Types a message and sends it; the answers have begun."""
    before = len(told.asked)
    page.type(text)
    page.key("Enter")
    eventually(lambda: len(told.asked) == before + answers)


def shown(page, place=0):
    return page.run(f"{LAST}.querySelectorAll('.answer p:not(.facts)')[{place}].textContent")


def fact(page, place=0):
    found = page.run(f"{LAST}.querySelectorAll('.facts')[{place}].textContent")
    return found.replace("\u00a0", " ")


def test_page_is_self_contained(server):
    """A strict policy, nothing from elsewhere, and no way to write HTML into it."""
    url = server[1]
    page = get(url)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    texts = [page.text] + [get(f"{url}/chat.{kind}").text for kind in ("css", "js")]
    assert not any("http://" in text or "https://" in text for text in texts)
    assert not any(
        word in texts[2] for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
    )


def test_with_a_key(folder, visit, monkeypatch):
    """The key is asked for; the answer is the server's own; two are compared.

    A wrong key's refusal once took away the right key when it came after it: the lists were there, the first
    question went without a key and its answer stayed empty.
    """
    monkeypatch.setenv("RAM_API_KEY", "sesame")
    with running(folder, "max_new_tokens=30") as (_, url):
        page = visit(url, ready=False, width=400)
        wanted = "document.getElementById('wanted').textContent"
        page.until(f"{wanted} === 'This server wants a key:' && {FOCUS} === 'key'")
        page.type("wrong")
        page.key("Enter")
        page.until(f"{wanted}.startsWith(\"This key is not the server's\") && {FOCUS} === 'key'")
        assert page.run(STATUS) == ""
        page.run("""const plain = window.fetch; window.fetch = async (...given) => {
            const answer = await plain(...given);
            if (given[1].headers.Authorization === "Bearer late")
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


def test_an_answer_that_grows_and_is_stopped(server, told, visit):
    """What is typed meanwhile waits; the part that came is remembered; another aligner goes on with it."""
    page = visit(server[1])
    send(page, told, "one")
    told.say("The first")
    page.until(f"{LAST}.textContent.includes('The first')")
    page.type("two")
    page.key("Enter")
    assert "still being written" in page.run(STATUS) and page.run(f"{FIELD}.value") == "two"
    assert len(told.asked) == 1 and page.run(f"{LAST}.getAttribute('aria-busy')") == "true"
    page.run("document.getElementById('model').value = 'b'; document.getElementById('model').focus()")
    told.say(" part")
    page.until(f"{LAST}.textContent.includes('part')")
    assert page.run(FOCUS) == "model"
    page.run("document.getElementById('stop').click()")
    page.until(IDLE)
    eventually(lambda: told.left)  # the engine was told, which had not ended the answer
    assert (shown(page), fact(page), page.run(FOCUS)) == ("The first part", "stopped", "model")
    assert page.run(f"{LAST}.querySelector('h2').textContent") == "a"
    page.run(f"{FIELD}.focus()")
    page.key("Enter")
    eventually(lambda: len(told.asked) == 2)
    assert told.prompt() == ("b", chat_text("one", "The first part", "two"))
    told.end("whole")
    page.until(IDLE)
    assert fact(page).startswith("7 tokens · ended by itself · fell back 25 % · changed 12 % · seed ")
    send(page, told, "three")
    page.key("Escape")  # before anything came: as if it had not been asked
    page.until(IDLE)
    assert page.run(f"{FIELD}.value") == "three" and page.run(FOCUS) == "text"
    page.key("Enter")
    eventually(lambda: len(told.asked) == 4)
    assert told.prompt()[1] == chat_text("one", "The first part", "two", "whole", "three")
    assert page.run("document.querySelectorAll('.said').length") == 3
    page.run("document.getElementById('reset').click()")
    assert page.run(STATUS) == "the dialogue is forgotten" and page.run("!document.querySelector('.said')")
    send(page, told, "four")
    assert told.prompt()[1] == chat_text("four")
    told.end()
    page.until(IDLE)


@pytest.mark.parametrize("error", [Busy("9 requests wait already"), Closed("the server is shutting down")])
def test_a_refusal_is_shown_and_nothing_is_lost(server, told, visit, error):
    """429 and 503: the reason in red below the question, which stands in the field again."""
    page, told.refusal = visit(server[1], width=400, scheme="dark"), error
    page.type("one")
    page.key("Enter")
    page.until(IDLE)
    assert (fact(page), page.run(f"{FIELD}.value")) == (str(error), "one")
    colour = "getComputedStyle(document.querySelector('.facts.failed')).color"
    assert page.run(colour) == "rgb(255, 154, 145)"
    told.refusal = None
    page.key("Enter")
    eventually(lambda: told.asked)
    told.say("part")
    told.asked[-1][1](Done("error", 1, 1, {}, "decoding failed"))
    page.until(f"document.querySelectorAll('.said').length === 1 && {IDLE}")
    assert (shown(page), fact(page)) == ("part", "decoding failed")
    assert told.prompt()[1] == chat_text("one")


def test_two_answers_side_by_side(server, told, visit):
    """Tokens that the other has not are marked, bytes of a character together; the proposal alone gets none
    of the aligner's settings.
    """
    page = visit(server[1])
    for name, value in (("base_temperature", "0.5"), ("temperature", "2"), ("mode", "product")):
        page.run(f"document.getElementById('{name}').value = '{value}'")
    page.run("document.getElementById('compare').click()")

    def compare(question, left, right):
        before = len(told.asked)
        send(page, told, question, 2)
        for place in (before, before + 1):
            told.end(right if told.prompt(place)[0] else left, place)
        page.until(IDLE)
        marks = "Array.from({}.children[{}].querySelectorAll('mark'), (mark) => mark.textContent).join('|')"
        return [page.run(marks.format(LAST, side)) for side in (0, 1)]

    assert compare("1", "It is teal.\nNot  red", "It's teal!\nNot red") == ["i|.", "'|!"]
    assert (shown(page), shown(page, 1)) == ("It is teal.\nNot  red", "It's teal!\nNot red")
    tops = [page.run(f"{LAST}.children[{place}].getBoundingClientRect().top") for place in (0, 1)]
    assert tops[0] == tops[1] and "marked" in page.run(STATUS)
    laws = {request.aligner: request.params for request, _ in told.asked}
    assert (laws["a"].temperature, laws["a"].base_temperature, laws["a"].sample_mode) == (2, 0.5, "product")
    assert laws[None].base_temperature == 0.5 and len({r.seed for r, _ in told.asked}) == 1
    assert compare("2", "我喜欢红色", "我喜欢蓝色") == ["红", "蓝"]
    assert told.prompt()[1] == chat_text("1", "It's teal!\nNot red", "2")
    assert compare("2", "a🙂b", "a🙃b") == ["🙂", "🙃"]
    assert compare("3", "same", "same") == ["", ""] and page.run(STATUS) == "both answers are the same"
    page.run("document.getElementById('other').value = 'a'")
    send(page, told, "4")
    told.end("alone")
    page.until(IDLE)
    assert "not compared with itself" in page.run(STATUS)


def test_text_that_looks_like_a_program_is_text(server, told, visit):
    page = visit(server[1])
    page.run("document.getElementById('compare').click()")
    for text in [text for text in HOSTILE if "\ud83d" not in text]:
        send(page, told, text, 2)
        told.end(text, -1)
        told.end(f"{text} {text}", -2)
        page.until(IDLE)
        assert {shown(page), shown(page, 1)} == {text, f"{text} {text}"}
        assert page.run("[...document.querySelectorAll('.said')].at(-1).textContent") == text.strip()
    assert page.run("window.hacked === undefined && Object.prototype.hacked === undefined")
    assert page.run("document.images.length + document.forms.length + document.scripts.length") == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_long_dialogues_fit(server, told, visit, width, scheme):
    """Nothing is wider than the window; the end stays in sight unless the reader has scrolled up."""
    page = visit(server[1], width=width, height=750, scheme=scheme)
    page.run("document.getElementById('compare').click(); document.querySelector('details').open = true")
    box = "document.getElementById('dialogue')"
    end = f"{box}.scrollHeight - {box}.scrollTop - {box}.clientHeight"
    for number in range(2):
        send(page, told, f"{number} {'word ' * 30}{'x' * 150}", 2)
        for which in (-1, -2):
            for part in range(4):
                told.say(f"{part} {'an answer ' * 15}{'y' * 120}\n", which)
            told.end("z", which)
        page.until(IDLE)
        assert page.run(end) < 2
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    assert page.run(f"{box}.scrollWidth <= {box}.clientWidth")
    ask = "document.getElementById('send').getBoundingClientRect()"
    assert page.run(f"{ask}.bottom <= innerHeight && {box}.clientHeight >= 128")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]
    send(page, told, "last", 2)
    page.run(f"{box}.scrollTop = 0")
    for which in (-1, -2):
        told.end("late " * 50, which)
    page.until(IDLE)
    assert page.run(f"{box}.scrollTop") == 0


def test_by_keys_alone(server, told, visit):
    """Every control is reached in the order of the page, the focus shows, and is not taken away."""
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
    send(page, told, "one", 2)
    assert sorted(filter(None, (told.prompt(place)[0] for place in (0, 1)))) == ["b"]
    page.key("Tab")
    assert page.run(FOCUS) == "stop"
    page.key("Enter")
    page.until(IDLE)
    assert page.run(FOCUS) == "text" and page.run(f"{FIELD}.value") == "one"
    page.key("Enter", shift=True)
    page.type("two")
    assert page.run(f"{FIELD}.value") == "one\ntwo"


def test_an_aligner_that_is_gone(server, visit):
    """The lists follow what is served when somebody looks at them; whose aligner is gone is told."""
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
