"""The server through OpenAI's own client: every answer equals that of `generate`."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from served import TOKENIZER, ask, chat_text, expected, running, save_models

from ram.serving import protocol

openai = pytest.importorskip("openai")
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with running(folder) as models_and_url:
        yield models_and_url


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def test_proposal_and_every_aligner_are_models(client):
    assert [model.id for model in client.models.list()] == ["proposal", "a", "b"]
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("c")


@pytest.mark.parametrize("name", ["proposal", "a", "b"])
def test_chat_uses_the_text_of_training(server, client, name):
    """A dialogue of several turns is rendered as in training; token counts are exact."""
    turns = ["hi", "what?", "tell me"]
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns, strict=False)
    ]
    answer = client.chat.completions.create(model=name, messages=messages, seed=3, max_tokens=20)
    text = chat_text(*turns)
    whole = expected(server[0], name, text, 3, 20)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (whole.text, whole.finish_reason)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(text), len(whole.token_ids))
    assert answer.seed == 3 and answer.system_fingerprint.startswith("fp_")
    assert choice.stats["mean_kl"] == pytest.approx(whole.stats["mean_kl"], rel=1e-3)
    protocol.ChatAnswer.model_validate_json(ask(server[1], {"model": name, "messages": messages}).content)


def test_system_message_and_content_in_parts(server, client):
    """The system message goes to its place in the template."""
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="a", messages=messages, seed=1, max_tokens=9)
    text = f"Be kind.{chat_text('hello you')}"
    assert answer.choices[0].message.content == expected(server[0], "a", text, 1, 9).text


def test_answer_can_be_sent_back_unchanged(server, client):
    """Clients put the answer's message into the next request, as an object or as its whole dump."""
    request = {"model": "a", "seed": 2, "max_tokens": 8}
    message = client.chat.completions.create(messages=HELLO, **request).choices[0].message
    text = chat_text(HELLO[0]["content"], message.content, "more")
    for previous in (message, message.model_dump()):
        turns = [*HELLO, previous, {"role": "user", "content": "more"}]
        answer = client.chat.completions.create(messages=turns, **request)
        assert answer.choices[0].message.content == expected(server[0], "a", text, 2, 8).text


def test_choice_equals_the_row_of_its_index(server, client):
    """Choice i has the random numbers of row i, whatever else is decoded at the same time."""
    answer = client.chat.completions.create(model="a", messages=HELLO, n=3, seed=5, max_tokens=12)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [expected(server[0], "a", chat_text("hello"), 5, 12, row).text for row in range(3)]
    assert len(set(texts)) == 3 and answer.usage.prompt_tokens == len(chat_text("hello"))


@pytest.mark.parametrize("extra", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}])
def test_stream_equals_the_whole_answer(server, client, extra):
    """With the same seed its pieces add up to the text, the log-probabilities and the usage."""
    request = {"model": "a", "messages": HELLO, "seed": 8, "max_tokens": 24, **extra}
    whole = client.chat.completions.create(**request)
    n = extra.get("n", 1)
    texts, reasons, logprobs, last = [""] * n, [None] * n, [[] for _ in range(n)], None
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        last = chunk
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert last.usage == whole.usage and not last.choices
    if "logprobs" in extra:
        known = whole.choices[0].logprobs.content
        for streamed, token in zip(logprobs[0], known, strict=True):
            assert (streamed.token, streamed.bytes) == (token.token, token.bytes)
            assert streamed.logprob == pytest.approx(token.logprob, abs=1e-4)
        assert len(logprobs[0]) == whole.usage.completion_tokens
        for token in logprobs[0]:
            assert len(token.top_logprobs) <= 2 and token.logprob <= 0
            assert all(
                b.logprob <= a.logprob
                for a, b in zip(token.top_logprobs, token.top_logprobs[1:], strict=False)
            )


def test_simultaneous_requests_get_their_own_answers(server, client):
    """Each of twelve requests to three models gets the answer that it gets alone."""

    def one(i):
        name = ["proposal", "a", "b"][i % 3]
        answer = client.chat.completions.create(model=name, messages=HELLO, seed=i, max_tokens=16)
        return name, answer.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        for i, (name, text) in enumerate(pool.map(one, range(12))):
            assert text == expected(server[0], name, chat_text("hello"), i, 16).text


