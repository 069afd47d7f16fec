"""FastChat's protocol: the worker's answers, its registering, and FastChat's own servers in front of it."""

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
    """(models, url) of a worker that registers and stops when the context is left."""
    models, listener, url = opened(folder, *arguments)
    with fastchat_worker.registered(models, url) as app, listening(models, app, listener):
        yield models, url


class Controller(BaseHTTPRequestHandler):
    """Stands in for FastChat's: notes what it is told, forgets a worker when `known` is cleared."""

    told, known = [], True

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.told.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        body = json.dumps({"exist": Controller.known}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def worker(folder):
    with working(folder, "seed=5", "worker.controller=http://127.0.0.1:1") as found:
        yield found


def post(worker, path, **body):
    return httpx.post(f"{worker[1]}/{path}", json=body, timeout=60)


def items(answer):
    return [json.loads(each) for each in answer.content.split(b"\0") if each]


@pytest.mark.parametrize("name", ["proposal", "a"])
def test_stream_grows_into_the_generated_text(worker, name):
    """Each item has the whole text so far; counts are exact; `echo` repeats the prompt."""
    text = chat_text("hi")
    found = items(
        post(worker, "worker_generate_stream", model=name, prompt=text, max_new_tokens=20, echo=False)
    )
    whole = expected(worker[0], name, text, 5, 20, stop=())
    assert found[-1]["text"] == whole.text and found[-1]["finish_reason"] == whole.finish_reason
    counts = {"prompt_tokens": len(text), "completion_tokens": len(whole.token_ids)}
    assert found[-1]["usage"] == counts | {"total_tokens": sum(counts.values())}
    assert all(b["text"].startswith(a["text"]) for a, b in zip(found, found[1:], strict=False))
    assert {item["error_code"] for item in found} == {0} and len(found) > 2
    echoed = post(worker, "worker_generate", model=name, prompt=text, max_new_tokens=20).json()
    assert echoed["text"] == text + whole.text


def test_settings_of_a_request(worker):
    """FastChat's temperature is the aligner's, and the proposal's where that answers alone; stops cut."""
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
    letter = next(each for each in pair[1:] if each.isascii())
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
def test_failures_have_fastchats_codes(worker, body, code):
    """Whole or streamed; the worker lives on."""
    for path in ("worker_generate", "worker_generate_stream"):
        (found,) = items(post(worker, path, **body))
        assert found["error_code"] == code and found["text"]
    assert httpx.post(f"{worker[1]}/worker_generate", content=b"[").status_code == 400
    assert post(worker, "worker_get_embeddings", input=["x"]).json()["error_code"] == 40302


@pytest.mark.parametrize("key", ["max_new_tokens", "seed"])
def test_numbers_beyond_all_numbers(worker, key):
    """1e400 is infinite to a parser of JSON, and no count."""
    for path in ("worker_generate", "worker_generate_stream"):
        body = f'{{"model": "a", "prompt": "hi", "{key}": 1e400}}'
        (found,) = items(httpx.post(f"{worker[1]}/{path}", content=body))
        assert found["error_code"] == 40302 and "infinity" in found["text"]


def test_what_a_controller_asks(worker):
    assert httpx.post(f"{worker[1]}/worker_get_status").json() == {
        "model_names": ["proposal", "a", "b"],
        "speed": 1,
        "queue_length": 0,
    }
    assert post(worker, "count_token", prompt="four").json() == {"count": 4, "error_code": 0}
    assert post(worker, "model_details").json() == {"context_length": 256}
    conversation = post(worker, "worker_get_conv_template").json()["conv"]
    assert conversation["name"] == "ram" and conversation["stop_str"] == "\n\nHuman"


def test_registers_again_where_it_was_forgotten(folder, monkeypatch):
    """A controller that comes late or forgets is told; the address is the one that the settings give."""
    monkeypatch.setattr(fastchat_worker, "HEART_BEAT", 0.1)
    monkeypatch.setattr(fastchat_worker, "RETRY", 0.1)
    monkeypatch.setattr(Controller, "told", told := [])
    monkeypatch.setattr(Controller, "known", True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = [f"worker.controller=http://127.0.0.1:{port}", "worker.address=http://worker:9"]
    with working(folder, *given):
        server = ThreadingHTTPServer(("127.0.0.1", port), Controller)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        eventually(lambda: len(told) >= 2)
        assert told[0][0] == "/register_worker" and told[0][1]["worker_name"] == "http://worker:9"
        assert told[0][1]["worker_status"]["model_names"] == ["proposal", "a", "b"]
        assert told[1] == ("/receive_heart_beat", {"worker_name": "http://worker:9", "queue_length": 0})
        Controller.known = False
        eventually(lambda: sum(path == "/register_worker" for path, _ in told) >= 2)
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_fastchats_own_servers(folder, tmp_path):
    """Its controller and its OpenAI server in front of a worker: models, answers whole and streamed."""
    openai = pytest.importorskip("openai")
    ports = []
    for _ in range(2):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            ports.append(found.getsockname()[1])
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
        started = [subprocess.Popen([*script, *each], **process) for each in commands]
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
