"""Prompt text: templates, corrector prompts, shortening. Nothing else turns a record into model input.

Prompts are rendered with FastChat's conversation templates; the project's own template, `ram`, is registered
here. FastChat is imported inside functions, so that decoding and training run without it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any, Self

from ram.errors import UserError, nearest

if TYPE_CHECKING:
    from fastchat.conversation import Conversation

    from ram.data.chat import ChatTemplate

TEMPLATE = "ram"
CHAT = "chat"  # the model's own template: ram/data/chat.py
STOP = "\n\nHuman"  # a model that writes this continues as the user
ASSISTANT = "\n\nAssistant: "
SUMMARY = "\nTL;DR:"
CORRECTION = "\n\nCorrection: "
ALPACA_CORRECTION = "\n\n### Correction:\n"

# Shortening keeps these parts whole: the header that opens a turn and the text that requests the answer.
_TURN = re.compile(r"(?=\n\nHuman: )")
_OPENING = re.compile(r"\A\n\nHuman: ")
_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
_HEADER = re.compile(r"\n\n(?:Human|Assistant): ?")
_ROLE = re.compile(r"\n\n(Human|Assistant): ?")
_ASKING = r"(?:\n\nAssistant: ?|\n\nCorrection: |\n\n### Correction:\n)"
_CLOSING = re.compile(rf"(?:\s{{0,8}}TL;DR:\s{{0,8}})?{_ASKING}\Z|\s{{0,8}}TL;DR:\s{{0,8}}\Z")


def conversation_template(name: str = TEMPLATE) -> Conversation:
    """Return a new FastChat conversation; raises UserError if FastChat does not know the name."""
    from fastchat.conversation import (
        Conversation,
        SeparatorStyle,
        conv_templates,
        get_conv_template,
        register_conv_template,
    )

    if TEMPLATE not in conv_templates:
        # ADD_COLON_SPACE_SINGLE ends in "Assistant: "; ADD_COLON_SINGLE would omit the last space.
        style = SeparatorStyle.ADD_COLON_SPACE_SINGLE
        ours = Conversation(
            TEMPLATE,
            roles=("Human", "Assistant"),  # pyright: ignore[reportArgumentType]
            sep_style=style,
            sep="\n\n",
            stop_str=STOP,
        )
        ours.messages = []
        register_conv_template(ours)
    if name not in conv_templates:
        raise UserError(f"unknown template {name!r}: {nearest(name, conv_templates)}")
    conversation = get_conv_template(name)
    if conversation.sep_style is None:
        raise UserError(
            f"template {name!r} has no text: it is of a model behind an API; give another template"
        )
    return conversation


def render(instruction: str, template: str = TEMPLATE, system: str | None = None) -> str:
    r"""Render one instruction as a prompt; `ram` gives "\n\nHuman: …\n\nAssistant: "."""
    return render_dialogue([(True, instruction)], template, system)


def render_dialogue(
    turns: Sequence[tuple[bool, str]], template: str = TEMPLATE, system: str | None = None
) -> str:
    """Render a dialogue up to the requested answer; a last turn by the assistant is to be continued.

    Args:
        turns: (whether the user speaks, text) for each turn.
        template: Name of a FastChat conversation template.
        system: System message; None for the template's own.

    Returns:
        A `Prompt` if the template is FastChat's: its own marks may be special tokens.
    """
    *turns, begun = turns if turns and not turns[-1][0] else [*turns, (False, "")]
    texts = [text.replace("\0", "") for _, text in turns]

    def rendered(texts: Sequence[str], system: str | None) -> str:
        conversation = conversation_template(template)
        if system is not None:
            conversation.set_system_message(system)
        user_role, assistant_role = list(conversation.roles)[:2]
        for (user, _), text in zip(turns, texts, strict=True):
            # FastChat renders an empty message as the turn to be answered, so a placeholder replaces it.
            conversation.append_message(user_role if user else assistant_role, text or "\0")
        conversation.append_message(assistant_role, None)  # pyright: ignore[reportArgumentType]
        return conversation.get_prompt()

    whole = rendered(texts, system).replace("\0", "")
    if template == TEMPLATE:
        return whole + begun[1]
    # Rendering placeholders shows which parts are the template's own.
    holders = [f"\0{index}\0" for index in range(len(texts))]
    parts = re.split("\0(\\d+)\0", rendered(holders, system and f"\0{len(texts)}\0"))
    text, own = "", []
    for part, holder in itertools.zip_longest(parts[::2], parts[1::2]):
        own.append((len(text), len(text) + len(part)))
        text += part + ("" if holder is None else [*texts, system or ""][int(holder)])
    return Prompt(whole + begun[1], own if text == whole else ())


class Prompt(str):
    """A rendered prompt that knows which of its parts are the template's own.

    Attributes:
        own: (begin, end) of each part in which special tokens may be spelt out; users' texts are never such.
    """

    own: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, own: Iterable[tuple[int, int]] = ()) -> Self:
        self = super().__new__(cls, text)
        self.own = tuple(own)
        return self

    def followed_by(self, text: str) -> Prompt:
        """Return the prompt with more text after it, which is not the template's own."""
        return Prompt(self + text, self.own)

    @property
    def has_marks(self) -> bool:
        """Whether the template's own parts have anything that looks like a special token."""
        return any(_MARK.search(self, start, end) for start, end in self.own)


def template_stops(name: str = TEMPLATE) -> list[str]:
    """Return the template's stop strings; a model's own template has none, since EOS ends its answers."""
    if name == CHAT:
        return []
    stop = conversation_template(name).stop_str
    return [stop] if isinstance(stop, str) else list(stop or [])


