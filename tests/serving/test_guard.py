"""Requests that are refused: keys, hosts, origins, sizes, shapes."""

import contextlib
import json
import random
import socket
import threading

import httpx
import pytest
from served import PLAIN, ask, chat_text, expected, get, post, running

from ram.serving import protocol

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, "limits.body_bytes=20000", "max_new_tokens=4") as models_and_url:
        yield models_and_url


@pytest.fixture(scope="module")
def locked(folder):
    """A server with keys."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAM_API_KEY", "open sesame")
            patch.setenv("RAM_ADMIN_KEY", "admin")
            models_and_url = stack.enter_context(running(folder, "limits.aligners=3"))
        yield models_and_url


def bearer(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


# ---- keys, hosts and origins -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["v1/models", "metrics", "openapi.json", "nowhere", "v1/models/a"])
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Basic open sesame", "open sesame", "Bearer \xff"]
)
def test_request_without_the_key_gets_401(locked, path, header):
    """The answer is the same for every path but the page's files and /health."""
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = get(f"{locked[1]}/{path}", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    error = protocol.ErrorBody.model_validate_json(answer.content).error
    assert (error.code, error.param) == ("invalid_api_key", None)


def test_request_with_the_key_is_answered(locked):
    url = locked[1]
    assert ask(url, CHAT).status_code == 401
    assert ask(url, CHAT, **bearer("open sesame")).json()["choices"][0]["message"]["content"]
    for path in ("", "chat.css", "chat.js", "health"):
        assert get(f"{url}/{path}").status_code == 200
    assert post(f"{url}/health").status_code == 401
    document = get(f"{url}/openapi.json", **bearer("open sesame")).json()
    assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
    assert document["paths"]["/admin/aligners"]["post"]["security"] == [{"adminKey": []}]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:99"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "OWN"}, 200),
    ],
)
def test_other_hosts_and_origins_are_refused(server, headers, status):
    """A host name that only resolves to this machine counts as another; no answer has a CORS header."""
    url = server[1]
    headers = {name: url if value == "OWN" else value for name, value in headers.items()}
    for answer in (get(f"{url}/v1/models", headers=headers), ask(url, CHAT, headers=headers)):
        assert answer.status_code == status
        assert not any(name.startswith("access-control") for name in answer.headers)
    headers = {**headers, "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{url}/v1/models", headers=headers, **PLAIN)
    assert preflight.status_code in (403, 405)


