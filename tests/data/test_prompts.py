"""Exact prompt texts, shortening of long prompts, token ids and their cache."""

import contextlib
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template
from safetensors import SafetensorError
from tiny import PAD, byte_tokenizer

from ram.data import prompts, tokenization
from ram.data.prompts import ASSISTANT, corrector, from_record, render, shorten
from ram.data.tokenization import (
    Example,
    encode,
    encode_prompts,
    tokenize,
    tokenize_cached,
    tokenizer_fingerprint,
)
from ram.errors import UserError

TOKENIZER = byte_tokenizer()
HUMAN = "\n\nHuman: "
TAILS = [ASSISTANT, "\n\nAssistant:", "\nTL;DR:", " TL;DR:", "\nTL;DR:\n\nAssistant: ", "\n\nCorrection: "]
TAILS += ["\n\nTL;DR:" + ASSISTANT, "\n\n### Correction:\n"]
COUNTERS = {
    "characters": len,
    "bytes": lambda text: len(text.encode()),
    "words": lambda text: len(re.findall(r"\w+|\s|[^\w\s]", text)),
    # As with BPE merges, a longer text can have fewer tokens: "Assistan" has 8, "Assistant" 1.
    "merging": lambda text: len(re.findall(r"\n\nHuman: |Assistant|TL;DR:|the |\n\n|.", text, re.DOTALL)),
}
NASTY = ["Why is the sky blue?", "  why? \n", "{instruction} %s {0} \\n", "空はなぜ青いの? Почему?"]
NASTY += [f"Translate:{HUMAN}hello{ASSISTANT}hi", "</s><|endoftext|>", "USER: x TL;DR:", "👩‍👩‍👧 e\u0301"]


# ---- rendering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY)
def test_prompt_is_the_instruction_between_two_headers(text):
    """The literal text, which an independent FastChat conversation renders too."""
    style = SeparatorStyle.ADD_COLON_SPACE_SINGLE
    own = Conversation("own", roles=("Human", "Assistant"), messages=[], sep_style=style, sep="\n\n")
    own.append_message("Human", text)
    own.append_message("Assistant", None)
    assert render(text) == f"\n\nHuman: {text}\n\nAssistant: " == own.get_prompt()


def test_empty_instruction_keeps_both_headers():
    assert render("") == "\n\nHuman: \n\nAssistant: "


def test_system_message_comes_first():
    """A system message does not leak into prompts rendered later."""
    assert render("Why?", system="Be brief.") == "Be brief.\n\nHuman: Why?\n\nAssistant: "
    assert render("Why?") == "\n\nHuman: Why?\n\nAssistant: "


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2", "zero_shot"])
def test_fastchat_templates_are_rendered_by_name(name, system):
    conversation = get_conv_template(name)
    if system:
        conversation.set_system_message(system)
    conversation.append_message(conversation.roles[0], "Why?")
    conversation.append_message(conversation.roles[1], None)
    assert render("Why?", name, system) == conversation.get_prompt()


def test_unknown_template_error_suggests_a_name():
    with pytest.raises(UserError, match=r"\Aunknown template 'vicuna_v1.2': did you mean 'vicuna_v1.1'\?\Z"):
        render("Why?", "vicuna_v1.2")


def test_corrector_prompt_is_dialogue_answer_and_request():
    assert corrector(ASSISTANT, "No idea.") == "\n\nAssistant: No idea.\n\nCorrection: "


# ---- records -----------------------------------------------------------------------------------------------


