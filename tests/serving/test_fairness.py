"""Many requests of one client: others wait a bounded number of rounds, and no door lets too much in."""

import logging
from types import SimpleNamespace

import pytest
from engines import MODELS, PROPOSAL, Listener, ask
from pairs import LETTERS
from served import ask as ask_server
from served import get, post, running, save_models

from ram.data import tokenization
from ram.decoding.cache import Limits, open_model
from ram.decoding.drafting import Fixed
from ram.decoding.engine import Engine
from ram.decoding.requests import BadRequest, Finished, TooLong
from ram.decoding.scheduler import Queue
from ram.serving import bounds, http
from ram.serving.fastchat import worker
from ram.serving.loop import Busy

ROWS, NEW = 8, 12


def make_engine(positions=400):
    limits = Limits(len(LETTERS), ROWS, positions, 100)
    aligners = {"a": open_model(MODELS["a"], limits)}
    return Engine(open_model(PROPOSAL, limits), LETTERS, Fixed(1), aligners=aligners, max_read=16)


def rounds_until_done(engine, request):
    """The rounds until a new request has ended, and the most rows and positions that others held."""
    ticket = engine.ticket(request)
    engine.add(ticket)
    most = 0
    for count in range(1, 400):
        events = engine.step()
        own = [other for other in engine.running if other.request.client == "flood"]
        most = max(most, len(own))
        assert sum(other.end for other in own) <= engine.verifier.pool.limits.positions // 2
        if any(isinstance(event, Finished) and event.ticket is ticket for event in events):
            return count, most
    raise AssertionError("the request never ended")


@pytest.mark.parametrize("length", [3, 24], ids=["short prompts", "long prompts"])
def test_small_request_waits_a_bounded_number_of_rounds(length):
    """However much another client asked for before; alone, a request takes as many rounds as tokens."""
    engine = make_engine()
    for seed in range(60):
        text = "abcdefgh" * 3
        engine.add(engine.ticket(ask(text[:length], new=60, client="flood", seed=seed)))
    for _ in range(3):
        engine.step()
    count, most = rounds_until_done(engine, ask("abc", new=NEW, client="probe"))
    assert count <= NEW + 2 and 1 <= most <= ROWS // 2


def test_clients_take_turns():
    """Each one's oldest request is next, whoever asked first and however often."""
    engine = make_engine(positions=10_000)
    for client, count in (("x", 5), ("y", 2), ("z", 1)):
        for seed in range(count):
            engine.add(engine.ticket(ask("ab", new=4, client=client, seed=seed)))
    order = []
    while (ticket := engine.waiting.first()) is not None:
        engine.waiting.remove(ticket)
        order.append((ticket.request.client, ticket.request.seed))
    assert order == [("x", 0), ("y", 0), ("z", 0), ("x", 1), ("y", 1), ("x", 2), ("x", 3), ("x", 4)]
    queue = Queue()
    one = SimpleNamespace(request=SimpleNamespace(client="x"))
    queue.append(one)
    queue.remove(one)
    assert not queue and queue.first() is None


def test_one_client_holds_at_most_half_of_the_queue(start):
    """The other half is there for others; callers without a name are of this program and have all."""
    served = start(max_rows=4, max_waiting=8)
    for seed in range(6):
        served.submit(ask(new=60, client="flood", seed=seed), Listener())
    with pytest.raises(Busy, match="6 requests of this client"):
        served.submit(ask(client="flood"), Listener())
    heard = Listener()
    served.submit(ask(new=4, client="probe"), heard)
    assert heard.done().finish_reason in ("length", "stop")


# ---- doors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with running(folder, "trusted_proxies=[127.0.0.1]", "limits.messages=50") as models_and_url:
        yield models_and_url


def huge(kind):
    user = {"role": "user", "content": "hi"}
    return {
        "dialogue of one word": ("chat/completions", {"messages": [user | {"content": "a" * 900_000}]}),
        "completion of one word": ("completions", {"prompt": "a" * 900_000}),
        "messages": ("chat/completions", {"messages": [user] * 20_000}),
        "messages of a wrong type": ("chat/completions", {"messages": [1] * 200_000}),
        "messages, unknown model": ("chat/completions", {"messages": [user] * 20_000, "model": "x"}),
        "parts": ("chat/completions", {"messages": [user | {"content": [{}] * 9000}]}),
        "prompts": ("completions", {"prompt": ["x"] * 20_000}),
        "ids": ("completions", {"prompt": [1] * 20_000}),
        "lists of ids": ("completions", {"prompt": [[1] * 20_000]}),
        "wrong ids": ("completions", {"prompt": [1.5] * 100_000}),
        "stops": ("completions", {"prompt": "x", "stop": ["y"] * 20_000}),
        "keys": ("completions", {"prompt": "x", **{f"k{i}": 0 for i in range(20_000)}}),
    }[kind]


