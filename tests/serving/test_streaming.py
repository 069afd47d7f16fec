"""FastChat's in-process stream: it ends with the text of `generate`, and FastChat's own loop can use it."""

import pytest
from tiny import Scripted, byte_tokenizer, tiny_model

from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.serving.fastchat.stream import PairModel, generate_stream, request_params

TOKENIZER = byte_tokenizer()
PARAMS = PARParams(sample_mode="par", temperature=1.0, base_temperature=1.0)


@pytest.fixture(scope="module")
def pair():
    return PairModel(tiny_model(len(TOKENIZER), 1, layers=2), tiny_model(len(TOKENIZER), 2), PARAMS)


def stream(pair, prompt="Q: hello A:", **request):
    request = {"prompt": prompt, "max_new_tokens": 30, "echo": False, **request}
    return list(generate_stream(pair, TOKENIZER, request, "cpu", 200, stream_interval=1))


def test_stream_ends_with_the_text_of_generate(pair):
    """Each item's text extends the previous one; the token counts are exact."""
    items = stream(pair, seed=3)
    (whole,) = generation.generate(
        pair.proposal, pair.aligner, TOKENIZER, ["Q: hello A:"], PARAMS, max_new_tokens=30, seed=3
    )
    assert items[-1]["text"] == whole.text and items[-1]["finish_reason"] == whole.finish_reason
    assert items[-1]["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": len(whole.token_ids),
        "total_tokens": 11 + len(whole.token_ids),
    }
    assert all(b["text"].startswith(a["text"]) for a, b in zip(items, items[1:], strict=False))
    assert [item["finish_reason"] for item in items[:-1]] == [None] * (len(items) - 1)
    assert stream(pair, seed=4)[-1]["text"] != whole.text


def test_sampling_settings_of_a_request_are_used(pair):
    """A temperature near 0 means argmax of the whole pair; PAR's own keys are accepted too."""
    assert request_params(PARAMS, {"temperature": 1e-6, "top_k": 3}) == PARParams(
        sample_mode="par", temperature=1.0, top_k=3, base_temperature=1.0, greedy=True
    )
    own = {"temperature": 0, "base_temperature": 0.9}
    assert request_params(PARAMS, own) == PARParams("par", temperature=0, base_temperature=0.9)
    greedy = {"temperature": 0.0}
    assert len({stream(pair, seed=seed, **greedy)[-1]["text"] for seed in range(3)}) == 1
    with pytest.raises(ValueError, match="sample_mode='best'"):
        stream(pair, sample_mode="best")


def test_settings_are_the_proposals_if_it_answers_alone(pair):
    """They had no effect: FastChat's temperature was the aligner's, which there was not."""
    alone = PairModel(pair.proposal, None, PARAMS)
    assert len({stream(alone, seed=seed, temperature=0)[-1]["text"] for seed in range(3)}) == 1
    hot = stream(alone, seed=1, temperature=1.7)[-1]["text"]
    assert hot == stream(alone, seed=1, base_temperature=1.7)[-1]["text"] != stream(alone, seed=1)[-1]["text"]


def scripted(text):
    ids = TOKENIZER(text).input_ids
    return PairModel(
        Scripted(TOKENIZER, [*ids, TOKENIZER.eos_token_id], prompt_length=2),
        None,
        PARParams(base_temperature=0),
    )


def test_start_of_a_stop_string_is_held_back():
    """No part of a stop string is shown; text that only begins like one is shown at the end."""
    texts = [item["text"] for item in stream(scripted("one\n\nHumans"), prompt="Q:", stop="\n\nHuman")]
    assert texts[-1] == "one" and all("one".startswith(text) for text in texts)
    texts = [item["text"] for item in stream(scripted("one\n\nHum."), prompt="Q:", stop=["\n\nHuman"])]
    assert texts[-1] == "one\n\nHum." and "one\n\nHum" not in texts


def test_incomplete_characters_are_not_shown():
    texts = [item["text"] for item in stream(scripted("aé日!"), prompt="Q:")]
    assert texts[-1] == "aé日!" and not any("\ufffd" in text for text in texts)


def test_stop_token_ids_end_the_answer():
    (full_stop,) = TOKENIZER(".").input_ids
    last = stream(scripted("ab.cd"), prompt="Q:", stop_token_ids=[full_stop])[-1]
    assert (last["text"], last["finish_reason"]) == ("ab", "stop")


def test_prompt_and_answer_may_fill_the_context_exactly(pair):
    """The published decoder cut one token too many here."""
    prompt = "x" * 170
    assert stream(pair, prompt=prompt)[-1]["usage"]["prompt_tokens"] == 170
    assert stream(pair, prompt=prompt + "y")[-1]["usage"]["prompt_tokens"] == 170
    with pytest.raises(ValueError, match="max_new_tokens=200"):
        stream(pair, max_new_tokens=200)


def test_fastchat_loop_drives_a_pair(pair, monkeypatch):
    """FastChat's own command-line chat works with a pair, in the project's template."""
    inference = pytest.importorskip("fastchat.serve.inference")
    from ram.data.prompts import conversation_template

    questions, outputs = iter(["hello", "!!exit"]), []

    class ChatIO:
        def prompt_for_input(self, role):
            return next(questions)

        def prompt_for_output(self, role):
            pass

        def stream_output(self, output_stream):
            items = list(output_stream)
            outputs.append(items[-1])
            return items[-1]["text"]

        def print_output(self, text):
            outputs.append(text)

    conversation_template()
    monkeypatch.setattr(inference, "load_model", lambda *args, **kwargs: (pair, TOKENIZER))
    monkeypatch.setattr(inference, "get_generate_stream_function", lambda model, path: generate_stream)
    monkeypatch.setattr(inference, "get_context_length", lambda config: 200)
    inference.chat_loop(
        "pair", "cpu", 1, None, None, False, False, "ram", None, 0.7, 1.0, 20, ChatIO(), debug=False
    )
    assert outputs[0]["finish_reason"] in ("stop", "length")
    assert outputs[0]["usage"]["prompt_tokens"] == len("\n\nHuman: hello\n\nAssistant: ")
