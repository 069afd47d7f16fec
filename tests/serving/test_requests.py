"""What a request means: nothing of it is lost without a word, and no key that says nothing is refused."""

import re
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from fastapi import FastAPI
from served import TOKENIZER, ask, chat_text, expected, get, head, load, post, running, save_models
from starlette.testclient import TestClient
from tiny import EOS, gapped_tokenizer, save_model_folder, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ram.data import prompts
from ram.data.text import text_of
from ram.decoding import par, reference
from ram.serving.protocol import ApiError
from ram.serving.registry import Models
from ram.serving.tokens import add_tokens
from ram.settings import serving

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    with running(folder) as models_and_url:
        yield models_and_url


def said(*turns, system=None):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


# ---- dialogues ---------------------------------------------------------------------------------------------


def test_system_message_stays_if_a_dialogue_is_cut(server):
    """The oldest turns go instead."""
    models, url = server
    messages = said("x" * 90, "y" * 40, "z" * 30, "w" * 20, "end", system="Be kind.")
    answer = ask(url, {"model": "a", "messages": messages, "seed": 1, "max_tokens": 100}).json()
    kept = f"Be kind.{chat_text('z' * 30, 'w' * 20, 'end')}"
    assert answer["usage"]["prompt_tokens"] == len(kept)
    whole = expected(models, "a", kept, 1, 100)
    assert answer["choices"][0]["message"]["content"] == whole.text


@pytest.mark.parametrize("turns", [("x" * 200,), ("hi", "yes?", "x" * 200), ("x" * 3000,)])
def test_last_message_that_does_not_fit_is_refused(server, turns):
    """Its end, the question, was cut off without a word."""
    answer = ask(server[1], {"model": "a", "messages": said(*turns), "max_tokens": 100})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "messages" and "does not fit" in error["message"]


def test_every_cut_is_the_longest_that_fits(server):
    """The search for it agrees with trying every start in turn, for dialogues of many lengths."""
    models = server[0]
    for n in range(1, 25, 2):
        turns = [(index % 2 == 0, "ab" * (index % 5 + 1)) for index in range(n)]
        for new in (100, 150, 200):
            starts = (prompts.render_dialogue(turns[i:], "ram", "S") for i in range(0, n, 2))
            fitting = next((text for text in starts if len(text) <= models.max_length - new), None)
            assert fitting is not None
            assert models.encode_dialogue(models.served["a"], turns, "S", new) == TOKENIZER(fitting).input_ids


def test_first_message_of_the_assistant_stays(server):
    """A dialogue may begin with a greeting; it goes first if there is no room."""
    models, url = server
    turns = [(False, "I am Bob."), (True, "Who are you?")]
    ids = TOKENIZER(prompts.render_dialogue(turns)).input_ids
    assert models.encode_dialogue(models.served["a"], turns, None, 4) == ids
    messages = [{"role": "user" if user else "assistant", "content": text} for user, text in turns]
    answer = ask(url, {"model": "a", "messages": messages, "max_tokens": 2}).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    new = models.max_length - len(ids) + 1
    rest = TOKENIZER(chat_text("Who are you?")).input_ids
    assert models.encode_dialogue(models.served["a"], turns, None, new) == rest


def test_last_message_of_the_assistant_is_continued(server):
    models, url = server
    answer = ask(url, {"model": "a", "messages": said("hello", "Well, "), "seed": 4, "max_tokens": 12}).json()
    text = chat_text("hello") + "Well, "
    assert answer["usage"]["prompt_tokens"] == len(text)
    assert answer["choices"][0]["message"]["content"] == expected(models, "a", text, 4, 12).text


# ---- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"sample_mode": "par_kl"}, {"sample_mode": "product"}])
def test_temperature_0_is_greedy_for_the_whole_pair(server, sampling):
    """Equal requests give one text; a request that sets the proposal's temperature decides for itself."""
    request = {"model": "a", "prompt": "abc", "max_tokens": 12, "temperature": 0, **sampling}
    texts = [ask(server[1], request, "completions").json()["choices"][0]["text"] for _ in range(4)]
    assert len(set(texts)) == 1
    whole = expected(server[0], "a", "abc", 0, 12, temperature=0.0, **sampling)
    assert texts[0] == whole.text
    own = ask(server[1], request | {"base_temperature": 1.3, "seed": 3}, "completions").json()
    whole = expected(server[0], "a", "abc", 3, 12, temperature=0.0, base_temperature=1.3, **sampling)
    assert own["choices"][0]["text"] == whole.text