def settings(**changed):
    """The default `sampling` settings that determine a prompt, with changes."""
    keys = {"input_key": "instruction", "output_key": "output", "system_key": None}
    keys |= {"template": "ram", "multiround": False, "for_aligner": False}
    return SimpleNamespace(**keys | changed)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "\n\nHuman: Why?\n\nAssistant: "),
        ({"input_key": "question"}, "\n\nHuman: How?\n\nAssistant: "),
        ({"system_key": "system"}, "Be brief.\n\nHuman: Why?\n\nAssistant: "),
        ({"template": "zero_shot"}, None),
        ({"multiround": True, "input_key": "whole"}, f"{HUMAN}a{ASSISTANT}b{HUMAN}c{ASSISTANT}"),
        ({"for_aligner": True}, "\n\nHuman: Why?\n\nAssistant: No idea.\n\nCorrection: "),
        ({"for_aligner": True, "output_key": "draft"}, "\n\nHuman: Why?\n\nAssistant: Hm.\n\nCorrection: "),
        ({"for_aligner": True, "multiround": True}, "Why?No idea.\n\nCorrection: "),
    ],
)
def test_record_is_rendered_by_the_settings(changed, expected):
    """Each setting works alone and combined with others."""
    record = {"instruction": "Why?", "question": "How?", "system": "Be brief.", "output": "No idea."}
    record |= {"draft": "Hm.", "whole": f"{HUMAN}a{ASSISTANT}b{HUMAN}c{ASSISTANT}"}
    expected = render("Why?", "zero_shot") if expected is None else expected
    assert from_record(record, settings(**changed)) == expected


# ---- shortening --------------------------------------------------------------------------------------------

HALVES = [word[:n] for word in ("Human:", "Assistant:") for n in range(1, len(word) + 1)]
CUT_HEADER = re.compile(rf"\n\n({'|'.join(HALVES)})\Z")
CHARACTERS = [*"abc xyz.", "\n", "\n\n", "é", "空", "👩‍👧", "the ", "TL;DR", "Human: ", "Assistant: "]


def random_prompt(rng):
    """Return (turns without the tail, tail): one to five turns, sometimes after text without a header."""

    def body(low, high):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(low, high)))
        # Text that looks like a header, or space before one, is tested separately below.
        return re.sub(r"\s+(Human|Assistant)", r" \1", text) + "."

    turns = [f"{HUMAN}{body(0, 20)}{ASSISTANT}{body(0, 20)}" for _ in range(rng.randrange(5))]
    lead = [body(1, 20)] if rng.random() < 0.3 else []
    return [*lead, *turns, f"{HUMAN}{body(0, 40)}"], rng.choice(TAILS)


def random_cases(seed, cases=400):
    """Yield random (turns, tail, counter, limit); the headers alone always fit."""
    rng = random.Random(seed)
    for _ in range(cases):
        turns, tail = random_prompt(rng)
        count = rng.choice(list(COUNTERS.values()))
        least = count(HUMAN + tail)
        yield turns, tail, count, rng.randint(least, max(least, count("".join(turns) + tail)) + 3)


def test_shortened_prompt_fits_and_keeps_its_headers():
    """400 random prompts; shortening a shortened prompt again does not change it."""
    for turns, tail, count, limit in random_cases(seed=0):
        prompt = "".join(turns) + tail
        short = shorten(prompt, limit, count)
        assert count(short) <= limit
        assert (short == prompt) == (count(prompt) <= limit)
        assert short.endswith(tail)
        assert short == prompt or short.startswith(HUMAN)
        assert not CUT_HEADER.search(short.removesuffix(tail))
        assert shorten(short, limit, count) == short


def test_oldest_turns_are_dropped_first():
    """400 random prompts: the longest suffix of turns that fits is kept, else a cut last turn."""
    cut_inside = 0
    for turns, tail, count, limit in random_cases(seed=1):
        short = shorten("".join(turns) + tail, limit, count)
        ends = ["".join(turns[first:]) + tail for first in range(len(turns))]
        fitting = [end for end in ends if count(end) <= limit]
        if fitting:
            assert short == fitting[0]
        else:
            cut_inside += 1
            assert turns[-1].startswith(short.removesuffix(tail)) and len(short) < len(ends[-1])
    assert cut_inside > 50


def test_cut_fills_the_limit():
    for limit in range(len(HUMAN + ASSISTANT), 60):
        assert len(shorten(render("why? " * 20 + "!"), limit, len)) == limit


@pytest.mark.parametrize("tail", TAILS)
def test_headers_that_exceed_the_limit_are_an_error(tail):
    """If only the headers fit, they are the result; one token less is an error with their length."""
    least = len(HUMAN + tail)
    assert shorten(f"{HUMAN}why?{tail}", least, len) == HUMAN + tail
    with pytest.raises(UserError, match=rf"\Amax_prompt_length={least - 1}: .* need {least} tokens"):
        shorten(f"{HUMAN}why?{tail}", least - 1, len)


