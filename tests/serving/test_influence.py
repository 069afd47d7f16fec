"""Token ids in a chat's answer, and the aligner's influence on each of them."""

import json
from concurrent.futures import Future

import pytest
from served import TOKENIZER, ask, chat_text, load, post, running

from ram.answers import influence

BODY = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "seed": 3, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(folder):
    with running(folder) as models_and_url:
        yield models_and_url


def test_chat_reports_token_ids_if_asked(server):
    """Whole and streamed they are the same: the ids that were decoded, the closing one included."""
    url = server[1]
    whole = ask(url, BODY | {"return_token_ids": True}).json()
    (choice,) = whole["choices"]
    assert whole["prompt_token_ids"] == TOKENIZER(chat_text("hello")).input_ids
    assert len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    lines = ask(url, BODY | {"return_token_ids": True, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [
        whole["prompt_token_ids"]
    ]
    streamed = [token for chunk in chunks for c in chunk["choices"] for token in c.get("token_ids", [])]
    assert streamed == choice["token_ids"]
    plain = ask(url, BODY)
    assert "token_ids" not in plain.text and plain.json()["choices"][0]["message"] == choice["message"]


@pytest.mark.parametrize("law", [{}, {"sample_mode": "product", "temperature": 0.7}, {"temperature": 0.0}])
def test_influence_is_that_of_the_report(server, law):
    models, url = server
    answer = ask(url, BODY | law | {"return_token_ids": True}).json()
    prompt, tokens = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    found = post(f"{url}/influence", json={"model": "a", "prompt": prompt, "tokens": tokens, **law}).json()
    pair = [load(path) for path in (models.proposal, models.served["a"].path)]
    expected = influence.shown(influence.token_figures(*pair, TOKENIZER, prompt, tokens, models.law(law)))
    text = answer["choices"][0]["message"]["content"]
    assert "".join(found.pop("tokens")).startswith(text) and set(found) == set(expected)
    # The server's forward pass has other kernels than the tests': the last shown digit may differ.
    for key in ("influence", "kl"):
        for ours, theirs in zip(found[key], expected[key], strict=True):
            assert ours == theirs or abs(ours - theirs) <= 0.02 * max(abs(theirs), 1e-3)
    assert [[c[0] for c in step] for step in found["candidates"]] == [
        [c[0] for c in step] for step in expected["candidates"]
    ]


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "proposal"}, 400, "expected a pair"),
        ({"model": "nobody"}, 404, "no model 'nobody'"),
        ({"tokens": []}, 400, "tokens"),
        ({"prompt": [10**6]}, 400, "with ids from 0 to"),
        ({"temperature": -1}, 400, "temperature"),
        ({"prompt": [5] * 9000}, 400, "prompt"),
    ],
)
def test_influence_of_what_no_pair_answered_is_refused(server, changes, status, message):
    body = {"model": "a", "prompt": [5, 6], "tokens": [7]} | changes
    answer = post(f"{server[1]}/influence", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_influence_that_takes_too_long_is_cancelled(folder, monkeypatch):
    with running(folder, "limits.seconds=0.5") as (models, url):
        never = Future()
        monkeypatch.setattr(models.engine, "measure", lambda *_: never)
        answer = post(f"{url}/influence", json={"model": "a", "prompt": [5, 6], "tokens": [7]})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert never.cancelled()


def test_models_are_listed_with_the_defaults_of_a_request(server):
    models, url = server
    from served import get

    for model in get(f"{url}/v1/models").json()["data"]:
        assert model["defaults"] == models.defaults()
        assert model["defaults"]["sample_mode"] == "par" and model["defaults"]["max_tokens"] == models.usual
