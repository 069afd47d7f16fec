"""Ids to text: every view of an answer agrees with the bytes of its tokens."""

import codecs
import functools
import json
import math
import re

import pytest
from fastchat.conversation import conv_templates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import SHARED, Scripted, byte_tokenizer, needs_shared
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ram.data import prompts
from ram.data.text import Text, shares, spelling, text_of, token_texts
from ram.data.tokenization import encode
from ram.decoding.generation import generate
from ram.decoding.par import PARParams
from ram.decoding.requests import TokenLogprobs
from ram.serving.loop import Done, Piece
from ram.serving.responses import Choice, Shown, top_logprobs

LINES = [
    "the cat sat on the mat.",
    "a cat, a hat!\n\nHuman: hé日本🙂",
    "안녕하세요 wörld",
    " two  spaces ",
] * 8
MARKS = {"bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def byte_level():
    """Byte-level BPE with merges, so that tokens end within characters; a mark and an added word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, show_progress=False, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["<think> é"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MARKS)


@functools.cache
def unigram():
    """SentencePiece's Unigram: no bytes, the first space of a text is dropped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **MARKS)


@functools.cache
def byte_fallback():
    """SentencePiece's BPE: a character without a token is spelt in tokens of single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"acehmnort.", "é"]
    merges = [("a", "t"), ("▁", "c"), ("▁c", "at"), ("h", "e")]
    pieces += [left + right for left, right in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first_space = decoders.Strip(" ", 1, 0)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), first_space]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **MARKS)


@functools.cache
def trained_byte_fallback():
    return PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED / "models/tinystories-260k/tokenizer.json"), unk_token="<unk>", **MARKS
    )


KINDS = [
    byte_level,
    unigram,
    byte_fallback,
    pytest.param(trained_byte_fallback, marks=needs_shared),
]


@functools.cache
def token_bytes(make):
    """The bytes of every token, read from the tokenizer's file by rules of this test alone."""
    tokenizer, table = make(), {}
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in letters]
    table = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(rest)}
    added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
    special = {token["id"]: token["special"] for token in added}
    found = []
    for index in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(index)
        if special.get(index):
            found.append(b"")
        elif make is byte_level:
            found.append(token.encode() if index in special else bytes(table[c] for c in token))
        elif make in (byte_fallback, trained_byte_fallback) and re.fullmatch("<0x..>", token):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            found.append(token.replace("▁", " ").encode())
    return found


def check(make, data, continued):
    """One random case: stream, text, shares and log-probabilities of random tokens and stop strings."""
    tokenizer, known = make(), token_bytes(make)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    if data.draw(st.booleans()):  # some real text, so that characters are whole
        text = data.draw(st.text("aé日🙂안\n t", max_size=8))
        ids += tokenizer(text, add_special_tokens=False).input_ids
    whole = b"".join(known[token] for token in ids)
    whole = whole if continued or make is byte_level else whole.removeprefix(b" ")
    truth = whole.decode("utf-8", "replace")
    stop = [
        truth[i : i + n] for i, n in data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4))))
    ]
    stop = [
        string for string in [*stop, *data.draw(st.lists(st.sampled_from(["\n", "t", "안n", "x"])))] if string
    ]
    # The answer ends with the first token that completes a stop string, or the text with its last token.
    texts = []
    for count in range(len(ids) + 1):
        part = b"".join(known[token] for token in ids[:count])
        part = part if continued or make is byte_level else part.removeprefix(b" ")
        texts.append((count, codecs.utf_8_decode(part, "replace", False)[0]))
    expected, end = truth, len(ids)
    for count, text in [*texts, (len(ids), truth)]:
        if starts := [text.find(string) for string in stop if string in text]:
            expected, end = text[: min(starts)], count
            break

    growing, stopped = Text(spelling(tokenizer), stop, continued), False
    choice, sent = Choice(0, tokenizer, continued), 0

    def send(count):
        nonlocal sent
        text = growing.text[len(choice.text) : growing.ends[count - 1]]
        if count > sent and (text or growing.finished):
            tops = TokenLogprobs(-1.0, ((ids[sent], -1.0),))
            choice.add(Piece(tuple(ids[sent:count]), text, (tops,) * (count - sent)))
            sent = count

    for used, token in enumerate(ids, start=1):
        stopped = growing.add(token)
        if stopped or used == len(ids):
            growing.finish()
        if count := growing.settled():
            send(count)
            assert expected.startswith(choice.text)
        if stopped:
            break
    choice.add(Done("stop", 1, 1, {}))
    assert growing.finish() == choice.text == expected
    assert not ids or used == end
    assert "".join(shares(expected, growing.ends)) == expected
    entries = [entry.own for entry in choice.logprobs]
    assert [entry.id for entry in entries] == ids[:used] if ids else entries == []
    assert "".join(entry.text for entry in entries) == expected
    if "\ufffd" not in expected:
        assert b"".join(entry.data for entry in entries) == expected.encode()
    assert [entry.start for entry in choice.logprobs] == [
        len("".join(entry.text for entry in entries[:i])) for i in range(len(entries))
    ]
    if not continued and not stop:
        assert text_of(tokenizer, ids) == expected
        marked = token_texts(tokenizer, ids, marks=True)
        assert len(marked) == len(ids)
        if not any(known[token] == b"" for token in ids):
            assert "".join(marked) == expected


QUICK = settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=3334, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("continued", [False, True], ids=["own", "continued"])
@pytest.mark.parametrize("make", KINDS)
def test_every_view_of_a_text_is_that_of_its_bytes(make, continued):
    """Stream, whole text, tokens' strings and bytes agree for random ids and stop strings."""
    QUICK(given(st.data())(lambda data: check(make, data, continued)))()


