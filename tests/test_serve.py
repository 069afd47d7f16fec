"""The command: what it refuses, a shutdown that finishes what runs, the page in a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from chat_window import CHROMIUM, Browser
from served import ask, eventually, running, save_models

import serve
import serve_settings
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("models")
    save_models(found)
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no proposal"),
        (["proposl=x"], "did you mean 'proposal'"),
        (["proposal=x", "limits.chioces=3"], "did you mean 'limits.choices'"),
        (["proposal=x", "port=70000"], "port=70000: expected a number in"),
        (["proposal=x", "port=a"], "expected int"),
        (["proposal=x", "sampling.top_p=2"], "top_p=2"),
        (["proposal=x", "aligners={proposal: y}"], "other than 'proposal'"),
        (["proposal=x", "aligners={a: 3}"], "expected a folder"),
        (["proposal=x", "aligners=y"], "expected names and folders"),
        (["proposal=x", "limits.max_length=99999"], "at most engine.max_tokens"),
        (["proposal=x", "limits.choices=500"], "could fill the queue"),
        (["proposal=x", "engine=3"], "expected keys below it"),
        (["proposal=/nowhere"], "no model at '/nowhere'"),
        (["proposal=P", "aligners={a: OTHER}"], "a pair needs one vocabulary"),
        (["proposal=P", "limits.max_length=300"], "holds 256 positions"),
        (["proposal=P", "template=rm"], "did you mean 'ram'"),
        (["proposal=P", "host=192.0.2.1", "port=0"], "put a key into the environment variable RAM_API_KEY"),
        (["worker", "proposal=P", "host=0.0.0.0"], "worker.exposed=true"),
        (["chta", "proposal=P"], "did you mean 'chat'"),
        (["fastchat", "contoller"], "did you mean 'controller'"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, said):
    """Found before a port is opened; the nearest key is named."""
    arguments = [each.replace("=P", f"={folder}/p").replace("OTHER", f"{folder}/other") for each in arguments]
    with pytest.raises(UserError) as caught:
        serve.main(arguments if arguments else ["port=1"])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_keys_are_not_shown(monkeypatch):
    monkeypatch.setenv("RAM_API_KEY", "open sesame")
    found = serve_settings.compose(["proposal=x", "host=0.0.0.0"])
    serve_settings.check_exposure(found)
    assert found.key == "open sesame" and "sesame" not in repr(found)
    monkeypatch.setenv("RAM_ADMIN_KEY", "open sesame")
    with pytest.raises(UserError, match="the same key"):
        serve_settings.compose(["proposal=x"])


def test_help_is_the_configuration(capsys):
    serve.main(["--help"])
    assert (ROOT / "config" / "serve.yaml").read_text() in capsys.readouterr().out


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_finishes_what_it_streams(folder, tmp_path, number):
    """A stream that has begun goes on to its end; new requests are not taken; the exit code is 0."""
    port, log = free_port(), tmp_path / "log"
    aligners = f"aligners={{a: {folder}/a}}"
    command = [
        "bash",
        "bin/serve.sh",
        f"proposal={folder}/p",
        aligners,
        f"port={port}",
        "sampling.base_top_p=1.0",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"

    def healthy():
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        eventually(healthy, 60)
        body = {"model": "proposal", "prompt": "x", "max_tokens": 250, "stream": True, "seed": 2, "n": 16}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(number)
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        reasons = [json.loads(each)["choices"][0]["finish_reason"] for each in events[:-1]]
        assert sum(reason in ("stop", "length") for reason in reasons) == 16
        assert process.wait(20) == 0, log.read_text()
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health")
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()


# ---- the page ----------------------------------------------------------------------------------------------


def test_page_is_self_contained(folder):
    """A strict policy, nothing from elsewhere, and no way to write HTML into it."""
    with running(folder) as (_, url):
        page = httpx.get(url)
        policy = page.headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        texts = [page.text] + [httpx.get(f"{url}/chat.{kind}").text for kind in ("css", "js")]
    assert not any("http://" in text or "https://" in text for text in texts)
    assert not any(
        word in texts[2] for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
    )


LAST = "document.querySelector('.answers:last-child')"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_in_a_browser(folder, tmp_path, monkeypatch):
    """With a key: it is asked for, a question is answered, two answers are compared; nothing complains."""
    monkeypatch.setenv("RAM_API_KEY", "sesame")
    with running(folder, "max_new_tokens=30") as (_, url), Browser(tmp_path / "b", width=390) as browser:
        monkeypatch.delenv("RAM_API_KEY")
        browser.open(url)
        browser.until("!document.getElementById('key-form').hidden")
        browser.type("wrong")
        browser.press("Enter")
        browser.until("document.getElementById('status').textContent.includes('no valid key')")
        browser.run("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.press("Enter")
        browser.until("!document.getElementById('text').disabled")
        names = "Array.from(document.getElementById('model').options, (o) => o.value).join()"
        assert (
            browser.run(names) == "proposal,a,b"
            and browser.run("document.getElementById('model').value") == "a"
        )
        browser.run("document.getElementById('seed').value = '7'")
        browser.type("<b>hello</b>")
        browser.press("Enter")
        browser.until(f"{LAST}?.getAttribute('aria-busy') === 'false'")
        assert browser.run("document.querySelector('.said').textContent") == "<b>hello</b>"
        shown = browser.run(f"{LAST}.querySelector('p').textContent")
        messages = [{"role": "user", "content": "<b>hello</b>"}]
        headers = {"Authorization": "Bearer sesame"}
        told = ask(url, {"model": "a", "messages": messages, "seed": 7}, headers=headers).json()
        assert shown == told["choices"][0]["message"]["content"]
        browser.run("document.getElementById('compare').checked = true")
        browser.type("again")
        browser.press("Enter")
        browser.until(f"{LAST}.getAttribute('aria-busy') === 'false' && {LAST}.children.length === 2")
        assert browser.run(f"{LAST}.querySelectorAll('mark').length") > 1
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        noise = [each for each in browser.errors if each.get("entry", {}).get("source") != "network"]
        assert not noise  # the 401 of the first try is all that may be complained of
