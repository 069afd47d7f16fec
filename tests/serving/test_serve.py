"""The command: what it refuses, a shutdown that finishes what runs."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from served import PLAIN, eventually, get

import serve
from ram.errors import UserError
from ram.settings import serving

ROOT = Path(__file__).resolve().parents[2]
LARGE = 16 << 20  # bytes


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
        (["proposal=x", "aligner="], "expected a folder"),
        (["proposal=x", "aligners={aligner: y}", "aligner=z"], "give one of them"),
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


def test_chat_needs_something_to_read(folder, monkeypatch):
    """As where a script runs it with standard input closed; said before the models load."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(serve, "Models", None)
    with pytest.raises(UserError, match="input or output is closed"):
        serve.main(["chat", f"proposal={folder}/p"])


def test_keys_are_not_shown(monkeypatch):
    monkeypatch.setenv("RAM_API_KEY", "open sesame")
    found = serving.read_settings(["proposal=x", "host=0.0.0.0"])
    serving.check_exposure(found)
    assert found.key == "open sesame" and "sesame" not in repr(found)
    monkeypatch.setenv("RAM_ADMIN_KEY", "open sesame")
    with pytest.raises(UserError, match="the same key"):
        serving.read_settings(["proposal=x"])


def test_help_is_the_configuration(capsys):
    """Every key is printed with its comment, those of an included file too."""
    serve.main(["--help"])
    printed = capsys.readouterr().out
    assert (ROOT / "config" / "serve.yaml").read_text() in printed
    assert (ROOT / "config" / "decoding" / "par.yaml").read_text() in printed


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def streamed_over(url, tell):
    """Streams answers from a server that is told to stop after the first event; they come whole."""
    body = {"model": "proposal", "prompt": "x", "max_tokens": 250, "stream": True, "seed": 2, "n": 16}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, **PLAIN) as stream:
        lines = stream.iter_lines()
        next(lines)
        tell()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    reasons = [json.loads(each)["choices"][0]["finish_reason"] for each in events[:-1]]
    assert sum(reason in ("stop", "length") for reason in reasons) == 16


def healthy(url):
    try:
        return get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@contextlib.contextmanager
def bare(**settings):
    """The address of a server of nothing, which may open 40 files."""

    async def app(scope, receive, send):
        await asyncio.sleep(0.6 if scope["path"] == "/slow" else 0)
        body = b"ok" if scope["path"] != "/large" else bytes(LARGE)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda kind: (40, 40))
        server = serve.make_server(app, 1, **settings)
    limits = SimpleNamespace(seconds=1)
    found = serve.listen(SimpleNamespace(config=SimpleNamespace(host="127.0.0.1", port=0, limits=limits)))
    thread = threading.Thread(target=serve.run_server, args=(server, found))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield found.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        found.close()


def closed(connection):
    """Whether the other side ends a connection, without any word or after an answer."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(1000):
            pass
    return True


@pytest.mark.parametrize("said", ["", "GET / HT", "GET / HTTP/1.1\r\nHost:", "POST"])
def test_who_says_nothing_is_not_waited_for(said):
    """Nor who stops in the middle, at first or later, or goes on with a body after the answer; one that is
    being answered is.
    """
    whole = "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n"
    if said == "POST":
        said, whole = "", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n"
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(bare(arrival=0.3))
        silent, other = (stack.enter_context(socket.create_connection(place, 5)) for _ in range(2))
        silent.sendall(said.encode())
        other.sendall(whole.encode())
        assert closed(silent)
        assert b"200 OK" in other.recv(1000)
        deadline = time.monotonic() + 3  # before uvicorn's own five seconds
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                other.sendall(b"G")
                time.sleep(0.05)


def test_who_does_not_read_is_not_waited_for():
    """Some of a large answer lies in the machine's buffers, the rest is given up."""
    with contextlib.ExitStack() as stack:
        place, reader = stack.enter_context(bare()), stack.enter_context(socket.socket())
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(5)
        reader.connect(place)
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(2.5)
        read = 0
        with pytest.raises(ConnectionError):
            while more := len(reader.recv(1 << 20)):
                read += more
        assert 0 < read < LARGE


def test_one_connection_too_many():
    """It is closed at once; where another one goes there is room again."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(bare())
        others = []
        for _ in range(20):
            others.append(stack.enter_context(socket.create_connection(place, 5)))
            time.sleep(0.01)
        with socket.create_connection(place, 5) as one_more:
            assert closed(one_more)
        others[0].close()
        eventually(lambda: healthy("http://{}:{}".format(*place)))


def test_sigterm_finishes_what_is_streamed(folder, tmp_path):
    """A stream that has begun goes on to its end; new requests are not taken; the exit code is 0."""
    port, log = free_port(), tmp_path / "log"
    command = ["bash", "bin/serve.sh", f"proposal={folder}/p", f"aligners={{a: {folder}/a}}", f"port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "sampling.base_top_p=1.0"], cwd=ROOT, env=env, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: process.poll() is not None or healthy(url), 60)
        assert process.poll() is None, log.read_text()
        streamed_over(url, process.terminate)
        assert process.wait(20) == 0, log.read_text()
        assert not healthy(url) and "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_finishes_what_is_streamed(folder):
    """The same in this process, where the server's own handler of SIGINT hears it and then gives way.

    No aligner is loaded: once, several answers at once failed there, for their order was asked of None.
    """
    port, serving = free_port(), threading.Event()
    url, before = f"http://127.0.0.1:{port}", signal.getsignal(signal.SIGINT)

    def interrupt():
        if serving.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    def client():
        try:
            eventually(lambda: healthy(url), 60)
            streamed_over(url, interrupt)
        except BaseException:
            interrupt()  # or the server would wait for it
            raise

    serving.set()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(client)
        serve.main([f"proposal={folder}/p", f"port={port}", "sampling.base_top_p=1.0"])
        serving.clear()
        found.result()
    assert not healthy(url)
    signal.signal(signal.SIGINT, before)