def template_stop_ids(name: str, marks: Collection[int]) -> list[int]:
    """Return the template's stop tokens, as far as they are special tokens of a vocabulary.

    Args:
        marks: The ids of the vocabulary's special tokens. Elsewhere the template's ids mean other tokens.
    """
    if name == CHAT:
        return []
    return [token for token in conversation_template(name).stop_token_ids or [] if token in marks]


def corrector(prompt: str, answer: str, request: str = CORRECTION) -> str:
    """Build the Aligner baseline's prompt: the dialogue, the answer to correct, the request."""
    added = f"{answer}{request}"
    return prompt.followed_by(added) if isinstance(prompt, Prompt) else prompt + added


def from_record(record: Mapping[str, Any], settings: Any, chat: ChatTemplate | None = None) -> str:
    """Build the prompt of a test record.

    Args:
        record: A row of a test file.
        settings: The `sampling` settings. If `multiround` is set, the record's text is already a whole
            dialogue in template `ram`.
        chat: The model's own template, if `settings.template` is "chat".
    """
    text = record[settings.input_key]
    messages = record.get("prompt_messages")  # of a user's own file, see ram/data/forms.py
    if settings.multiround and chat is None and messages is None:
        prompt = text
    else:
        system = record[settings.system_key] if settings.system_key else None
        turns = [(True, text)]
        if messages is not None:
            turns = [(one["role"] == "user", one["content"]) for one in messages if one["role"] != "system"]
            system = next((one["content"] for one in messages if one["role"] == "system"), system)
        elif settings.multiround:
            system, turns = parse_dialogue(text)
        prompt = chat.render(turns, system) if chat else render_dialogue(turns, settings.template, system)
    return corrector(prompt, record[settings.output_key]) if settings.for_aligner else prompt


def shorten(prompt: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    r"""Cut a prompt to at most `max_tokens` tokens; return the shortened text.

    The text is cut, not the token ids, so that every reader tokenises the same text. The oldest turns are
    dropped first. If the last turn alone is too long, its end is cut; its header and the text that requests
    the answer ("\n\nAssistant: ", "TL;DR:", "\n\nCorrection: ") stay whole.

    Args:
        prompt: One rendered prompt.
        max_tokens: The limit, in tokens.
        count_tokens: Returns the number of tokens of a text.

    Raises:
        UserError: If the headers alone exceed the limit.
    """
    if count_tokens(prompt) <= max_tokens:
        return prompt
    turns = [turn for turn in _TURN.split(prompt) if turn]
    # Binary search for the oldest turn from which the rest of the dialogue fits.
    first = 1
    last = len(turns) - 1
    while first < last:
        middle = (first + last) // 2
        if count_tokens("".join(turns[middle:])) <= max_tokens:
            last = middle
        else:
            first = middle + 1
    if len(turns) > 1 and count_tokens("".join(turns[last:])) <= max_tokens:
        return "".join(turns[last:])

    # The last turn alone is too long: keep its head and tail and cut the body between them.
    text = turns[-1]
    opening = _OPENING.search(text)
    head = text[: opening.end()] if opening else ""
    tail = asking(text[len(head) :])
    body = text[len(head) : len(text) - len(tail)]
    # Binary search for the largest number of body characters that fits.
    fits = -1
    too_long = len(body)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count_tokens(head + body[:middle] + tail) <= max_tokens:
            fits = middle
        else:
            too_long = middle
    if fits < 0:
        needed = count_tokens(head + tail)
        raise UserError(
            f"max_prompt_length={max_tokens}: the role headers of a prompt need {needed} tokens by themselves"
        )
    # A header inside the body, as in a corrector prompt, is kept whole or dropped.
    for header in _HEADER.finditer(body):
        if header.start() < fits < header.end():
            fits = header.start()
    return head + body[:fits] + tail


def asking(text: str) -> str:
    """Return the end of a text that requests the answer, "" if it has none."""
    closing = _CLOSING.search(text)
    return closing[0] if closing else ""


def split_turns(text: str) -> list[str]:
    """Split a dialogue in template `ram` into its opening and its turns, each with its answer."""
    return _TURN.split(text)


def parse_dialogue(text: str) -> tuple[str | None, list[tuple[bool, str]]]:
    """Split a dialogue in template `ram` into its system message, if any, and its turns.

    Returns:
        The system message or None, and (whether the user speaks, text) for each turn. A text without headers
        is one turn of the user. An empty last turn of the assistant, which requests the answer, is left out.
    """
    system, *parts = _ROLE.split(text)
    if not parts:
        return None, [(True, text)]
    turns = [(role == "Human", words) for role, words in zip(parts[::2], parts[1::2], strict=True)]
    if turns[-1] == (False, ""):
        turns.pop()
    return system.strip() or None, turns


class _TextParser(HTMLParser):
    """Collects the text of an HTML fragment in `parts`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "code":
            self.parts.append("<code>")
        elif tag in ("p", "li", "pre", "br", "blockquote"):
            self.parts.append("\n\n" if tag != "br" else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "code":
            self.parts.append("</code>")


def html_to_text(source: str) -> str:
    """Extract the text of an HTML fragment.

    Paragraphs are separated by an empty line, <code> tags are kept, all other tags are dropped.
    """
    parser = _TextParser()
    parser.feed(source)
    parser.close()
    return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(parser.parts)).strip()


def split_dialogue(text: str) -> tuple[str, str] | None:
    r"""Split a dialogue into (prompt, last answer); the prompt ends in "\n\nAssistant: ".

    Returns None if the text has no such header.
    """
    prompt, header, answer = text.rpartition(ASSISTANT.rstrip())
    if not header:
        return None
    return prompt + ASSISTANT, answer.removeprefix(" ")
