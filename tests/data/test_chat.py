"""The model's own chat template: ids as other engines make them, marks, BOS, EOS, shortening."""

import pytest
from chatty import CHATML, END, START, chatml_tokenizer

from ram.data import prompts, tokenization
from ram.data.chat import ChatTemplate
from ram.data.tokenization import Example, encode, encode_prompts, tokenize
from ram.errors import UserError

DIALOGUE = [(True, "Why?"), (False, "So."), (True, "  Oh? é 世 ")]


@pytest.fixture
def chat():
    return ChatTemplate(chatml_tokenizer())


def messages(turns, system=None):
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": "user" if user else "assistant", "content": text} for user, text in turns]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("turns", [[(True, "Why?")], DIALOGUE, [(True, "")]])
def test_ids_are_those_of_the_tokenizers_template(chat, turns, system):
    """Marks are special tokens, in a template that trims the texts."""
    tokenizer = chat.tokenizer
    expected = tokenizer.apply_chat_template(
        messages(turns, system), add_generation_prompt=True, return_dict=False
    )
    ids = encode(tokenizer, [chat.render(turns, system)])[0]
    assert ids == expected
    start = tokenizer.convert_tokens_to_ids(START)
    assert ids[0] == start and ids.count(start) == len(turns) + 2


def test_marks_of_users_are_text(chat):
    """A user who writes a mark ends no turn."""
    spelt = f"a{END}b{START}"
    ids = encode(chat.tokenizer, [chat.render([(True, spelt)])])[0]
    end = chat.tokenizer.convert_tokens_to_ids(END)
    assert ids.count(end) == 2  # of the system message and of the user's turn
    plain = encode(chat.tokenizer, [spelt])[0]
    assert any(ids[i : i + len(plain)] == plain for i in range(len(ids)))


def test_begun_answer_is_continued(chat):
    asked = chat.render([(True, "Why?")])
    begun = chat.render([(True, "Why?"), (False, f"Well{END}")])
    assert begun == asked + f"Well{END}"
    expected = encode(chat.tokenizer, [asked])[0] + encode(chat.tokenizer, [f"Well{END}"])[0]
    assert encode(chat.tokenizer, [begun])[0] == expected


def test_template_ends_answers_by_its_mark(chat):
    """The tokenizer's EOS was </s>, which the template never writes."""
    end = chat.tokenizer.convert_tokens_to_ids(END)
    assert chat.end_id == chat.tokenizer.eos_token_id == end
    data = tokenize([Example(0, chat.render([(True, "a")]), "b")], chat.tokenizer, 200, 100)
    assert list(data.part("target", 0)) == [*encode(chat.tokenizer, ["b"])[0], end]


@pytest.mark.parametrize(("start", "count"), [("<s>", 1), ("", 1)])
def test_bos_is_never_doubled(start, count):
    """A template may write BOS itself; `add_bos` adds it to others."""
    tokenizer = chatml_tokenizer(start + CHATML)
    prompt = ChatTemplate(tokenizer).render([(True, "a")])
    (ids,), _ = encode_prompts(tokenizer, [prompt], 200, add_bos=True)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == count


def test_long_dialogue_loses_its_oldest_turns_then_the_end_of_its_question(chat):
    turns = [(True, "x" * 30), (False, "y"), (True, "z" * 40)]
    whole, newest = (len(encode(chat.tokenizer, [chat.render(turns[i:])])[0]) for i in (0, 2))
    for limit, kept in (
        (whole, turns),
        (whole - 1, turns[2:]),
        (newest, turns[2:]),
        (newest - 5, [(True, "z" * 35)]),
    ):
        (ids,), n_cut = encode_prompts(chat.tokenizer, [chat.render(turns)], limit)
        assert ids == encode(chat.tokenizer, [chat.render(kept)])[0]
        assert n_cut == (kept is not turns)
    with pytest.raises(UserError, match="chat template of .* needs"):
        encode_prompts(chat.tokenizer, [chat.render(turns)], 10)


def test_correction_follows_the_rendered_prompt(chat):
    prompt = prompts.corrector(chat.render([(True, "a")]), "b")
    assert str(prompt).endswith("assistant\nb\n\nCorrection: ")
    ids = encode(chat.tokenizer, [prompt])[0]
    asked = encode(chat.tokenizer, [chat.render([(True, "a")])])[0]
    assert ids == asked + encode(chat.tokenizer, ["b\n\nCorrection: "])[0]


def test_correctors_prompt_is_shortened_from_its_answer_on(chat):
    """The request for a correction stays, then as much of the question as fits, then of the answer."""

    def prompt(question, answer):
        return prompts.corrector(chat.render([(True, question)]), answer)

    question, answer = "q" * 20, "a" * 30
    whole = len(encode(chat.tokenizer, [prompt(question, answer)])[0])
    for cut, kept in ((0, (20, 30)), (1, (20, 29)), (30, (20, 0)), (35, (15, 0)), (50, (0, 0))):
        (ids,), n_cut = encode_prompts(chat.tokenizer, [prompt(question, answer)], whole - cut)
        assert ids == encode(chat.tokenizer, [prompt(question[: kept[0]], answer[: kept[1]])])[0]
        assert n_cut == (cut > 0)
    with pytest.raises(UserError, match="chat template of .* needs"):
        encode_prompts(chat.tokenizer, [prompt(question, answer)], whole - 51)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: set template=ram"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "begins with no special token"),
        ("{{ raise_exception('no roles') }}", "no roles"),
    ],
)
def test_unusable_template_is_refused(template, words):
    with pytest.raises(UserError, match=words):
        ChatTemplate(chatml_tokenizer(template))


def test_date_of_a_template_is_fixed():
    """The prompts, and with them all ids, would change every day."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%f') %}{% endif %}"
    chat = ChatTemplate(chatml_tokenizer(dated + CHATML + "{{ date_string }}"))
    assert str(chat.render([(True, "a")])).endswith("26 Jul 2024")


def test_dialogues_in_template_ram_are_parsed():
    text = prompts.render_dialogue([(True, "a"), (False, "b"), (True, "c")], system="S")
    assert prompts.parse_dialogue(text) == ("S", [(True, "a"), (False, "b"), (True, "c")])
    assert prompts.parse_dialogue("POST: x\nTL;DR:") == (None, [(True, "POST: x\nTL;DR:")])


def test_space_at_the_end_is_noted_once(chat, caplog, monkeypatch):
    monkeypatch.setattr(tokenization, "_noted", [])
    encode_prompts(chat.tokenizer, [chat.render([(True, "a")])], 200)
    assert not caplog.records
    for _ in range(2):
        encode_prompts(chat.tokenizer, [prompts.render("a")], 200)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "end in a space that is a token of its own" in caplog.text