def test_request_without_a_seed_gets_a_new_one(client):
    """The answer names the seed, and the seed reproduces the answer."""
    request = {"model": "b", "messages": HELLO, "max_tokens": 10}
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    assert first.seed != second.seed
    again = client.chat.completions.create(**request, seed=second.seed)
    assert again.choices[0].message == second.choices[0].message


def test_stop_string_ends_the_answer_and_is_not_shown(server, client):
    """This holds for whole answers and for streams, with one stop string or several."""
    text, seed = "Q: go A:", 4
    free = expected(server[0], "a", text, seed, 30, stop=())
    assert len(free.text) > 12
    stop = free.text[6:8]
    whole = client.completions.create(model="a", prompt=text, seed=seed, max_tokens=30, stop=["never", stop])
    assert whole.choices[0].text == free.text[: free.text.find(stop)] != free.text
    assert whole.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model="a", prompt=text, seed=seed, max_tokens=30, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_completion_accepts_texts_and_token_ids(server, client):
    """One or several; the answer to a prompt does not depend on its position."""
    ids = TOKENIZER("abc").input_ids
    request = {"model": "proposal", "seed": 2, "max_tokens": 8}
    one = client.completions.create(prompt="abc", **request)
    assert one.choices[0].text == expected(server[0], None, "abc", 2, 8).text
    assert (one.usage.prompt_tokens, one.usage.total_tokens) == (3, 3 + one.usage.completion_tokens)
    assert client.completions.create(prompt=ids, **request).choices[0].text == one.choices[0].text
    two = client.completions.create(prompt=["xy", "abc"], n=2, **request)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[2].text == one.choices[0].text != two.choices[3].text
    assert two.usage.prompt_tokens == 5
    rows = client.completions.create(prompt=[TOKENIZER("xy").input_ids, ids], n=2, **request)
    assert [choice.text for choice in rows.choices] == [choice.text for choice in two.choices]


def test_completion_logprobs_have_one_entry_per_token(server, client):
    """The offsets are the places in the answer at which the tokens' texts begin."""
    answer = client.completions.create(model="a", prompt="Q:", seed=6, max_tokens=20, logprobs=3)
    logprobs, whole = answer.choices[0].logprobs, expected(server[0], "a", "Q:", 6, 20)
    assert "".join(logprobs.tokens) == answer.choices[0].text and len(logprobs.tokens) == len(whole.token_ids)
    for entries in (logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset):
        assert len(entries) == len(logprobs.tokens)
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)
    for token, start in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if "\ufffd" not in token and token != TOKENIZER.eos_token:
            assert answer.choices[0].text[start : start + len(token)] == token


def test_sampling_settings_of_a_request_are_used(server, client):
    """`temperature` and `top_p` set the aligner's distribution, or the proposal's if it answers alone.

    PAR's own settings are accepted by their names.
    """
    request = {"prompt": "abc", "seed": 7, "max_tokens": 12}
    models = server[0]
    hot = client.completions.create(model="a", temperature=1.7, top_p=0.8, **request)
    assert hot.choices[0].text == expected(models, "a", "abc", 7, 12, temperature=1.7, top_p=0.8).text
    alone = client.completions.create(model="proposal", temperature=0.3, **request)
    assert alone.choices[0].text == expected(models, None, "abc", 7, 12, base_temperature=0.3).text
    par_settings = {"sample_mode": "par_kl", "div_threshold": 0.7, "base_top_k": 4}
    own = client.completions.create(model="a", extra_body=par_settings, **request)
    assert own.choices[0].text == expected(models, "a", "abc", 7, 12, **par_settings).text
    greedy = {"temperature": 0.00001, "extra_body": {"base_temperature": 0}}
    texts = {
        client.completions.create(model="a", prompt="abc", max_tokens=9, **greedy).choices[0].text
        for _ in range(3)
    }
    assert len(texts) == 1


