"""The command `serve.py`: refused settings, and a shutdown that finishes running requests."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from served import PLAIN, eventually, healthy

import serve
from ram.errors import UserError
from ram.settings import serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_wrong_command_line_is_refused_in_one_line(folder, arguments, message):
    """It is refused before a port is opened; the message names the nearest key."""
    paths = {"=P": f"={folder}/p", "OTHER": f"{folder}/other"}
    for short, path in paths.items():
        arguments = [argument.replace(short, path) for argument in arguments]
    with pytest.raises(UserError) as error:
        serve.main(arguments if arguments else ["port=1"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_chat_with_closed_input_is_refused_before_models_load(folder, monkeypatch):
    """A script may run it with standard input closed."""
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(serve, "Models", None)
    with pytest.raises(UserError, match="input or output is closed"):
        serve.main(["chat", f"proposal={folder}/p"])


def test_keys_are_hidden_and_must_differ(monkeypatch):
    monkeypatch.setenv("RAM_API_KEY", "open sesame")
    settings = serving.read_settings(["proposal=x", "host=0.0.0.0"])
    serving.check_exposure(settings)
    assert settings.key == "open sesame" and "sesame" not in repr(settings)
    monkeypatch.setenv("RAM_ADMIN_KEY", "open sesame")
    with pytest.raises(UserError, match="the same key"):
        serving.read_settings(["proposal=x"])


def test_help_prints_the_configuration(capsys):
    """Every key is printed with its comment, including the keys of an included file."""
    serve.main(["--help"])
    printed = capsys.readouterr().out
    assert (ROOT / "config" / "serve.yaml").read_text() in printed
    assert (ROOT / "config" / "decoding" / "par.yaml").read_text() in printed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_stream_survives(url: str, stop_server: Callable[[], None]) -> None:
    """Stream answers from a server that is stopped after the first event; all of them must be complete."""
    body = {"model": "proposal", "prompt": "x", "max_tokens": 250, "stream": True, "seed": 2, "n": 16}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, **PLAIN) as stream:
        lines = stream.iter_lines()
        next(lines)
        stop_server()
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
    assert sum(reason in ("stop", "length") for reason in reasons) == 16


@pytest.mark.slow
def test_sigterm_finishes_running_streams(folder, tmp_path):
    """A running stream continues to its end, new requests are rejected, and the exit code is 0."""
    port, log = free_port(), tmp_path / "log"
    command = ["bash", "bin/serve.sh", f"proposal={folder}/p", f"aligners={{a: {folder}/a}}", f"port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "sampling.base_top_p=1.0"], cwd=ROOT, env=env, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: process.poll() is not None or healthy(url), 200)
        assert process.poll() is None, log.read_text()
        assert_stream_survives(url, process.terminate)
        assert process.wait(20) == 0, log.read_text()
        assert not healthy(url) and "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_finishes_running_streams(folder):
    """The same in this process: the server's own handler of SIGINT runs and is removed afterwards.

    No aligner is loaded. This once failed with several answers at once, because they were ordered by aligner.
    """
    port, serving_flag = free_port(), threading.Event()
    url, handler = f"http://127.0.0.1:{port}", signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        if serving_flag.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    def client() -> None:
        try:
            eventually(lambda: healthy(url), 60)
            assert_stream_survives(url, interrupt)
        except BaseException:
            interrupt()  # otherwise the server would run on
            raise

    serving_flag.set()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(client)
        serve.main([f"proposal={folder}/p", f"port={port}", "sampling.base_top_p=1.0"])
        serving_flag.clear()
        done.result()
    assert not healthy(url)
    signal.signal(signal.SIGINT, handler)
