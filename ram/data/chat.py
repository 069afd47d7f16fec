"""The model's own chat template (`template=chat`): the one place that renders prompts with it.

    turns -> ChatTemplate.render -> ChatPrompt -> ram.data.tokenization.encode -> ids

The ids are those of the tokenizer's `apply_chat_template`, so other engines read the same prompt. A mark such
as <|im_start|> is a special token if the template writes it, and ordinary text if a user does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from ram.data import prompts
from ram.data.prompts import Prompt
from ram.data.text import spelling
from ram.errors import UserError
from ram.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"  # the date that Llama's templates give if no clock is at hand
_noted: set[str] = set()  # the sources of which the log says that EOS was replaced
PLACE = "\0answer\0"  # stands for an answer while the end of a turn is looked up


class Unrenderable(UserError):
    """A dialogue that a chat template refuses, e.g. because its roles do not alternate."""


class ChatPrompt(Prompt):
    """A prompt that a chat template rendered; `own` excludes the marks that users spelt out.

    Attributes:
        chat: The template.
        turns: As in `ChatTemplate.render`.
        system: The system message, None for the template's own.
        added: Text after the rendered prompt: a begun answer, or the request for a correction.
    """

    chat: ChatTemplate
    turns: tuple[tuple[bool, str], ...]
    system: str | None
    added: str

    def followed_by(self, text: str) -> ChatPrompt:
        """Return the prompt with more text after it."""
        prompt = ChatPrompt(self + text, self.own)
        prompt.chat, prompt.turns, prompt.system = self.chat, self.turns, self.system
        prompt.added = self.added + text
        return prompt

    def shortened(self, max_tokens: int, count_tokens: Callable[[str], int]) -> ChatPrompt:
        """Return the prompt without its oldest turns; then the end of its last question is cut.

        Before the question, the answer in a corrector's prompt is cut. Its request for a correction stays.

        Args:
            max_tokens: The limit, in tokens.
            count_tokens: Returns the number of tokens of a prompt.

        Raises:
            UserError: If the template alone, with the system message, exceeds the limit.
        """

        def rest(start: int, question: str | None = None, added: str = self.added) -> ChatPrompt:
            turns = list(self.turns[start:])
            if question is not None:
                turns[0] = (turns[0][0], question)
            return self.chat.render(turns, self.system).followed_by(added)

        def longest(text: str, build: Callable[[str], ChatPrompt]) -> str | None:
            """Return the longest beginning of a text that fits; None if not even the empty one does."""
            fits, too_long = -1, len(text) + 1
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                if count_tokens(build(text[:middle])) <= max_tokens:
                    fits = middle
                else:
                    too_long = middle
            return None if fits < 0 else text[:fits]

        starts = [index for index, (user, _) in enumerate(self.turns) if user] or [0]
        first, last = 0, len(starts) - 1
        while first < last:  # the longest rest of the dialogue that fits, or the last question
            middle = (first + last) // 2
            if count_tokens(rest(starts[middle])) <= max_tokens:
                last = middle
            else:
                first = middle + 1
        prompt = rest(starts[last])
        if count_tokens(prompt) <= max_tokens:
            return prompt
        start, added = starts[last], self.added
        if request := prompts.asking(added):
            answer = longest(added.removesuffix(request), lambda text: rest(start, added=text + request))
            if answer is not None:
                return rest(start, added=answer + request)
            added = request
        question = self.turns[start][1] if self.turns else ""
        kept = longest(question, lambda text: rest(start, text, added))
        if kept is None:
            needed = count_tokens(rest(start, "", added))
            raise UserError(
                f"max_prompt_length={max_tokens}: the chat template of {self.chat.source} needs {needed} "
                "tokens without a question; raise it"
            )
        return rest(start, kept, added)


class ChatTemplate:
    """A tokenizer's chat template. The tokenizer's EOS becomes the mark that ends an assistant's turn.

    Args:
        tokenizer: Has `chat_template`; its `name_or_path` is named in messages.

    Attributes:
        text: The template's source.
        end_id: The special token that ends an assistant's turn.
        is_own_end: Whether it was the tokenizer's EOS before.

    Raises:
        UserError: If there is no template, or no special token ends the assistant's turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.source = tokenizer, tokenizer.name_or_path or "memory"
        if not tokenizer.chat_template:
            raise UserError(
                f"template=chat, but the tokenizer in {self.source} has no chat template: set template=ram, "
                "or model.tokenizer_name_or_path to a folder with the same vocabulary and a template"
            )
        # Templates that name a date would give another prompt every day.
        self.text = str(tokenizer.chat_template)
        has_date = "date_string" in self.text
        self.values: dict[str, Any] = {"date_string": DATE} if has_date else {}
        marks = sorted(filter(None, spelling(tokenizer).marks.values()), key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        end = self._end()
        self.is_own_end = end == tokenizer.eos_token
        if not self.is_own_end:
            if self.source not in _noted:
                log.info(f"template=chat: {end} ends an answer, not {tokenizer.eos_token} ({self.source})")
                _noted.add(self.source)
            tokenizer.eos_token = end
        self.end_id = cast(int, tokenizer.eos_token_id)

    def _end(self) -> str:
        """Return the special token that ends an assistant's turn."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PLACE}]
        after = self._apply(messages, False).rpartition(PLACE)[2].lstrip()
        if (mark := self.marks.match(after)) is None:
            raise UserError(
                f"template=chat: the chat template of {self.source} ends an answer by {after[:20]!r}, which "
                "begins with no special token, so answers could not end; set template=ram"
            )
        return mark[0]

    def _apply(self, messages: list[dict[str, str]], asks: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, **self.values
            )
            return str(text)
        except Exception as error:  # a template may raise anything, e.g. if roles do not alternate
            raise Unrenderable(
                f"the chat template of {self.source} cannot render a dialogue of the roles "
                f"{', '.join(message['role'] for message in messages)} ({error}); change the dialogue, or "
                "set template=ram"
            ) from None

    def render(self, turns: Sequence[tuple[bool, str]], system: str | None = None) -> ChatPrompt:
        """Render a dialogue up to the requested answer; a last turn by the assistant is to be continued.

        Args:
            turns: (whether the user speaks, text) for each turn.
            system: System message; None for the template's own.
        """
        *turns, begun = turns if turns and not turns[-1][0] else [*turns, (False, "")]
        written: list[str] = []  # marks that users spelt out, in order

        def hide(text: str) -> str:
            def placeholder(mark: re.Match[str]) -> str:
                written.append(mark[0])
                return f"\0{len(written) - 1}\0"

            return self.marks.sub(placeholder, text.replace("\0", ""))

        messages = [] if system is None else [{"role": "system", "content": hide(system)}]
        messages += [{"role": "user" if user else "assistant", "content": hide(text)} for user, text in turns]
        parts = re.split("\0(\\d+)\0", self._apply(messages, True))
        text, own = parts[0], [(0, len(parts[0]))]
        for index, part in zip(parts[1::2], parts[2::2], strict=True):
            text += written[int(index)]
            own.append((len(text), len(text) + len(part)))
            text += part
        prompt = ChatPrompt(text, own)
        prompt.chat, prompt.turns, prompt.system, prompt.added = self, tuple(turns), system, ""
        return prompt.followed_by(begun[1]) if begun[1] else prompt