@pytest.mark.parametrize("mode", ["product", "mixture", "mds", "par"])
def test_token_at_temperature_0_is_the_most_likely_of_the_reported_law(server, mode):
    """The aligner's temperature is a part of the law: at 0 either model would decide alone."""
    models, url = server
    keys = {"sample_mode": mode, "base_top_p": 1.0, "mixture_weight": 0.5}
    request = {"model": "a", "prompt": "abc", "max_tokens": 6, "temperature": 0, "logprobs": 2, **keys}
    answer = ask(url, request, "completions").json()["choices"][0]
    pair, law = [load(models.proposal), load(models.served["a"].path)], models.law(keys)
    assert law.temperature == 1.0 and not law.greedy
    context = TOKENIZER("abc").input_ids
    for logprob in answer["logprobs"]["token_logprobs"]:
        ids = torch.tensor([context])
        with torch.inference_mode():
            logits = [model(ids).logits[:, -1, : len(TOKENIZER)] for model in pair]
        known = par.token_logprobs(*logits, law, ids)[0]
        assert logprob == pytest.approx(float(known.max()), abs=1e-4)
        context = [*context, int(known.argmax())]
    end = len(context) - (context[-1] == TOKENIZER.eos_token_id)
    assert answer["text"] == text_of(TOKENIZER, context[3:end])


@pytest.mark.parametrize(
    "extra",
    [
        {"functions": None, "function_call": "none", "tools": [], "tool_choice": "auto"},
        {"modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None},
        {"reasoning_effort": "low", "verbosity": "high"},
        {"prompt_cache_key": "x", "prompt_cache_retention": "24h", "safety_identifier": "u"},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    ],
)
def test_keys_that_say_nothing_are_accepted(server, extra):
    request = {"model": "a", "messages": HELLO, "seed": 2, "max_tokens": 4}
    plain, same = (ask(server[1], request | keys) for keys in ({}, extra))
    assert same.status_code == 200, same.text
    assert same.json()["choices"][0]["message"] == plain.json()["choices"][0]["message"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("functions", [{"name": "f"}]), ("modalities", ["audio"]), ("audio", {"voice": "x"}), ("store", True)],
)
def test_keys_that_ask_for_something_else_are_refused(server, key, value):
    answer = ask(server[1], {"model": "a", "messages": HELLO, key: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == key


def test_twenty_prompts_at_once_are_answered(server):
    request = {"model": "a", "prompt": [f"p{i}" for i in range(20)], "max_tokens": 2}
    assert len(ask(server[1], request, "completions").json()["choices"]) == 20


def test_ids_above_the_count_of_tokens_have_a_text():
    """A vocabulary with unused ids has ids above `len(tokenizer)`."""
    app, models = FastAPI(), SimpleNamespace(tokenizer=gapped_tokenizer(), find=lambda name: None)
    add_tokens(app, cast(Models, models))
    with TestClient(app) as client:
        assert client.post("/detokenize", json={"tokens": [0, 9, 14]}).json() == {"prompt": f"a{EOS}"}
        with pytest.raises(ApiError, match="expected ids below 15"):
            client.post("/detokenize", json={"tokens": [15]})


def test_stop_token_ids_end_an_answer(server):
    request = {"model": "a", "prompt": "Q: A:", "seed": 3, "max_tokens": 20}
    text = ask(server[1], request, "completions").json()["choices"][0]["text"]
    letter = next(character for character in text[1:] if character.isascii())
    request["stop_token_ids"] = TOKENIZER(letter).input_ids
    choice = ask(server[1], request, "completions").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(letter)], "stop")


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/metrics", "/v1/models/x", "/nowhere"])
def test_head_is_get_without_a_body(server, path):
    whole, bare = get(server[1] + path), head(server[1] + path)
    assert bare.status_code == whole.status_code and bare.content == b""
    assert bare.headers["content-type"] == whole.headers["content-type"]


def test_texts_and_ids_are_converted_as_vllm_does(server):
    """A dialogue is that of a chat request; a round trip gives the same text."""
    url = server[1]
    answer = post(f"{url}/tokenize", json={"prompt": "aé", "return_token_strs": True}).json()
    assert answer["tokens"] == TOKENIZER("aé").input_ids and answer["count"] == 3
    assert answer["max_model_len"] == 256
    assert answer["token_strs"] == TOKENIZER.convert_ids_to_tokens(answer["tokens"])
    ids = [*answer["tokens"], TOKENIZER.eos_token_id]
    assert post(f"{url}/detokenize", json={"model": "a", "tokens": ids}).json() == {"prompt": "aé</s>"}
    answer = post(f"{url}/tokenize", json={"model": "a", "messages": HELLO}).json()
    assert answer["tokens"] == TOKENIZER(chat_text("hello")).input_ids
    for path, body in (("tokenize", {}), ("detokenize", {"tokens": [999]}), ("tokenize", {"model": "x"})):
        assert post(f"{url}/{path}", json={"prompt": "x"} | body if body else {}).status_code in (400, 404)


