"""Every prompt's exact text, and what is left of one that is too long."""

import random
import re
from types import SimpleNamespace

import pytest
from fastchat.conversation import Conversation, SeparatorStyle, get_conv_template

import prompts
from prompts import ASSISTANT, corrector, from_record, render, shorten
from utils import UserError

HUMAN = "\n\nHuman: "
TAILS = [ASSISTANT, "\n\nAssistant:", "\nTL;DR:", " TL;DR:", "\nTL;DR:\n\nAssistant: ", "\n\nCorrection: "]
TAILS += ["\n\nTL;DR:" + ASSISTANT, "\n\n### Correction:\n"]
COUNTERS = {
    "characters": len,
    "bytes": lambda text: len(text.encode()),
    "words": lambda text: len(re.findall(r"\w+|\s|[^\w\s]", text)),
    # As with merges of a real tokenizer, a longer text can have fewer tokens: "Assistan" 8, "Assistant" 1.
    "merging": lambda text: len(re.findall(r"\n\nHuman: |Assistant|TL;DR:|the |\n\n|.", text, re.DOTALL)),
}
NASTY = {
    "plain": "Why is the sky blue?",
    "spaces at both ends": "  why? \n",
    "braces and percent": "{instruction} %s {0} \\n",
    "another alphabet": "空はなぜ青いの? Почему?",
    "emoji of several code points": "👩‍👩‍👧‍👦 e\u0301 \u202eabc",
    "our own headers": f"Translate:{HUMAN}hello{ASSISTANT}hi",
    "a special token's spelling": "</s><|endoftext|><s>",
    "a template's words": "USER: x ASSISTANT: y TL;DR:",
}


def dialogue(*turns, lead=""):
    """Turns of (question, answer); an answer of None leaves the turn open, without a tail."""
    texts = [f"{HUMAN}{ask}" + ("" if answer is None else f"{ASSISTANT}{answer}") for ask, answer in turns]
    return [lead, *texts] if lead else texts


# ---- rendering ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY.values(), ids=list(NASTY))
def test_a_prompt_is_the_instruction_between_two_headers(text):
    """The instruction stands in the project's template letter by letter, and only once."""
    assert render(text) == f"\n\nHuman: {text}\n\nAssistant: "


@pytest.mark.parametrize("text", NASTY.values(), ids=list(NASTY))
def test_a_prompt_is_what_fastchat_makes_of_it(text):
    """An independent conversation of style ADD_COLON_SPACE_SINGLE gives the same text."""
    style = SeparatorStyle.ADD_COLON_SPACE_SINGLE
    own = Conversation("own", roles=("Human", "Assistant"), messages=[], sep_style=style, sep="\n\n")
    own.append_message("Human", text)
    own.append_message("Assistant", None)
    assert render(text) == own.get_prompt()


@pytest.mark.xfail(strict=True, reason="FastChat takes an empty message for an open turn and drops its end")
def test_an_empty_instruction_keeps_both_headers():
    """An empty instruction is an empty question, not a dialogue without one."""
    assert render("") == "\n\nHuman: \n\nAssistant: "


def test_a_system_message_comes_first():
    """A system message is a paragraph of its own before the dialogue."""
    assert render("Why?", system="Be brief.") == "Be brief.\n\nHuman: Why?\n\nAssistant: "


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["vicuna_v1.1", "llama-2", "zero_shot"])
def test_any_template_of_fastchat_can_be_named(name, system):
    """Another template is rendered exactly as FastChat renders it, with or without a system message."""
    theirs = get_conv_template(name)
    if system:
        theirs.set_system_message(system)
    theirs.append_message(theirs.roles[0], "Why?")
    theirs.append_message(theirs.roles[1], None)
    assert render("Why?", name, system) == theirs.get_prompt()


def test_the_vicuna_template_is_not_ours():
    """Naming a template changes the text, down to the header that asks for the answer."""
    assert render("Why?", "vicuna_v1.1").endswith(" USER: Why? ASSISTANT:")


def test_an_unknown_template_names_the_nearest():
    """A misspelt template is a one-line mistake of the user with the likely name in it."""
    with pytest.raises(UserError, match=r"\Aunknown template 'vicuna_v1.2': did you mean 'vicuna_v1.1'\?\Z"):
        render("Why?", "vicuna_v1.2")


