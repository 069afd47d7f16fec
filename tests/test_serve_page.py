"""The server's page in a browser: its policy, keys, answers."""

import httpx
import pytest
from served import ask, running, save_models

LAST = "document.querySelector('.answers:last-child')"
IDLE = f"{LAST}?.getAttribute('aria-busy') === 'false'"
STATUS = "document.getElementById('status').textContent"
FIELD = "document.getElementById('text')"
FOCUS = "document.activeElement.id"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("models")
    save_models(found)
    return found


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


def shown(page, place=0):
    return page.run(f"{LAST}.querySelectorAll('.answer p:not(.facts)')[{place}].textContent")


def test_page_is_self_contained(server):
    """A strict policy, nothing from elsewhere, and no way to write HTML into it."""
    url = server[1]
    page = httpx.get(url)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    texts = [page.text] + [httpx.get(f"{url}/chat.{kind}").text for kind in ("css", "js")]
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
        page.run("document.getElementById('compare').click()")
        page.type("again")
        page.key("Enter")
        page.until(f"{LAST}.children.length === 2 && {IDLE}")
        assert page.run(f"{LAST}.querySelectorAll('mark').length") > 1