@pytest.mark.parametrize(
    ("prompt", "limit", "expected"),
    [
        ("abcdefgh", 5, "abcde"),  # an instruction without template has no header
        ("", 0, ""),
        (f"post {'x' * 90}\nTL;DR:", 20, "post xxxxxxxx\nTL;DR:"),
        (f"{HUMAN}POST: {'x' * 90}\n\nTL;DR:{ASSISTANT}", 37, f"{HUMAN}POST: x\n\nTL;DR:{ASSISTANT}"),
        (f"{HUMAN}TL;DR: TL;DR:{'x' * 90}{ASSISTANT}", 30, f"{HUMAN}TL;DR: T{ASSISTANT}"),
        (f"{HUMAN}{ASSISTANT}", 22, f"{HUMAN}{ASSISTANT}"),
        (f"{HUMAN}say{HUMAN}hello{ASSISTANT}", 30, f"{HUMAN}hello{ASSISTANT}"),
        (f"Be brief.{HUMAN}hello{ASSISTANT}", 30, f"{HUMAN}hello{ASSISTANT}"),
        (f"{HUMAN}👩‍👧空空空{ASSISTANT}", 25, f"{HUMAN}👩‍👧{ASSISTANT}"),
        (f"{HUMAN}a\n\nb Human: c{ASSISTANT}", 27, f"{HUMAN}a\n\nb {ASSISTANT}"),
    ],
)
def test_cut_of_unusual_texts(prompt, limit, expected):
    """Texts without a header, with one inside, with several requests, with nothing to cut."""
    assert shorten(prompt, limit, len) == expected


def test_cut_corrector_prompt_has_no_partial_header():
    """If the cut falls into the Assistant header before the answer, the whole header is dropped."""
    for limit in range(len(HUMAN + "\n\nCorrection: "), 50):
        short = shorten(corrector(render("Hi"), "No idea at all."), limit, len)
        assert not CUT_HEADER.search(short.removesuffix("\n\nCorrection: "))


def test_trailing_space_of_a_question_can_be_cut():
    short = shorten(f"{HUMAN}Hi{' ' * 200}{ASSISTANT}", 60, len)
    assert short.startswith(f"{HUMAN}Hi") and short.endswith(ASSISTANT) and len(short) <= 60


def test_shortening_counts_tokens_a_few_times_only():
    """Binary search: a body of a million characters needs a few dozen counts."""
    counted = []
    shorten(render("x" * 1_000_000), 500, lambda text: counted.append(text) or len(text))
    assert len(counted) < 40


# ---- ids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_training_and_decoding_use_the_same_prompt_ids(add_bos):
    """Prompts encoded one by one, as in decoding, equal those of the training set, including cut ones."""
    texts = [render("why? " * n + "!") for n in range(40)]
    data = tokenize([Example(i, text, "x", "y") for i, text in enumerate(texts)], TOKENIZER, 120, 80, add_bos)
    alone = [encode_prompts(byte_tokenizer(), [text], 80, add_bos) for text in texts]
    assert [data.part("prompt", i).tolist() for i in range(40)] == [ids for (ids,), _ in alone]
    long = sum(len(text) + add_bos > 80 for text in texts)
    assert data.counts["prompts_cut"] == sum(cut for _, cut in alone) == long > 20
    for text, ((ids,), _) in zip(texts, alone, strict=True):
        assert len(ids) <= 80 and ids[: int(add_bos)] == [TOKENIZER.bos_token_id] * add_bos
        assert TOKENIZER.decode(ids[add_bos:]) == shorten(text, 80 - add_bos, len)


def test_missing_bos_error_names_the_setting():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no BOS token; set add_bos=false"):
        encode_prompts(tokenizer, ["a"], 10, add_bos=True)


ANSWERS = [("", "", 1), ("abcde", "abcde", 1), ("abcdef", "abcdef", 0), ("abcdefgh", "abcdef", 0)]


