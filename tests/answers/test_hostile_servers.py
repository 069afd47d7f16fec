"""Answers of broken and hostile servers: each row is kept or listed, in bounded time and memory."""

import json
import re
import tracemalloc
from types import SimpleNamespace

import completion_server
import hostile_server
import pytest
from hostile_server import ANSWERED, FAILED
from sample_stage import part_file, sample, write_rows

import train
from ram.answers import endpoints
from ram.errors import UserError

COUNT = 128


@pytest.fixture
def hostile():
    with hostile_server.running() as port:
        yield port


def test_128_hostile_servers_end_in_rows(resolve, hostile, monkeypatch):
    """One deadline for headers and body together, one size, no decompression; nothing ends the run."""
    monkeypatch.setattr(endpoints, "MAX_BYTES", 1 << 18)  # is reached soon on a busy machine too
    names = [*ANSWERED, *FAILED]
    cases = [names[i % len(names)] for i in range(COUNT)]
    write_rows([{"instruction": f"case={case}.", "output": "y", "id": i} for i, case in enumerate(cases)])
    settings = {"retries": 0, "timeout": 4.0, "concurrency": COUNT, "send": "text"}
    settings["urls"] = f"[http://127.0.0.1:{hostile}/v1]"
    stage = resolve(
        "sampling.backend=endpoint", *(f"sampling.endpoint.{key}={value}" for key, value in settings.items())
    )
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf"\d+ of {COUNT} rows got no answer, listed in"):
            sample(stage)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    path = stage.output.with_name(f"{stage.output.name}.failed.jsonl")
    failed = {row["row"]: row["reason"] for row in map(json.loads, path.open())}
    answers = {row["index"]: row for row in map(json.loads, part_file(stage).read_text().splitlines()[1:])}
    assert set(failed) | set(answers) == set(range(COUNT)) and not set(failed) & set(answers)
    for row, case in enumerate(cases):
        if case in FAILED:
            assert re.search(FAILED[case], failed[row]), (case, failed[row])
            assert failed[row].isprintable()
        else:
            assert row in answers, failed[row]
            assert answers[row]["text"] == ANSWERED[case][1]
            assert 0 < answers[row]["n_tokens"] <= 12 and answers[row]["finish_reason"] == "stop"


def settings_of(*urls, **changes):
    common = {"model": "m", "key_env": "NONE", "concurrency": 4, "retries": 2, "timeout": 10}
    return SimpleNamespace(urls=[f"{url}/v1" for url in urls], **common | changes)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)
    running = completion_server.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def asked(settings, n=12):
    requests = ((i, {"prompt": f"p{i}", "seed": i, "max_tokens": 9}) for i in range(n))
    with endpoints.Endpoints(settings) as servers:
        return dict(servers.complete(requests, lambda answer: answer["choices"][0]["text"]))


def test_server_without_the_path_is_left_out(server, caplog):
    """One url's 404 does not end the run while another answers; it does if all are such."""
    expected = {i: completion_server.answer_to(f"p{i}", i) for i in range(12)}
    wrong = server.replace("http://", "http://me:secret@") + "/nothing"
    with pytest.MonkeyPatch.context() as patch:
        original = completion_server.Handler.handle_prompt

        def handle(handler, body):
            if handler.path.startswith("/nothing"):
                return handler.reply(404, b"\x1b[31mnot here\x1b[0m\nmore")
            return original(handler, body)

        patch.setattr(completion_server.Handler, "handle_prompt", handle)
        assert asked(settings_of(wrong, server)) == expected
        (line,) = caplog.messages
        assert "/nothing/v1/completions answers 404: " in line and line.isprintable()
        assert "secret" not in line and "not here" in line
        with pytest.raises(UserError, match="/nothing/v1/completions answers 404: .*check the urls") as error:
            asked(settings_of(wrong))
        assert "secret" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("case", ["endless body", "announced terabyte"])
def test_size_ends_an_answer(hostile, case):
    """Long before the deadline."""
    settings = settings_of(f"http://127.0.0.1:{hostile}", retries=0, timeout=600)
    with endpoints.Endpoints(settings) as servers:
        ((_, result),) = servers.complete(iter([(0, {"prompt": f"case={case}."})]), dict)
    assert str(result) == "the answer is longer than 4,194,304 bytes (1 tries)"


def test_impossible_counts_are_not_paid_for():
    """They are counted as missing, and a limit of the price cannot be kept with them."""
    body = {"messages": [{"content": "x" * 100}], "max_tokens": 1}
    tally = endpoints.Tally((1.0, 1.0))
    tally.add({"usage": {"prompt_tokens": 40, "completion_tokens": 1}}, body)
    for usage in ({"prompt_tokens": 10**18, "completion_tokens": 1}, {"prompt_tokens": -40}, None, "many"):
        tally.add({"usage": {"completion_tokens": 1} | usage if isinstance(usage, dict) else usage}, body)
    tally.add({"usage": {"prompt_tokens": 40, "completion_tokens": 2}}, body)
    assert (tally.answered, tally.uncounted) == (6, 5)
    assert (tally.input_tokens, tally.output_tokens) == (40, 1)


def test_stopped_client_leaves_nothing_behind(hostile):
    """Ctrl-C while servers are silent: requests are cancelled, and the thread of the client ends."""
    servers = endpoints.Endpoints(settings_of(f"http://127.0.0.1:{hostile}", timeout=600))
    with pytest.raises(KeyboardInterrupt), servers:
        requests = [(i, {"prompt": f"case={c}."}) for i, c in enumerate(["silence", "no choice", "silence"])]
        for _ in servers.complete(iter(requests), dict):
            raise KeyboardInterrupt
    assert not servers.thread.is_alive() and servers.loop.is_closed()


def test_passwords_of_urls_are_not_published(resolve):
    """Neither by an answer file's identity nor by what the log and the tables say."""
    urls = "sampling.endpoint.urls=[http://me:p@ss@host:1/v1,https://host/v1]"

    job, _ = train.sample_job(resolve("sampling.backend=endpoint", urls))
    assert job.made_from["endpoint"] == ["http://host:1/v1", "https://host/v1"]
    assert endpoints.redacted("x=[http://a:b@c/v1,d@e] f@g") == "x=[http://c/v1,d@e] f@g"