def test_long_dialogue_is_cut_as_in_training(server, client):
    """The oldest turns are dropped, so that the answer fits."""
    turns = ["x" * 90, "y" * 60, "z" * 30, "w" * 20, "end"]
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    answer = client.chat.completions.create(model="a", messages=messages, seed=1, max_tokens=100)
    kept = chat_text(*turns[2:])
    assert len(kept) <= 156 < len(chat_text(*turns))
    assert answer.usage.prompt_tokens == len(kept)
    assert answer.choices[0].message.content == expected(server[0], "a", kept, 1, 100).text


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("chat", {"model": "c", "messages": HELLO}, 404, "model", "there are: a, b, proposal"),
        ("chat", {"model": "a", "messages": []}, 400, "messages", "at least 1"),
        ("chat", {"model": "a"}, 400, "messages", "missing"),
        (
            "chat",
            {"model": "a", "messages": [{"role": "assistant", "content": "x"}]},
            400,
            "messages",
            "of the user",
        ),
        ("chat", {"model": "a", "messages": [{"role": "boss", "content": "x"}]}, 400, "messages", "role"),
        ("chat", {"model": "a", "messages": [HELLO[0] | {"nmae": "x"}]}, 400, "messages", "key 'nmae'"),
        ("chat", {"model": "a", "messages": [HELLO[0] | {"tool_calls": [{}]}]}, 400, "messages", "tool"),
        (
            "chat",
            {"model": "a", "messages": [*HELLO, {"role": "system", "content": ""}]},
            400,
            "messages",
            "before",
        ),
        (
            "chat",
            {"model": "a", "messages": HELLO, "temprature": 1},
            400,
            "temprature",
            "did you mean 'temperature'",
        ),
        (
            "chat",
            {"model": "a", "messages": HELLO, "temperature": -1},
            400,
            "temperature",
            "greater than or equal to 0",
        ),
        ("chat", {"model": "a", "messages": HELLO, "temperature": "1"}, 400, "temperature", "number"),
        (
            "chat",
            {"model": "a", "messages": HELLO, "max_tokens": 0},
            400,
            "max_tokens",
            "greater than or equal to 1",
        ),
        ("chat", {"model": "a", "messages": HELLO, "max_tokens": 256}, 400, "messages", "less than 256"),
        (
            "chat",
            {"model": "a", "messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6},
            400,
            "max_completion_tokens",
            "give one",
        ),
        ("chat", {"model": "a", "messages": HELLO, "n": 65}, 400, "n", "at most 64"),
        ("chat", {"model": "a", "messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs", "logprobs=true"),
        ("chat", {"model": "a", "messages": HELLO, "tools": [{}]}, 400, "tools", "no tools"),
        (
            "chat",
            {"model": "a", "messages": HELLO, "presence_penalty": 0.5},
            400,
            "presence_penalty",
            "expected 0",
        ),
        ("chat", {"model": "a", "messages": HELLO, "sample_mode": "snis"}, 400, "n_candidates", "count"),
        (
            "chat",
            {"model": "a", "messages": HELLO, "stream_options": {}},
            400,
            "stream_options",
            "stream=true",
        ),
        (
            "chat",
            {"model": "a", "messages": [{"role": "user", "content": "x" * 5000}]},
            400,
            "messages",
            "does not fit",
        ),
        ("text", {"model": "a", "prompt": "x" * 300}, 400, "prompt", "300 tokens"),
        ("text", {"model": "a", "prompt": "x" * 200, "max_tokens": 57}, 400, "prompt", "256"),
        ("text", {"model": "a", "prompt": ""}, 400, "prompt", "must have tokens"),
        ("text", {"model": "a", "prompt": []}, 400, "prompt", "at least 1"),
        ("text", {"model": "a", "prompt": [999]}, 400, "prompt", "from 0 to 258"),
        ("text", {"model": "a", "prompt": ["x"] * 65}, 400, "prompt", "at most 64"),
        ("text", {"model": "a", "prompt": "x", "max_tokens": 0}, 400, "max_tokens", "echo=true"),
        ("text", {"model": "a", "prompt": "x", "stop": [""]}, 400, "stop", "at least 1"),
    ],
)
def test_wrong_request_is_refused_with_the_key_at_fault(server, path, body, status, param, message):
    """Every error has OpenAI's shape."""
    answer = ask(server[1], body, {"chat": "chat/completions", "text": "completions"}[path])
    assert answer.status_code == status, answer.text
    error = protocol.ErrorBody.model_validate_json(answer.content).error
    assert error.param == param and message in error.message


def test_client_raises_its_own_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="a", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="there are"):
        client.chat.completions.create(model="x", messages=HELLO, stream=True)