def test_content_types_of_forms_are_refused(server):
    """Browsers send forms and plain text to any server without asking it first."""
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = {"Content-Type": media_type}
        answer = post(f"{server[1]}/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
        assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_admin_paths_need_the_admin_key(server, locked):
    body = {"name": "c", "path": "b"}
    assert post(f"{server[1]}/admin/aligners", json=body).status_code == 404
    for key in ("open sesame", "wrong"):
        assert post(f"{locked[1]}/admin/aligners", json=body, **bearer(key)).status_code == 401
        assert httpx.delete(f"{locked[1]}/admin/aligners/a", **PLAIN, **bearer(key)).status_code == 401
    assert get(f"{locked[1]}/v1/models", **bearer("admin")).status_code == 401


# ---- adding and removing aligners --------------------------------------------------------------------------


def test_aligners_are_added_replaced_and_removed_under_load(locked):
    """Another aligner answers meanwhile, and every answer is that of the aligner that was asked."""
    models, url = locked

    def answer(name):
        return ask(url, CHAT | {"model": name}, **bearer("open sesame"))

    def add(name, path):
        return post(f"{url}/admin/aligners", json={"name": name, "path": path}, **bearer("admin"))

    texts = {name: expected(models, name, chat_text("hi"), 1, 8).text for name in ("a", "b")}
    stop, answers = threading.Event(), []

    def keep_asking():
        while not stop.is_set():
            answers.append(answer("a").json()["choices"][0]["message"]["content"])

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        assert answer("new").status_code == 404
        assert add("new", "b").json()["id"] == "new"
        assert answer("new").json()["choices"][0]["message"]["content"] == texts["b"]
        fingerprint = answer("new").json()["system_fingerprint"]
        assert add("new", f"{models.settings.config.aligner_root}/a").status_code == 200
        assert answer("new").json()["choices"][0]["message"]["content"] == texts["a"]
        assert answer("new").json()["system_fingerprint"] != fingerprint
        assert add("newer", "a").json()["error"]["message"].startswith("3 aligners are loaded")
        removed = httpx.delete(f"{url}/admin/aligners/new", **PLAIN, **bearer("admin"))
        assert removed.json() == {"id": "new", "object": "model", "deleted": True}
        assert answer("new").status_code == 404
        assert httpx.delete(f"{url}/admin/aligners/new", **PLAIN, **bearer("admin")).status_code == 404
        assert httpx.delete(f"{url}/admin/aligners/proposal", **PLAIN, **bearer("admin")).status_code == 404
    finally:
        stop.set()
        asking.join()
    assert set(answers) == {texts["a"]}


def test_list_of_models_is_a_snapshot(locked):
    """Iterating over it is safe while an aligner is added or removed."""
    models, url = locked
    before, listing = list(models.served), iter(models.served)
    first = next(listing)
    models.add_aligner("late", "b")
    assert [first, *listing] == before and "late" in models.served
    listing = iter(models.served)
    first = next(listing)
    models.remove_aligner("late")
    assert [first, *listing] == [*before, "late"] and list(models.served) == before


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("c", "damaged", "cannot load a model"),
        ("c", "other", "the tokenizer of the aligner"),
        ("c", "nowhere", "no model at"),
        ("c", ".", "no config.json"),
        ("c", "../..", "does not lie below"),
        ("c", "/etc", "does not lie below"),
        ("c", "leading_out", "does not lie below"),
        ("c", "a\0b", "does not lie below"),
        ("c", "x" * 4000, "File name too long"),
        ("proposal", "a", "expected a name"),
        ("../c", "a", "expected a name"),
        ("", "a", "expected a name"),
    ],
)
def test_aligner_that_cannot_be_loaded_changes_nothing(locked, folder, tmp_path, name, path, message):
    """The answer names the reason."""
    link = folder / "leading_out"
    if not link.is_symlink():
        link.symlink_to(tmp_path)
    before = sorted(locked[0].served), sorted(locked[0].engine.aligners)
    answer = post(f"{locked[1]}/admin/aligners", json={"name": name, "path": path}, **bearer("admin"))
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert (sorted(locked[0].served), sorted(locked[0].engine.aligners)) == before
    assert ask(locked[1], CHAT, **bearer("open sesame")).status_code == 200