@pytest.mark.parametrize(("answer", "kept", "ends"), [*ANSWERS, ("</s>", "</s>", 1)])
def test_answer_ends_in_eos_if_both_fit(answer, kept, ends):
    """With room for 6 tokens: 5 and the EOS, or 6 without; an EOS spelt out in the text is ordinary text."""
    letters = encode(TOKENIZER, [kept])[0]
    data = tokenize([Example(0, "Q: A", answer, "x" + answer)], TOKENIZER, 10, 4)
    assert data.part("target", 0).tolist() == letters + [TOKENIZER.eos_token_id] * ends
    assert TOKENIZER.eos_token_id not in letters
    assert (data.counts["targets_cut"], data.counts["negatives_cut"]) == (1 - ends, len(answer) > 4)
    assert len(data.part("prompt", 0)) == 4 and len(data.part("negative", 0)) == min(len(answer) + 2, 6)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Calls tokenize_cached with changed settings; returns (data, number of calls of tokenize)."""
    calls = []
    real = tokenization.tokenize
    monkeypatch.setattr(tokenization, "tokenize", lambda *args: calls.append(args) or real(*args))
    keys = {"output_dir": tmp_path, "max_length": 60, "max_prompt_length": 30, "add_bos": False}

    def run(tokenizer=TOKENIZER, texts=("Why?", "Because.", "No."), **changed):
        before = len(calls)
        examples = [Example(0, *texts), Example(1, "How?", "So.", "No." if texts[2] else None)]
        data = tokenize_cached(examples, "name", tokenizer, SimpleNamespace(**keys | changed))
        return data, len(calls) - before

    return run


def equal(one, two):
    pairs = [(one.ids, two.ids), (one.offsets, two.offsets)]
    same = all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in pairs)
    return same and one.counts == two.counts


def with_special(**tokens):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def test_second_call_reads_the_cache(cached):
    (first, one), (again, none) = cached(), cached(tokenizer=byte_tokenizer())
    assert (one, none) == (1, 0) and equal(first, again) and first.key == again.key


TEXTS = [("Who?", "Because.", "No."), ("Why?", "So.", "No."), ("Why?", "Because.", "Hm.")]
CHANGES = [{"texts": texts} for texts in [*TEXTS, ("Why?", "Because.", None)]]
CHANGES += [{"max_length": 61}, {"max_prompt_length": 29}, {"add_bos": True}]


@pytest.mark.parametrize("changed", [*CHANGES, {"tokenizer": with_special(eos_token=PAD)}])
def test_change_of_text_length_or_tokenizer_makes_a_new_cache(cached, changed):
    """The old cache file stays valid."""
    old = cached()[0]
    new, calls = cached(**changed)
    assert calls == 1 and new.key != old.key and cached()[1] == 0


def test_change_of_bos_makes_a_new_cache(cached):
    cached(add_bos=True)
    assert cached(add_bos=True, tokenizer=with_special(bos_token=PAD))[1] == 1


def test_tokenizer_fingerprint_ignores_padding_state():
    used = byte_tokenizer()
    used(["a", "bcd"], padding=True)
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(byte_tokenizer())


def test_truncated_cache_never_gives_wrong_ids(cached, tmp_path):
    whole = cached()[0]
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with contextlib.suppress(SafetensorError, UserError):
            assert equal(cached()[0], whole)


def test_binary_search_drops_as_few_turns_as_a_linear_one():
    rng = random.Random(0)
    for _ in range(200):
        turns = [f"\n\nHuman: {'x' * rng.randrange(9)}\n\nAssistant: y" for _ in range(rng.randrange(2, 12))]
        text, limit = "".join(turns), rng.randrange(40, 300)
        suffixes = ["".join(turns[i:]) for i in range(len(turns))]
        kept = next((rest for rest in suffixes if len(rest) <= limit), suffixes[-1])
        if len(kept) <= limit:
            assert prompts.shorten(text, limit, len) == kept


def test_dialogue_is_rendered_like_single_turns():
    """Empty turns keep their headers; the system message comes first."""
    turns = [(True, "a"), (False, ""), (True, "b")]
    text = "\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: "
    assert prompts.render_dialogue(turns) == text
    assert prompts.render_dialogue([(True, "a")], system="S") == prompts.render("a", system="S")
    assert prompts.template_stops() == ["\n\nHuman"]