def test_rendering_leaves_nothing_behind():
    """A prompt does not depend on the prompts and system messages before it."""
    render("first", system="Be brief.")
    render("second")
    assert render("Why?") == "\n\nHuman: Why?\n\nAssistant: "


def test_the_corrector_asks_after_the_answer():
    """The Aligner baseline reads the dialogue, the answer and the request, with nothing in between."""
    assert corrector(render("Why?"), "No idea.") == ("\n\nHuman: Why?\n\nAssistant: No idea.\n\nCorrection: ")


# ---- records -----------------------------------------------------------------------------------------------


def settings(**changed):
    """The `sampling` keys that decide a prompt, at their shipped values."""
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
        ({"multiround": True}, "Why?"),
        ({"multiround": True, "input_key": "question"}, "How?"),
        ({"for_aligner": True}, "\n\nHuman: Why?\n\nAssistant: No idea.\n\nCorrection: "),
        ({"for_aligner": True, "output_key": "draft"}, "\n\nHuman: Why?\n\nAssistant: Hm.\n\nCorrection: "),
        ({"for_aligner": True, "multiround": True}, "Why?No idea.\n\nCorrection: "),
    ],
)
def test_a_record_becomes_a_prompt_as_the_settings_say(changed, expected):
    """Each key does what config.yaml says of it, alone and together with others."""
    record = {"instruction": "Why?", "question": "How?", "system": "Be brief.", "output": "No idea."}
    record["draft"] = "Hm."
    expected = render("Why?", "zero_shot") if expected is None else expected
    assert from_record(record, settings(**changed)) == expected


def test_a_dialogue_stays_as_it_is():
    """A multi-round record is not rendered again: its headers are already there."""
    whole = "".join(dialogue(("a", "b"), ("c", None))) + ASSISTANT
    assert from_record({"instruction": whole}, settings(multiround=True)) == whole


# ---- shortening --------------------------------------------------------------------------------------------

HALVES = [word[:n] for word in ("Human:", "Assistant:") for n in range(1, len(word) + 1)]
CUT_HEADER = re.compile(rf"\n\n({'|'.join(HALVES)})\Z")
CHARACTERS = [*"abc xyz.", "\n", "\n\n", "é", "空", "👩‍👧", "the ", "TL;DR", "Human: ", "Assistant: "]


def random_prompt(rng):
    """(turns without the tail, tail): one to five turns, perhaps after some text without any header."""

    def body(low, high):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(low, high)))
        # What reads as a header, or as space before one, is tested by itself below.
        return re.sub(r"\s+(Human|Assistant)", r" \1", text) + "."

    earlier = [(body(0, 20), body(0, 20)) for _ in range(rng.randrange(5))]
    lead = body(1, 20) if rng.random() < 0.3 else ""
    return dialogue(*earlier, (body(0, 40), None), lead=lead), rng.choice(TAILS)


def random_cases(seed, cases=400):
    """Random cases of (turns, tail, counter, limit) whose headers alone fit into the limit."""
    rng = random.Random(seed)
    for _ in range(cases):
        turns, tail = random_prompt(rng)
        count = rng.choice(list(COUNTERS.values()))
        least = count(HUMAN + tail)
        yield turns, tail, count, rng.randint(least, max(least, count("".join(turns) + tail)) + 3)


def test_a_shortened_prompt_fits_keeps_its_headers_and_stays_as_it_is():
    """400 random prompts: at most the limit, whole headers at both ends, and shortening twice is once."""
    for turns, tail, count, limit in random_cases(seed=0):
        prompt = "".join(turns) + tail
        short = shorten(prompt, limit, count)
        assert count(short) <= limit
        assert (short == prompt) == (count(prompt) <= limit)
        assert short.endswith(tail)
        assert short == prompt or short.startswith(HUMAN)
        assert not CUT_HEADER.search(short.removesuffix(tail))
        assert shorten(short, limit, count) == short


def test_the_oldest_turns_go_first():
    """400 random prompts: what is left is the longest run of last turns that fits, else a cut last turn."""
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