# ---- sizes and shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20_001, 100_000, 1_000_000])
def test_oversized_body_is_refused(server, size):
    body = b'{"model": "a", "x": "' + b"x" * (size - 23) + b'"}'
    for content in (body, iter([body[: size // 2], body[size // 2 :]])):
        try:
            answer = post(f"{server[1]}/v1/completions", content=content)
        except (httpx.WriteError, httpx.RemoteProtocolError):  # far too large: cut off during the upload
            assert size > 160_000
            continue
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert ask(server[1], CHAT).status_code == 200


def test_body_that_does_not_arrive_gets_408(folder):
    with running(folder, "limits.body_seconds=1") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n"
            connection.sendall(f"{head}{{".encode())
            assert b"408" in connection.recv(1000).split(b"\r\n")[0]


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe",
    b'{"model": "\xff"}',
    b'{"model": "\\ud800"}',
    b'{"model": NaN}',
    b'{"model": "a", "temperature": Infinity}',
    b'{"model": "a", "temperature": 1e999, "prompt": "x"}',
    b'{"model": "a", "seed": 1' + b"0" * 6000 + b', "prompt": "x"}',
    b"[" * 9000,
    b'{"a":' * 3000,
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_malformed_body_gets_400(server, path):
    for body in MALFORMED:
        headers = {"Content-Type": "application/json"}
        answer = post(f"{server[1]}/v1/{path}", content=body, headers=headers)
        assert answer.status_code == 400, body[:60]
        assert len(answer.content) < 2000
        protocol.ErrorBody.model_validate_json(answer.content)


def fuzzed(rng):
    """A random request, often malformed: (method, path, headers, body)."""
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        1e308,
        -1e-320,
        2**31,
        2**63,
        2**64,
        10**400,
        "",
        "x",
        "\0",
        "\U0001f600" * 9,
    ]
    odd += [[], {}, [[]], [None], ["x", 1], {"x": {}}, [[1], ["a"]], "a" * 3000, [0] * 500, "\u202e\u2028"]
    chat = rng.random() < 0.5
    body = {"model": rng.choice([*["a", "b", "proposal"] * 5, "nobody"]), "max_tokens": rng.choice([1, 2, 3])}
    if chat:
        roles = [*["user", "assistant"] * 5, "system"]
        turns = [{"role": rng.choice(roles), "content": "x"} for _ in range(rng.randrange(3))]
        body["messages"] = [
            *turns,
            {"role": "user", "content": rng.choice(["hi", [{"type": "text", "text": "y"}]])},
        ]
    else:
        body["prompt"] = rng.choice(["hi", ["a", "b"], [1, 2], [[1], [2, 3]]])
    model = protocol.ChatRequest if chat else protocol.CompletionRequest
    keys = [*model.model_fields, "unknown", "__proto__", "\0"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        key = rng.choice(keys)
        if key == "messages" and rng.random() < 0.7:
            body[key] = [{rng.choice(["role", "content", "x"]): rng.choice(odd)} for _ in range(2)]
        else:
            body[key] = rng.choice(odd)
    if rng.random() < 0.05:
        del body["model"]
    data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode()
    if rng.random() < 0.1:  # damaged bytes
        at = rng.randrange(len(data))
        data = (
            data[:at]
            + bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
            + data[at + rng.randrange(3) :]
        )
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.05:
        headers = rng.choice(
            [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/json; charset=x"}]
        )
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if rng.random() < 0.05:
        path = rng.choice(
            ["/v1/models/%00", "/v1/models/..%2f..", "/chat.js/", "/%ff", "/admin/aligners", "//", "/v1"]
        )
    return rng.choice(["POST"] * 50 + ["GET", "PUT", "DELETE"]), path, headers, data


def test_generated_requests_never_cause_a_500(server):
    """No answer holds a stack trace, and the server still works afterwards."""
    rng, codes = random.Random(0), {}
    with httpx.Client(base_url=server[1], **PLAIN) as client:
        for number in range(1000):
            method, path, headers, data = fuzzed(rng)
            answer = client.request(method, path, headers=headers, content=data)
            codes[answer.status_code] = codes.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404, 405, 413), (number, answer.text, data[:500])
            assert "Traceback" not in answer.text and ".py" not in answer.text, (number, data[:500])
            if answer.status_code != 200:
                protocol.ErrorBody.model_validate_json(answer.content)
    assert codes[200] > 150 and codes[400] > 300, codes
    assert (
        ask(server[1], CHAT).json()["choices"][0]["message"]["content"]
        == expected(server[0], "a", chat_text("hi"), 1, 8).text
    )


def test_unexpected_exception_gets_500_without_details(server, monkeypatch):
    """The answer has OpenAI's shape; /health and the next request work."""
    models, url = server
    monkeypatch.setattr(models, "law", lambda values: 1 / 0)
    answer = ask(url, CHAT)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal"
    assert "division" not in answer.text
    monkeypatch.undo()
    assert ask(url, CHAT).status_code == 200 and get(f"{url}/health").json() == {"status": "ok"}
