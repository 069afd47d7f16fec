"""Answers from servers: every row once and in order, in spite of failing requests and servers."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import completion_server
import pytest
from sample_stage import part_file, sample, write_rows

import train
from ram.answers import endpoints
from ram.errors import UserError

FAST = ("sampling.endpoint.retries=8", "sampling.endpoint.timeout=10")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.02)
    running = completion_server.start()
    yield running
    running.shutdown()


@pytest.fixture
def remote(resolve, server):
    """A function that returns the sample stage for some overrides, with a server as its backend."""

    def stage(*overrides, port=server.server_port):
        url = f"sampling.endpoint.urls=[http://127.0.0.1:{port}/v1]"
        return resolve("sampling.backend=endpoint", url, *FAST, *overrides)

    return stage


def rows_of(n):
    return [{"instruction": f"row {i} " + "x" * (7 * i % 30), "output": "y", "id": i} for i in range(n)]


def expected(stage):
    """The answers that the server gives to all rows of the stage."""
    job, _ = train.sample_job(stage)
    _, ids = job.encoded
    seeds = [int(endpoints.fingerprint([job.seed, row])[:8], 16) >> 1 for row in job.row_ids]
    return [completion_server.answer_to(prompt, seed) for prompt, seed in zip(ids, seeds, strict=True)]


def test_rows_keep_order_and_seeds_differ(remote):
    """Every row gets the server's answer to its own prompt and seed, in file order."""
    stage = remote()
    rows = json.loads(sample(stage))
    assert [row["sampling"] for row in rows] == expected(stage)
    assert len({row["sampling"] for row in rows}) == 10  # equal prompts have different seeds
    assert not part_file(stage).exists()


def test_request_contents(remote, server, monkeypatch):
    """A request has the prompt as token ids or text, and the sampling settings of the answering model."""
    bodies = []
    original = completion_server.Handler.handle_prompt

    def record(self, body):
        bodies.append(body)
        original(self, body)

    monkeypatch.setattr(completion_server.Handler, "handle_prompt", record)
    sample(remote("sampling.base_temperature=0.7", "sampling.base_top_k=5", "sampling.limit=2"))
    assert all(isinstance(token, int) for body in bodies for token in body["prompt"])
    common = {"model": "toy", "max_tokens": 12, "temperature": 0.7, "top_p": 0.95, "top_k": 5}
    assert all(body.items() >= common.items() and body["stop"] == ["\n\nHuman"] for body in bodies)
    assert "repetition_penalty" not in bodies[0]
    sample(
        remote("sampling.endpoint.send=text", "sampling.endpoint.model=mine", "seed=2", "sampling.limit=2")
    )
    assert [body["model"] for body in bodies[2:]] == ["mine"] * 2
    assert all(body["prompt"].endswith("Assistant: ") for body in bodies[2:])


def test_concurrency_is_used_and_not_exceeded(remote, server, monkeypatch):
    """The server answers none of the first four requests before it has all four."""
    barrier = threading.Barrier(4, timeout=60)
    met = threading.Event()
    original = completion_server.Handler.handle_prompt

    def wait_for_four(self, body):
        if not met.is_set():
            barrier.wait()
            met.set()
        original(self, body)

    monkeypatch.setattr(completion_server.Handler, "handle_prompt", wait_for_four)
    write_rows(rows_of(60))
    sample(remote("sampling.endpoint.concurrency=4"))
    assert completion_server.Handler.most == 4


def test_transient_failures_are_retried(remote, server, monkeypatch):
    """Errors, overload, malformed answers and closed connections do not change the file."""
    write_rows(rows_of(80))
    random.seed(1)
    monkeypatch.setattr(completion_server.Handler, "faults", 0.3)
    stage = remote()
    assert [row["sampling"] for row in json.loads(sample(stage))] == expected(stage)


def test_row_that_keeps_failing_is_listed(remote, server, monkeypatch):
    """A refused row is listed; the others are kept, and the same command retries only that row."""
    rows = rows_of(12)
    write_rows(rows)
    stage = remote("sampling.endpoint.send=text")
    original = completion_server.Handler.handle_prompt

    def refuse(self, body):
        if "row 5 " in body["prompt"]:
            body = body | {"prompt": "never"}
        return original(self, body)

    with monkeypatch.context() as patch:
        patch.setattr(completion_server.Handler, "handle_prompt", refuse)
        with pytest.raises(UserError, match=r"1 of 12 rows got no answer, listed in .*failed\.jsonl"):
            sample(stage)
    (failure,) = map(json.loads, stage.output.with_name(f"{stage.output.name}.failed.jsonl").open())
    assert failure["row"] == 5 and "this prompt is refused" in failure["reason"]
    assert len(part_file(stage).read_text().splitlines()) == 12  # a header and eleven answers
    assert [row["id"] for row in json.loads(sample(stage))] == list(range(12))
    assert not stage.output.with_name(f"{stage.output.name}.failed.jsonl").exists()


def test_rejected_key_ends_the_run_at_once(remote, monkeypatch):
    """No request is sent twice."""
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    bodies = []
    original = completion_server.Handler.handle_prompt

    def record(self, body):
        bodies.append(json.dumps(body))
        original(self, body)

    monkeypatch.setattr(completion_server.Handler, "handle_prompt", record)
    with pytest.raises(UserError, match="answers 401: .*no such key.*OPENAI_API_KEY"):
        sample(remote())
    assert bodies and len(set(bodies)) == len(bodies)


def test_unreachable_server_ends_the_run_early(remote):
    """If no server listens, the run ends with an error instead of failing once per row."""
    write_rows(rows_of(200))
    overrides = (
        "sampling.endpoint.retries=1",
        "sampling.endpoint.concurrency=2",
        "sampling.endpoint.model=toy",
    )
    with pytest.raises(UserError, match="the last 4 requests all failed .*Refused"):
        sample(remote(*overrides, port=free_port()))


@pytest.mark.parametrize(
    "override, message",
    [
        ("sampling.endpoint.urls=[]", "give the servers"),
        ("sampling.backend=remote", "expected one of local, endpoint"),
        ("sampling.endpoint.concurrency=0", r"expected a number in \[1, inf\)"),
        ("sampling.endpoint.send=tokens", "expected one of ids, text"),
    ],
)
def test_invalid_settings_are_refused(remote, override, message):
    with pytest.raises(UserError, match=message):
        remote(override)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_rows_survive_two_server_kills(remote, tmp_path, monkeypatch):
    """A server fails 5 % of the requests and is killed twice: every row is answered once and in order.

    The number of answered requests is no larger than the failures and kills explain.
    """
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.1)
    write_rows(rows_of(500))
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, completion_server.__file__, str(port), str(log), "0.05"]
    running = [subprocess.Popen(command)]

    def kill_twice():
        for answered in (100, 300):
            while not log.exists() or len(log.read_text().splitlines()) < answered:
                time.sleep(0.01)
            running[-1].send_signal(signal.SIGKILL)
            running[-1].wait()
            time.sleep(0.3)
            running.append(subprocess.Popen(command))

    killer = threading.Thread(target=kill_twice, daemon=True)
    killer.start()
    stage = remote("sampling.endpoint.model=toy", port=port)
    try:
        rows = json.loads(sample(stage))
    finally:
        killer.join(60)
        for server in running:
            server.kill()
    assert len(running) == 3
    assert [row["id"] for row in rows] == list(range(500))
    assert [row["sampling"] for row in rows] == expected(stage)
    n_answered = len(Path(log).read_text().splitlines())
    assert 500 <= n_answered <= 500 + 2 * 16
