"""The FastChat worker: its answers, its registration, and FastChat's own servers in front of it."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from served import chat_text, eventually, expected, listening, opened

from ram.serving.fastchat import worker as fastchat_worker

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def working(folder, *arguments):
    """The models and URL of a registered worker that stops when the context is left."""
    models, listener, url = opened(folder, *arguments)
    with fastchat_worker.registered(models, url) as app, listening(models, app, listener):
        yield models, url


class Controller(BaseHTTPRequestHandler):
    """A stand-in for FastChat's controller that records requests; clear `known` to make it forget workers."""

    requests, known = [], True

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        body = json.dumps({"exist": Controller.known}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def worker(folder):
    with working(folder, "seed=5", "worker.controller=http://127.0.0.1:1") as models_and_url:
        yield models_and_url


def post(worker, path, **body):
    return httpx.post(f"{worker[1]}/{path}", json=body, timeout=60)


def items(answer):
    return [json.loads(item) for item in answer.content.split(b"\0") if item]


def test_stream_that_takes_too_long_ends_with_an_error():
    """The client gets a whole body, and the answer's requests are ended."""
    sent, ended = [], []

    async def endless():
        try:
            yield {"text": "a", "error_code": 0}
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def receive():
        await asyncio.sleep(60)
        return {}

    async def send(message):
        sent.append(message)

    asyncio.run(fastchat_worker.Items(endless(), 0.2)({"type": "http"}, receive, send))
    first, last = (json.loads(message["body"][:-1]) for message in sent[1:3])
    assert first["text"] == "a" and last["error_code"] != 0 and "0.2 seconds" in last["text"]
    assert sent[3:] == [{"type": "http.response.body", "body": b"", "more_body": False}] and ended


@pytest.mark.parametrize("name", ["proposal", "a"])
def test_stream_ends_with_the_text_of_generate(worker, name):
    """Each item has the whole text so far; token counts are exact; `echo` repeats the prompt."""
    text = chat_text("hi")
    stream = items(
        post(worker, "worker_generate_stream", model=name, prompt=text, max_new_tokens=20, echo=False)
    )
    whole = expected(worker[0], name, text, 5, 20, stop=())
    assert stream[-1]["text"] == whole.text and stream[-1]["finish_reason"] == whole.finish_reason
    counts = {"prompt_tokens": len(text), "completion_tokens": len(whole.token_ids)}
    assert stream[-1]["usage"] == counts | {"total_tokens": sum(counts.values())}
    assert all(b["text"].startswith(a["text"]) for a, b in zip(stream, stream[1:], strict=False))
    assert {item["error_code"] for item in stream} == {0} and len(stream) > 2
    echoed = post(worker, "worker_generate", model=name, prompt=text, max_new_tokens=20).json()
    assert echoed["text"] == text + whole.text


def test_settings_of_a_request_are_used(worker):
    """FastChat's temperature is the aligner's, or the proposal's if it answers alone; stop strings cut."""
    law = {"temperature": 0.4, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": -1}
    text = "Q: A:"
    request = {"prompt": text, "max_new_tokens": 20, "echo": False, "stop": None, "seed": 3, **law}
    pair = post(worker, "worker_generate", model="a", **request).json()["text"]
    assert pair == expected(worker[0], "a", text, 3, 20, stop=(), **law).text
    alone = post(worker, "worker_generate", model="proposal", **request).json()["text"]
    base = {f"base_{key}": value for key, value in law.items()}
    assert alone == expected(worker[0], None, text, 3, 20, stop=(), **base).text
    stopped = post(worker, "worker_generate", model="a", **{**request, "stop": pair[5]}).json()
    assert stopped["text"] == pair[: pair.index(pair[5])] and stopped["finish_reason"] == "stop"
    letter = next(character for character in pair[1:] if character.isascii())
    ends = worker[0].encode_text(letter, False)
    by_id = post(worker, "worker_generate", model="a", **request, stop_token_ids=ends).json()
    assert (by_id["text"], by_id["finish_reason"]) == (pair[: pair.index(letter)], "stop")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"model": "x", "prompt": "hi"}, 40301),
        ({"model": "a"}, 40302),
        ({"model": "a", "prompt": "hi", "temperature": -1}, 40302),
        ({"model": "a", "prompt": "hi", "max_new_tokens": "many"}, 40302),
        ({"model": "a", "prompt": "hi", "stop": [3]}, 40302),
        ({"model": "a", "prompt": "hi", "stop_token_ids": ["</s>"]}, 40302),
        ({"model": "a", "prompt": "x" * 9000}, 40303),
    ],
)
def test_failure_has_fastchats_error_code(worker, body, code):
    """This holds for whole and streamed answers, and the worker continues."""
    for path in ("worker_generate", "worker_generate_stream"):
        (item,) = items(post(worker, path, **body))
        assert item["error_code"] == code and item["text"]
    assert httpx.post(f"{worker[1]}/worker_generate", content=b"[").status_code == 400
    assert post(worker, "worker_get_embeddings", input=["x"]).json()["error_code"] == 40302