def test_no_more_is_cut_than_must_be():
    """A question counted in characters fills the limit to the last one."""
    for limit in range(len(HUMAN + ASSISTANT), 60):
        assert len(shorten(render("why? " * 20 + "!"), limit, len)) == limit


@pytest.mark.parametrize("tail", TAILS)
def test_headers_that_do_not_fit_alone_are_an_error(tail):
    """Just the headers are returned where only they fit; one token less raises and says how many it takes."""
    least = len(HUMAN + tail)
    assert shorten(f"{HUMAN}why?{tail}", least, len) == HUMAN + tail
    with pytest.raises(UserError, match=rf"\Amax_prompt_length={least - 1}: .* need {least} tokens"):
        shorten(f"{HUMAN}why?{tail}", least - 1, len)


@pytest.mark.parametrize(
    ("prompt", "limit", "expected"),
    [
        ("abcdefgh", 5, "abcde"),  # a raw instruction has no header
        ("", 0, ""),
        (f"post {'x' * 90}\nTL;DR:", 20, "post xxxxxxxx\nTL;DR:"),
        (f"{HUMAN}POST: {'x' * 90}\n\nTL;DR:{ASSISTANT}", 37, f"{HUMAN}POST: x\n\nTL;DR:{ASSISTANT}"),
        (f"{HUMAN}TL;DR: TL;DR:{'x' * 90}{ASSISTANT}", 30, f"{HUMAN}TL;DR: T{ASSISTANT}"),
        (f"{HUMAN}{ASSISTANT}", 23, f"{HUMAN}{ASSISTANT}"),
        (f"{HUMAN}say{HUMAN}hello{ASSISTANT}", 30, f"{HUMAN}hello{ASSISTANT}"),
        (f"Be brief.{HUMAN}hello{ASSISTANT}", 30, f"{HUMAN}hello{ASSISTANT}"),
        (f"{HUMAN}👩‍👧空空空{ASSISTANT}", 25, f"{HUMAN}👩‍👧{ASSISTANT}"),
        (f"{HUMAN}a\n\nb Human: c{ASSISTANT}", 27, f"{HUMAN}a\n\nb {ASSISTANT}"),
    ],
)
def test_nasty_texts_are_cut_where_one_would(prompt, limit, expected):
    """Texts without a header, with one inside, with several requests, with nothing to cut, in characters."""
    assert shorten(prompt, limit, len) == expected


@pytest.mark.xfail(strict=True, reason="the answer to be corrected is cut inside '\\n\\nAssistant: '")
def test_a_cut_corrector_prompt_has_no_half_header():
    """A cut that falls into the Assistant header before the answer takes all of that header away."""
    for limit in range(len(HUMAN + "\n\nCorrection: "), 50):
        short = shorten(corrector(render("Hi"), "No idea at all."), limit, len)
        assert not CUT_HEADER.search(short.removesuffix("\n\nCorrection: "))


@pytest.mark.xfail(strict=True, reason="all space before the closing header counts as part of it")
def test_space_at_the_end_of_a_question_can_be_cut():
    """A question that ends in many empty lines is shortened like any other, not refused."""
    short = shorten(f"{HUMAN}Hi{' ' * 200}{ASSISTANT}", 60, len)
    assert short.startswith(f"{HUMAN}Hi") and short.endswith(ASSISTANT) and len(short) <= 60


@pytest.mark.xfail(strict=True, reason="only the project's own headers are known to shorten")
def test_another_templates_closing_header_stays():
    """A shortened prompt of another template still ends in what asks for the answer."""
    assert shorten(render("x" * 400, "vicuna_v1.1"), 300, len).endswith(" ASSISTANT:")


def test_a_token_count_is_asked_for_a_few_times_only():
    """Halving finds the cut: a body of a million characters costs a few dozen counts, not one each."""
    asked = []
    shorten(render("x" * 1_000_000), 500, lambda text: asked.append(text) or len(text))
    assert len(asked) < 40


def test_the_stop_string_is_how_a_turn_begins():
    """What ends an answer is the start of the header that opens the user's next turn."""
    assert render("Why?").startswith(prompts.STOP)