# ---- log-probabilities and texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["proposal", "a"])
def test_logprobs_at_temperature_0_are_those_of_the_untempered_law(server, name):
    """A law that is one token's would only ever report 0.0."""
    models, url = server
    request = {"model": name, "prompt": "abc", "max_tokens": 5, "temperature": 0, "logprobs": 3}
    logprobs = ask(url, request, "completions").json()["choices"][0]["logprobs"]
    context = TOKENIZER("abc").input_ids
    whole = expected(models, name, "abc", 0, 5, temperature=0.0)
    pair = [load(models.proposal), None if name == "proposal" else load(models.served[name].path)]
    law = models.law({"temperature": 1.0, "base_temperature": 1.0})
    for step, token in enumerate(whole.token_ids):
        ids = torch.tensor([context])
        with torch.inference_mode():
            logits = [None if m is None else m(ids).logits[:, -1, : len(TOKENIZER)] for m in pair]
        known = par.token_logprobs(*logits, law, ids)[0]
        assert logprobs["token_logprobs"][step] == pytest.approx(float(known[token]), abs=1e-4) != 0.0
        assert len(logprobs["top_logprobs"][step]) >= 3
        context = [*context, token]


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A server whose tokenizer begins each text with a space that it drops again, as SentencePiece does."""
    folder = tmp_path_factory.mktemp("spaced")
    words = ["<unk>", "<s>", "</s>", "▁", *(f"▁{c}" for c in "abc"), *"abc"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 - (word == "▁")) for word in words], unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for seed, name in enumerate("pab", start=1):
        save_model_folder(folder / name, tiny_model(len(fast), seed), fast)
    with running(folder) as (served, url):
        yield SimpleNamespace(models=served, url=url, tokenizer=fast)


def test_completion_keeps_the_space_after_its_prompt(spaced):
    """Prompt and text are the tokens' text, whole or streamed; tokens and bytes join to it."""
    leading = 0
    for seed in range(8):
        request = {"model": "a", "prompt": "a", "seed": seed, "max_tokens": 6, "logprobs": 2}
        choice = ask(spaced.url, request, "completions").json()["choices"][0]
        leading += choice["text"].startswith(" ")
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        *_, (row,) = reference.decode_batch(
            *(model and load_model(spaced, model) for model in ("p", "a")),
            spaced.tokenizer,
            [spaced.tokenizer("a", add_special_tokens=False).input_ids],
            spaced.models.settings.params,
            max_new_tokens=6,
            seed=seed,
            row_ids=[0],
        )
        spelt = "".join(spaced.tokenizer.convert_ids_to_tokens(row.ids)).replace("▁", " ")
        for mark in ("<unk>", "<s>", "</s>"):
            spelt = spelt.replace(mark, "")
        assert choice["text"] == spelt
    assert leading


def test_begun_message_keeps_the_space_after_it(spaced):
    """As a completion does: the client joins the two."""
    leading = 0
    for seed in range(8):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        request = {"model": "a", "messages": messages, "seed": seed, "max_tokens": 4, "logprobs": True}
        choice = ask(spaced.url, request | {"return_token_ids": True}).json()["choices"][0]
        spelt = "".join(spaced.tokenizer.convert_ids_to_tokens(choice["token_ids"])).replace("▁", " ")
        spelt = re.sub("<unk>|</?s>", "", spelt)
        leading += spelt.startswith(" ")
        assert choice["message"]["content"] == spelt
        assert (
            "".join(token["token"] for token in choice["logprobs"]["content"]) == choice["message"]["content"]
        )
    assert leading


def load_model(spaced, name):
    return load(spaced.models.proposal if name == "p" else spaced.models.served[name].path)


def test_template_brings_its_own_stops(tmp_path):
    """Its stop strings, and those of its stop tokens that are special tokens of the vocabulary."""
    save_models(tmp_path)
    arguments = [f"proposal={tmp_path}/p", "template=zephyr", "port=0"]
    served = Models(serving.read_settings(arguments))
    assert served.served["proposal"].stops == ["</s>"]
    assert served.served["proposal"].stop_ids == []  # id 2 is an ordinary token here
    served.engine.close(wait=False)
    assert prompts.template_stop_ids("qwen-7b-chat", {151645: "<|im_end|>"}) == [151645]