KINDS = ["dialogue of one word", "completion of one word", "messages", "messages of a wrong type"]
KINDS += ["messages, unknown model", "parts", "prompts", "ids", "lists of ids", "wrong ids", "stops", "keys"]


@pytest.mark.parametrize("kind", KINDS)
def test_huge_request_is_refused_before_it_is_looked_at(server, kind, monkeypatch):
    """Nothing is tokenised, and no list is validated item by item."""

    def never(*_):
        raise AssertionError("tokenised")

    monkeypatch.setattr("ram.serving.registry.encode", never)
    path, body = huge(kind)
    answer = ask_server(server[1], {"model": "a"} | body, path)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and len(message) < 200
    assert "expected at most" in message or "shorten it" in message or "does not fit" in message


def test_long_dialogue_is_cut_by_characters_first(server, monkeypatch):
    """Of a megabyte of old turns, only what could fit is tokenised."""
    texts = []
    real = tokenization.encode
    monkeypatch.setattr(
        "ram.serving.registry.encode", lambda tokenizer, batch: texts.extend(batch) or real(tokenizer, batch)
    )
    turns = [{"role": role, "content": "x" * 20_000} for role in ["user", "assistant"] * 20]
    turns.append({"role": "user", "content": "hi"})
    answer = ask_server(server[1], {"model": "a", "messages": turns, "max_tokens": 3})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 24
    assert max(map(len, texts)) <= 256 * bounds.TOKEN_CHARACTERS


def test_workers_door_has_the_bounds_of_the_others(server):
    """One request with a million candidates stopped the engine."""
    models = server[0]
    served = models.find("a")
    base = {"prompt": "hi", "max_new_tokens": 4}
    for extra in (
        {"sample_mode": "snis", "n_candidates": 1_000_000},
        {"top_k": 1.5},
        {"temperature": 1000},
        {"stop": ["x"] * 17},
        {"stop": ["x" * 300]},
        {"stop_token_ids": [1 << 40]},
        {"seed": 1 << 70},
        {"sample_mode": []},
    ):
        with pytest.raises(BadRequest):
            worker.to_request(models, base | extra, served, "c")
    with pytest.raises(TooLong):
        worker.to_request(models, base | {"prompt": "x" * 5000}, served, "c")
    (request,), _ = worker.to_request(models, base, served, "c")
    assert request.client == "c"


def test_client_is_its_address_or_the_one_that_a_trusted_proxy_forwards(server, monkeypatch):
    models, url = server
    clients = []
    real = models.requests
    monkeypatch.setattr(models, "requests", lambda *a, **k: clients.append(k["client"]) or real(*a, **k))
    sent = (None, "10.0.0.1", "evil, 10.0.0.2", "10.0.0.3, 127.0.0.1", "2001:db8::7", "x" * 100)
    for forwarded in (*sent, "::ffff:10.0.0.4", "10.0.0.5, ::FFFF:127.0.0.1"):
        headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
        body = {"model": "a", "prompt": "x", "max_tokens": 1}
        assert ask_server(url, body, "completions", headers=headers).status_code == 200
    expected = ["127.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::/64", "x" * 64]
    expected += ["10.0.0.4", "10.0.0.5"]  # as a socket of both versions gives them
    assert clients == expected


def test_address_that_anyone_forwards_is_not_believed(folder, monkeypatch):
    with running(folder) as (models, url):
        clients = []
        real = models.requests
        monkeypatch.setattr(models, "requests", lambda *a, **k: clients.append(k["client"]) or real(*a, **k))
        ask_server(
            url,
            {"model": "a", "prompt": "x", "max_tokens": 1},
            "completions",
            headers={"X-Forwarded-For": "10.0.0.1"},
        )
    assert clients == ["127.0.0.1"]


def test_broken_requests_do_not_fill_the_log(server, caplog):
    """The web server logs each of them, whoever sends it."""
    import socket

    host, port = server[1].removeprefix("http://").split(":")
    with caplog.at_level(logging.WARNING):
        for _ in range(40):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(b"\0\1\2\r\n\r\n")
                connection.recv(100)
    lines = [record for record in caplog.records if "Invalid HTTP" in record.getMessage()]
    assert 0 < len(lines) <= http.Seldom.most and "left out" in lines[-1].getMessage()
    assert get(f"{server[1]}/health").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["controller"], ["--host", "127.0.0.1"]),
        (["openai_api_server", "--port", "1"], ["--host", "127.0.0.1", "--allowed-origins", "[]"]),
        (["gradio_web_server", "--host=0.0.0.0"], []),
    ],
)
def test_fastchats_servers_are_closed_unless_the_user_opens_them(arguments, expected):
    assert worker.closed(arguments) == [*arguments, *expected]


def test_tokens_of_a_text_are_bounded_too(server):
    assert post(f"{server[1]}/detokenize", json={"tokens": [1] * 5000}).status_code == 400
    assert post(f"{server[1]}/tokenize", json={"prompt": "a" * 900_000}).status_code == 400
