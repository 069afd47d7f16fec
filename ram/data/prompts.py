"""The only place where a record becomes the text a model reads: templates, corrector prompts, shortening.

FastChat's conversation templates carry the prompts; the project's own, `ram`, is registered here. FastChat is
imported inside the functions, so that decoding and training run where it is not installed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser

from ram.errors import UserError, nearest

TEMPLATE = "ram"
STOP = "\n\nHuman"  # where a model begins to speak for the user
ASSISTANT = "\n\nAssistant: "
SUMMARY = "\nTL;DR:"
CORRECTION = "\n\nCorrection: "
ALPACA_CORRECTION = "\n\n### Correction:\n"

# What must survive a cut: the opening header of a turn, and what asks the model to answer.
_TURN = re.compile(r"(?=\n\nHuman: )")
_OPENING = re.compile(r"\A\n\nHuman: ")
_HEADER = re.compile(r"\n\n(?:Human|Assistant): ?")
_ASKING = r"(?:\n\nAssistant: ?|\n\nCorrection: |\n\n### Correction:\n)"
_CLOSING = re.compile(rf"(?:\s{{0,8}}TL;DR:\s{{0,8}})?{_ASKING}\Z|\s{{0,8}}TL;DR:\s{{0,8}}\Z")


def conversation_template(name: str = TEMPLATE):
    """A fresh FastChat conversation; raises UserError for a name that FastChat does not know."""
    from fastchat.conversation import (
        Conversation,
        SeparatorStyle,
        conv_templates,
        get_conv_template,
        register_conv_template,
    )

    if TEMPLATE not in conv_templates:
        # ADD_COLON_SPACE_SINGLE ends in "Assistant: "; ADD_COLON_SINGLE would lose the last space.
        style = SeparatorStyle.ADD_COLON_SPACE_SINGLE
        ours = Conversation(
            TEMPLATE, roles=("Human", "Assistant"), sep_style=style, sep="\n\n", stop_str=STOP
        )
        ours.messages = []
        register_conv_template(ours)
    if name not in conv_templates:
        raise UserError(f"unknown template {name!r}: {nearest(name, conv_templates)}")
    return get_conv_template(name)


def render(instruction: str, template: str = TEMPLATE, system: str | None = None) -> str:
    """One instruction as a single-turn prompt; `ram` gives "\\n\\nHuman: …\\n\\nAssistant: "."""
    return render_dialogue([(True, instruction)], template, system)


def render_dialogue(
    turns: Sequence[tuple[bool, str]], template: str = TEMPLATE, system: str | None = None
) -> str:
    """A dialogue up to the answer that is asked for; turns: (whether the user speaks, what is said)."""
    conversation = conversation_template(template)
    if system is not None:
        conversation.set_system_message(system)
    for user, text in turns:
        # FastChat takes an empty message for a turn that is still open: stand in for it.
        conversation.append_message(conversation.roles[0 if user else 1], text or "\0")
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt().replace("\0", "")


def template_stops(name: str = TEMPLATE) -> list[str]:
    """The strings at which answers in a template end."""
    stop = conversation_template(name).stop_str
    return [stop] if isinstance(stop, str) else list(stop or [])


def corrector(prompt: str, answer: str, request: str = CORRECTION) -> str:
    """The Aligner baseline's prompt: the dialogue, the answer to be corrected, the request."""
    return f"{prompt}{answer}{request}"


def from_record(record: Mapping, settings) -> str:
    """The prompt of a test record by the `sampling` settings: its text as it is (multiround) or rendered."""
    text = record[settings.input_key]
    if settings.multiround:
        prompt = text
    else:
        system = record[settings.system_key] if settings.system_key else None
        prompt = render(text, settings.template, system)
    return corrector(prompt, record[settings.output_key]) if settings.for_aligner else prompt


def shorten(prompt: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    """The prompt cut to at most `max_tokens` tokens at text level, so that every reader tokenises the same
    text.

    A dialogue loses its oldest turns first. What is still too long loses the end of its last human turn; the
    header that opens it and what asks for the answer ("\\n\\nAssistant: ", "TL;DR:", "\\n\\nCorrection: ")
    stay whole. Raises UserError where those alone do not fit.
    """
    if count_tokens(prompt) <= max_tokens:
        return prompt
    turns = [turn for turn in _TURN.split(prompt) if turn]
    first, last = 1, len(turns) - 1  # by halves: the oldest turn that a dialogue which fits can begin with
    while first < last:
        middle = (first + last) // 2
        if count_tokens("".join(turns[middle:])) <= max_tokens:
            last = middle
        else:
            first = middle + 1
    if len(turns) > 1 and count_tokens("".join(turns[last:])) <= max_tokens:
        return "".join(turns[last:])
    text = turns[-1]
    head = text[: opening.end()] if (opening := _OPENING.search(text)) else ""
    tail = text[closing.start() :] if (closing := _CLOSING.search(text, len(head))) else ""
    body = text[len(head) : len(text) - len(tail)]

    fits, too_long = (
        -1,
        len(body),
    )  # characters of the body: the largest count that fits is searched by halves
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
    for header in _HEADER.finditer(body):  # of an answer inside the body: whole or not at all
        if header.start() < fits < header.end():
            fits = header.start()
    return head + body[:fits] + tail


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag == "code":
            self.parts.append("<code>")
        elif tag in ("p", "li", "pre", "br", "blockquote"):
            self.parts.append("\n\n" if tag != "br" else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag == "code":
            self.parts.append("</code>")


def html_to_text(source: str) -> str:
    """The text of an HTML fragment: paragraphs apart by an empty line, <code> tags kept, the rest dropped."""
    parser = _Text()
    parser.feed(source)
    parser.close()
    return re.sub(r"[ \t]*\n(?:[ \t]*\n)+", "\n\n", "".join(parser.parts)).strip()


def split_dialogue(text: str) -> tuple[str, str] | None:
    """A dialogue as (all up to its last "\\n\\nAssistant: ", the last answer); None where there is none."""
    prompt, header, answer = text.rpartition(ASSISTANT.rstrip())
    return (prompt + ASSISTANT, answer.removeprefix(" ")) if header else None