@pytest.mark.parametrize("key", ["max_new_tokens", "seed"])
def test_infinite_number_is_out_of_range(worker, key):
    """A JSON parser reads 1e400 as infinity."""
    for path in ("worker_generate", "worker_generate_stream"):
        body = f'{{"model": "a", "prompt": "hi", "{key}": 1e400}}'
        (item,) = items(httpx.post(f"{worker[1]}/{path}", content=body))
        assert item["error_code"] == 40302 and "infinity" in item["text"]


def test_controller_gets_status_template_and_counts(worker):
    assert httpx.post(f"{worker[1]}/worker_get_status").json() == {
        "model_names": ["proposal", "a", "b"],
        "speed": 1,
        "queue_length": 0,
    }
    assert post(worker, "count_token", prompt="four").json() == {"count": 4, "error_code": 0}
    assert post(worker, "model_details").json() == {"context_length": 256}
    conversation = post(worker, "worker_get_conv_template").json()["conv"]
    assert conversation["name"] == "ram" and conversation["stop_str"] == "\n\nHuman"


def test_worker_registers_again_if_forgotten(folder, monkeypatch):
    """It also registers at a controller that starts later, with the address of the settings."""
    monkeypatch.setattr(fastchat_worker, "HEART_BEAT", 0.1)
    monkeypatch.setattr(fastchat_worker, "RETRY", 0.1)
    monkeypatch.setattr(Controller, "requests", requests := [])
    monkeypatch.setattr(Controller, "known", True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = [f"worker.controller=http://127.0.0.1:{port}", "worker.address=http://worker:9"]
    with working(folder, *arguments):
        server = ThreadingHTTPServer(("127.0.0.1", port), Controller)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        eventually(lambda: len(requests) >= 2)
        path, body = requests[0]
        assert path == "/register_worker" and body["worker_name"] == "http://worker:9"
        assert body["worker_status"]["model_names"] == ["proposal", "a", "b"]
        assert requests[1] == ("/receive_heart_beat", {"worker_name": "http://worker:9", "queue_length": 0})
        Controller.known = False
        eventually(lambda: sum(path == "/register_worker" for path, _ in requests) >= 2)
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_fastchats_own_servers_work_with_the_worker(folder, tmp_path):
    """Its controller and its OpenAI server list the models, and give whole and streamed answers."""
    openai = pytest.importorskip("openai")
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    controller, front = (f"http://127.0.0.1:{port}" for port in ports)
    env = os.environ | {"LOGDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    commands = [
        ["controller", "--host", "127.0.0.1", "--port", str(ports[0])],
        [
            "openai_api_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(ports[1]),
            "--controller-address",
            controller,
        ],
    ]
    with open(tmp_path / "log", "w") as log:
        process = {"cwd": ROOT, "env": env, "stdout": log, "stderr": log}
        script = [sys.executable, "serve.py", "fastchat"]
        started = [subprocess.Popen([*script, *command], **process) for command in commands]
    try:
        with working(folder, "seed=5", f"worker.controller={controller}") as (models, _):
            client = openai.OpenAI(base_url=f"{front}/v1", api_key="none", max_retries=0)

            def listed():
                try:
                    return len(client.models.list().data) == 3
                except openai.APIError:
                    return False

            eventually(listed, 90)
            request = {
                "model": "a",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 20,
                "temperature": 0.9,
                "top_p": 1.0,
            }
            law = {"temperature": 0.9, "top_p": 1.0}  # all that FastChat passes on
            whole = expected(models, "a", chat_text("hello"), 5, 20, **law)
            answer = client.chat.completions.create(**request)
            assert answer.choices[0].message.content == whole.text
            assert answer.usage.completion_tokens == len(whole.token_ids)
            chunks = client.chat.completions.create(**request, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == whole.text.replace("\ufffd", "")  # as FastChat's stream has it
    finally:
        for process in started:
            process.kill()
            process.wait()
