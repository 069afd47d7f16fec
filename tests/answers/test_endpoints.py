"""Sampling from servers: every row once and in order, whatever fails on the way."""

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
from test_answer_files import TOKENIZER, folders, part_file, resolve, sample, write_rows  # noqa: F401

import train
from ram.answers import endpoints
from ram.errors import UserError

FAST = ("sampling.endpoint.retries=8", "sampling.endpoint.timeout=10")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.02)
    found = completion_server.start()
    yield found
    found.shutdown()


@pytest.fixture
def remote(resolve, server):  # noqa: F811
    """The sample stage, asking a server."""

    def stage(*overrides, port=server.server_port):
        url = f"sampling.endpoint.urls=[http://127.0.0.1:{port}/v1]"
        return resolve("sampling.backend=endpoint", url, *FAST, *overrides)

    return stage


def rows_of(n):
    return [{"instruction": f"row {i} " + "x" * (7 * i % 30), "output": "y", "id": i} for i in range(n)]


def expected(stage):
    """What the server says to every row, by its rule."""
    job, _ = train.sample_job(stage)
    _, ids = job.encoded
    seeds = [int(endpoints.fingerprint([job.seed, row])[:8], 16) >> 1 for row in job.row_ids]
    return [completion_server.answer_to(prompt, seed) for prompt, seed in zip(ids, seeds, strict=True)]


def test_rows_keep_order_and_seeds_differ(remote):
    """Every row has the server's answer to its own prompt and seed, in the order of the file."""
    stage = remote()
    rows = json.loads(sample(stage))
    assert [row["sampling"] for row in rows] == expected(stage)
    assert len({row["sampling"] for row in rows}) == 10  # equal prompts too draw their own
    assert not part_file(stage).exists()


def test_what_is_asked_for(remote, server, monkeypatch):
    """A request carries the law of the model that answers, as token ids or as text, and the stop string."""
    seen = []
    original = completion_server.Handler.handle_prompt
    monkeypatch.setattr(
        completion_server.Handler,
        "handle_prompt",
        lambda self, given: (seen.append(given), original(self, given)),
    )
    sample(remote("sampling.base_temperature=0.7", "sampling.base_top_k=5", "sampling.limit=2"))
    assert all(isinstance(token, int) for given in seen for token in given["prompt"])
    common = {"model": "toy", "max_tokens": 12, "temperature": 0.7, "top_p": 0.95, "top_k": 5}
    assert all(given.items() >= common.items() and given["stop"] == ["\n\nHuman"] for given in seen)
    assert "repetition_penalty" not in seen[0]
    sample(
        remote("sampling.endpoint.send=text", "sampling.endpoint.model=mine", "seed=2", "sampling.limit=2")
    )
    assert [given["model"] for given in seen[2:]] == ["mine"] * 2
    assert all(given["prompt"].endswith("Assistant: ") for given in seen[2:])


def test_requests_run_together_but_not_more_than_asked(remote, server, monkeypatch):
    """The server answers none of the first four requests before it has all four."""
    four, met, answer = threading.Barrier(4, timeout=60), [], completion_server.Handler.handle_prompt

    def wait_for_four(handler, body):
        if not met:
            four.wait()
            met.append(True)
        answer(handler, body)

    monkeypatch.setattr(completion_server.Handler, "handle_prompt", wait_for_four)
    write_rows(rows_of(60))
    sample(remote("sampling.endpoint.concurrency=4"))
    assert completion_server.Handler.most == 4


def test_faults_are_tried_again(remote, server, monkeypatch):
    """Errors, overload, broken answers and hung-up connections end in the answers of a server without
    them.
    """
    write_rows(rows_of(80))
    random.seed(1)
    monkeypatch.setattr(completion_server.Handler, "faults", 0.3)
    stage = remote()
    assert [row["sampling"] for row in json.loads(sample(stage))] == expected(stage)


def test_a_row_that_keeps_failing_is_listed(remote, server, monkeypatch):
    """One refused row costs the others nothing; it is listed, and asked for again by the same command."""
    rows = rows_of(12)
    write_rows(rows)
    stage = remote("sampling.endpoint.send=text")
    refused = completion_server.Handler.handle_prompt

    def refuse(self, given):
        if "row 5 " in given["prompt"]:
            given = given | {"prompt": "never"}
        return refused(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(completion_server.Handler, "handle_prompt", refuse)
        with pytest.raises(UserError, match=r"1 of 12 rows got no answer, listed in .*failed\.jsonl"):
            sample(stage)
    (failed,) = map(json.loads, stage.output.with_name(f"{stage.output.name}.failed.jsonl").open())
    assert failed["row"] == 5 and "this prompt is refused" in failed["reason"]
    assert len(part_file(stage).read_text().splitlines()) == 12  # a header and eleven answers
    assert [row["id"] for row in json.loads(sample(stage))] == list(range(12))
    assert not stage.output.with_name(f"{stage.output.name}.failed.jsonl").exists()


def test_a_key_that_is_not_taken_ends_at_once(remote, monkeypatch):
    """No request is sent twice."""
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    bodies, answer = [], completion_server.Handler.handle_prompt

    def count(handler, body):
        bodies.append(json.dumps(body))
        answer(handler, body)

    monkeypatch.setattr(completion_server.Handler, "handle_prompt", count)
    with pytest.raises(UserError, match="answers 401: .*no such key.*OPENAI_API_KEY"):
        sample(remote())
    assert bodies and len(set(bodies)) == len(bodies)


def test_no_server_is_said_soon(remote):
    """Nobody listens: the run ends with an error instead of failing row after row."""
    write_rows(rows_of(200))
    few = ("sampling.endpoint.retries=1", "sampling.endpoint.concurrency=2", "sampling.endpoint.model=toy")
    with pytest.raises(UserError, match="the last 4 requests all failed .*refused"):
        sample(remote(*few, port=free_port()))


@pytest.mark.parametrize(
    "override, message",
    [
        ("sampling.endpoint.urls=[]", "give the servers"),
        ("sampling.backend=remote", "expected one of local, endpoint"),
        ("sampling.endpoint.concurrency=0", r"expected a number in \[1, inf\)"),
        ("sampling.endpoint.send=tokens", "expected one of ids, text"),
    ],
)
def test_settings_that_cannot_work(remote, override, message):
    with pytest.raises(UserError, match=message):
        remote(override)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_server_killed_twice(remote, tmp_path, monkeypatch):
    """500 rows from a server that fails 5 % of the requests and is killed and restarted twice: each once, in
    order, and asked no more often than faults and kills explain.
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
    asked = [line for line in Path(log).read_text().splitlines()]
    assert 500 <= len(asked) <= 500 + 2 * 16
