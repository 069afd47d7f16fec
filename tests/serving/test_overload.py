"""Full queues, clients that disconnect, answers that take too long or outlast the shutdown."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import ask, eventually, get, running, settings

from ram.models import checkpoints
from ram.serving.guard import Guard
from ram.serving.metrics import Metrics

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}
LONG = CHAT | {"max_tokens": 200, "model": "proposal"}


@contextlib.contextmanager
def slow_server(folder, *arguments):
    """A server with a slow proposal and room for two answers of a client at once and three that wait."""
    load = checkpoints.load_model

    def load_slowly(source, *args, **kwargs):
        model = load(source, *args, **kwargs)
        model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        return model

    bounds = ["engine.max_rows=4", "engine.max_waiting=6", "limits.choices=2"]
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "load_model", load_slowly)
            models_and_url = stack.enter_context(running(folder, *bounds, *arguments))
        yield models_and_url


@pytest.fixture(scope="module")
def slow(folder):
    with slow_server(folder, "limits.seconds=60") as models_and_url:
        yield models_and_url


def idle(models):
    figures = models.engine.figures()
    return figures["rows"] == figures["waiting"] == 0


def test_full_queue_rejects_requests_with_429(slow):
    """They are rejected at once, with Retry-After; once the queue is empty, requests are answered again."""
    models, url = slow
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: ask(url, LONG | {"seed": seed, "max_tokens": 15}), range(12)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429} and len(refused) >= 4
    for answer in refused:
        assert (
            int(answer.headers["retry-after"]) >= 1 and answer.json()["error"]["type"] == "rate_limit_error"
        )
    assert ask(url, CHAT).status_code == 200
    text = get(f"{url}/metrics").text
    labels = 'code="429",route="/v1/chat/completions"'
    assert f"ram_http_requests_total{{{labels}}} {len(refused):.1f}" in text


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_place(slow, stream):
    """Its request is cancelled at once, whether it is being decoded or waits."""
    models, url = slow
    body = json.dumps(LONG | {"stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connections = [socket.create_connection((host, int(port)), timeout=10) for _ in range(3)]
    for connection in connections:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    eventually(lambda: models.engine.figures()["rows"] + models.engine.figures()["waiting"] == 3)
    before = models.engine.figures()["finished"]["cancelled"]
    if stream:
        assert b"200 OK" in connections[0].recv(100)
    for connection in connections:
        connection.close()
    eventually(lambda: idle(models), seconds=3.5)  # a whole answer takes at least 4 seconds
    assert models.engine.figures()["finished"]["cancelled"] == before + 3
    assert ask(url, CHAT).status_code == 200


def test_answer_that_takes_too_long_is_cancelled(folder):
    with slow_server(folder, "limits.seconds=1") as (models, url):
        answer = ask(url, LONG)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        lines = ask(url, LONG | {"stream": True}).text.split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-2] == "data: [DONE]"
        eventually(lambda: idle(models), seconds=2)


@pytest.mark.parametrize("begun", [True, False])
def test_answer_that_outlasts_the_shutdown_is_ended(folder, begun):
    """The client gets 503 if nothing of the answer was sent yet."""

    async def endless(scope, receive, send):
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def answer_during_shutdown():
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost")]}
        guard = Guard(endless, settings(folder), Metrics())
        task = asyncio.ensure_future(guard(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await task
        return sent

    start, *rest = asyncio.run(answer_during_shutdown())
    assert start["status"] == (200 if begun else 503) and len(rest) == (not begun)


@pytest.mark.parametrize(("status", "size", "pause"), [(400, 1 << 20, 1.0), (422, 100, 0), (200, 1 << 20, 0)])
def test_refusal_of_a_large_body_is_answered_after_a_pause(folder, monkeypatch, status, size, pause):
    """Repeated at full speed, such requests made another client's small one wait 56 to 111 times as long."""
    pauses, sent, real, here = [], [], asyncio.sleep, threading.get_ident()

    async def sleep(seconds):
        if threading.get_ident() == here:
            pauses.append(seconds)
        else:  # of a server of this module
            await real(seconds)

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    async def send(message):
        sent.append(message["type"])

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "client": ("127.0.0.1", 1)}
    scope["headers"] = [(b"host", b"127.0.0.1")]
    monkeypatch.setattr("ram.serving.guard.asyncio.sleep", sleep)
    asyncio.run(Guard(app, settings(folder, "limits.body_bytes=2000000"), Metrics())(scope, receive, send))
    assert pauses == ([pause] if pause else []) and sent == ["http.response.start", "http.response.body"]