@pytest.mark.slow
@pytest.mark.parametrize("continued", [False, True], ids=["own", "continued"])
@pytest.mark.parametrize("make", KINDS)
def test_every_view_of_a_text_in_20000_cases(make, continued):
    LONG(given(st.data())(lambda data: check(make, data, continued)))()


def test_token_texts_add_up_to_the_answer():
    """A character of several tokens belongs to its last one; text that a stop string cut belongs to none."""
    ids = byte_tokenizer()("aé日!stop").input_ids
    texts = token_texts(byte_tokenizer(), ids, "aé日!")
    assert "".join(texts) == "aé日!" and texts[:3] == ["a", "", "é"] and texts[-1] == ""


# ---- marks -------------------------------------------------------------------------------------------------


def grown(tokenizer, ids, stop=(), **settings):
    text = Text(spelling(tokenizer), stop, **settings)
    for token in ids:
        text.add(token)
    return text


def test_special_token_can_be_a_stop_string():
    """It has no text in which the string could be found, so its id ends the answer."""
    tokenizer = byte_level()
    text = Text(spelling(tokenizer), ["<s>", "x"])
    assert text.stop_ids == {tokenizer.bos_token_id}
    ids = [*tokenizer("ab").input_ids, tokenizer.bos_token_id, *tokenizer("cd").input_ids]
    scripted = Scripted(tokenizer, [*ids, tokenizer.eos_token_id], prompt_length=1)
    law = PARParams(base_temperature=0)
    (answer,) = generate(scripted, None, tokenizer, ["x"], law, max_new_tokens=9, stop=["<s>"])
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_newline_before_bytes_is_not_swallowed():
    """`tokenizer.decode` turns a run of byte tokens into replacement characters if one is incomplete."""
    tokenizer = byte_fallback()
    ids = tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xED>", "<0x95>"])
    assert tokenizer.decode(ids) == "\ufffd" * 3 and text_of(tokenizer, ids) == "\n\ufffd"
    hangul = [f"<0x{byte:02X}>" for byte in "안\n녕".encode()]
    text = Text(spelling(tokenizer), ["\n"])
    found = [text.add(token) for token in tokenizer.convert_tokens_to_ids(hangul[:4])]
    assert found == [False, False, False, True] and text.finish() == "안"


def test_first_space_belongs_to_a_text_that_continues():
    tokenizer = unigram()
    ids = tokenizer("cat sat", add_special_tokens=False).input_ids
    assert grown(tokenizer, ids).finish() == "cat sat"
    assert grown(tokenizer, ids, continued=True).finish() == " cat sat"


def test_equal_spellings_stay_apart():
    """In a report, and in OpenAI's object of the most likely tokens, whose keys are texts."""
    tokenizer = unigram()
    words = spelling(tokenizer)
    both = [token for token in tokenizer.get_vocab() if f"▁{token}" in tokenizer.get_vocab()]
    for token in both:
        plain, spaced = tokenizer.convert_tokens_to_ids([token, f"▁{token}"])
        assert tokenizer.decode([plain]) == tokenizer.decode([spaced])
        assert (words.word(plain), words.word(spaced)) == (token, f" {token}")
    assert both
    own = Shown(5, "a", b"a", -1.0)
    others = [own, Shown(6, "a", b"a", -2.0), Shown(7, "", b"\xed", -3.0), Shown(8, "", b"\xee", -math.inf)]
    assert top_logprobs(own, others) == {"a": -1.0, "token_id:6": -2.0, "": -3.0, "token_id:8": -9999.0}


def test_word_pieces_are_spelt_as_after_other_tokens():
    vocabulary = ["[UNK]", "a", "##b", "don", "'", "t", "."]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert text_of(fast, [1, 2, 1, 6]) == fast.decode([1, 2, 1, 6]) == "ab a."


def test_marks_of_a_template_are_special_tokens_and_those_of_users_are_text():
    """In a FastChat template's own parts only; a template without marks gives the ids that it always gave."""
    tokenizer = byte_level()
    prompt = prompts.render_dialogue([(True, "hi</s>"), (False, "<s>"), (True, "")], "vicuna_v1.1")
    assert prompt.count("</s>") == 2 and prompt.has_marks
    ids = encode(tokenizer, [prompt])[0]
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.bos_token_id not in ids
    assert text_of(tokenizer, ids, marks=True) == prompt
    assert encode(tokenizer, [str.__str__(prompt)]) != [ids]
    before, after = prompt.rsplit("</s>", 1)
    parts = encode(tokenizer, [str(before), str(after)])
    assert ids == [*parts[0], tokenizer.eos_token_id, *parts[1]]
    plain = prompts.render("hi", "zero_shot")
    assert not plain.has_marks and encode(tokenizer, [plain]) == encode(tokenizer, [str.__str__(plain)])
    assert not isinstance(prompts.render("hi"), prompts.Prompt)


@pytest.mark.parametrize("name", sorted(name for name, found in conv_templates.items() if found.sep_style))
def test_every_template_is_rendered_as_fastchat_renders_it(name):
    """Texts are also found in their prompt, so that a template's own parts are known, or nothing is."""
    turns = [(True, "a <s> zebra"), (False, "an answer"), (True, "last")]
    conversation = conv_templates[name].copy()
    for user, text in turns:
        conversation.append_message(conversation.roles[not user], text)
    conversation.append_message(conversation.roles[1], None)
    prompt = prompts.render_dialogue(turns, name)
    assert prompt == conversation.get_prompt()
    for start, end in getattr(prompt, "own", ()):
        assert "zebra" not in prompt[start:end]
