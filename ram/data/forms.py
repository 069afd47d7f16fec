"""The forms in which users keep their own data: a row of a file -> a dialogue with its answer.

| form | fields of a row |
|---|---|
| preferences | `chosen` and `rejected`, with `prompt`: texts or lists of messages |
| messages | `messages`: a list of {role, content}; the last one, the assistant's, is the answer |
| completions | `prompt` and `completion`: texts or lists of messages |
| instructions | `instruction` and `output`, optionally `input` |
| texts | `text` alone: language modelling, without a question or an end |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from ram.data import prompts

ACCEPTED = (
    "instruction and output (and input), prompt and completion, prompt, chosen and rejected, or messages "
    "(a list of {role, content}); or text alone"
)
PROMPT = "prompt_messages"  # key of the prompt in a test row of another form than instruction and output
USER, ASSISTANT, SYSTEM = ("user", "human"), ("assistant", "gpt"), ("system", "developer")
HUMAN = "\n\nHuman: "  # begins a dialogue as Anthropic HH writes it
Turns = tuple[tuple[bool, str], ...]


class Unusable(Exception):
    """A row that holds no dialogue with an answer; the message says why."""


@dataclass(frozen=True)
class Dialogue:
    """A row's prompt and answers.

    Attributes:
        turns: (whether the user speaks, text) for each turn before the answer.
        answer: The answer to learn, or the reference of a test row.
        rejected: The worse answer, if the row has one.
        system: The system message, if the row has one.
    """

    turns: Turns
    answer: str
    rejected: str | None = None
    system: str | None = None

    @property
    def question(self) -> str:
        """The prompt as one readable text: the only turn, or all turns with their roles."""
        if len(self.turns) == 1 and self.system is None:
            return self.turns[0][1]
        lines = [] if self.system is None else [f"System: {self.system}"]
        lines += [f"{'Human' if user else 'Assistant'}: {text}" for user, text in self.turns]
        return "\n\n".join(lines)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a list of {role, content}."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [{"role": "user" if user else "assistant", "content": text} for user, text in self.turns]
        return first + turns


def test_row(row: dict[str, Any], input_key: str, output_key: str) -> dict[str, Any]:
    """Return a test row with its question and reference under the keys that an evaluation reads.

    A row that has both as texts, and no `input` beside them, stays as it is. Others get `prompt_messages`.

    Raises:
        Unusable: See `read`.
    """
    context = row.get("input") if (input_key, output_key) == ("instruction", "output") else None
    has_both = isinstance(row.get(input_key), str) and isinstance(row.get(output_key), str)
    if has_both and not (isinstance(context, str) and context.strip()):
        return row
    dialogue = read(row)
    changed = {input_key: dialogue.question, output_key: dialogue.answer, PROMPT: dialogue.messages}
    if dialogue.rejected is not None:
        changed["rejected"] = dialogue.rejected
    return row | changed


def is_known(row: Mapping[str, Any]) -> bool:
    """Return whether a row has the fields of one of the forms, whatever is in them."""
    return is_text(row) or _is_dialogue(row)


def is_text(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a part of a text, or an empty one: `text`, and no other field with words."""
    texts = {name for name, value in row.items() if isinstance(value, str) and value.strip()}
    return isinstance(row.get("text"), str) and texts <= {"text"} and not _is_dialogue(row)


def _is_dialogue(row: Mapping[str, Any]) -> bool:
    forms = (("messages",), ("chosen", "rejected"), ("prompt", "completion"), ("instruction", "output"))
    return any(all(name in row for name in names) for names in forms)


def read(row: Mapping[str, Any]) -> Dialogue:
    """Return the dialogue of a row, by the first form whose fields it has.

    Raises:
        Unusable: It has no known form, no question or no answer.
    """
    if "chosen" in row and "rejected" in row:
        return _checked(_preference(row))
    if "messages" in row:
        system, turns = _dialogue(row["messages"], "messages")
        if not turns or turns[-1][0]:
            raise Unusable("messages do not end with one of the assistant: no answer")
        return _checked(Dialogue(turns[:-1], turns[-1][1], None, system))
    if "prompt" in row and "completion" in row:
        system, turns, answer = _answer(_prompt(row["prompt"]), row["completion"], "completion")
        return _checked(Dialogue(turns, answer, None, system))
    if "instruction" in row and "output" in row:
        instruction, context = _text(row["instruction"], "instruction"), row.get("input")
        if isinstance(context, str) and context.strip():
            instruction = f"{instruction}\n{context}"
        return _checked(Dialogue(((True, instruction),), _text(row["output"], "output")))
    raise Unusable(f"found the fields {', '.join(row) or '(none)'}; expected {ACCEPTED}")


def _checked(dialogue: Dialogue) -> Dialogue:
    if not dialogue.turns or not dialogue.turns[-1][0]:
        raise Unusable("no question of the user before the answer")
    if not dialogue.answer.strip():
        raise Unusable("an empty answer")
    return dialogue


def _preference(row: Mapping[str, Any]) -> Dialogue:
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row and row["prompt"]:
        prompt = _prompt(row["prompt"])
        system, turns, better = _answer(prompt, chosen, "chosen")
        *other, worse = _answer(prompt, rejected, "rejected")
        if other != [system, turns]:
            raise Unusable("chosen and rejected differ before their last message")
        return Dialogue(turns, better, worse, system)
    if isinstance(chosen, str) and isinstance(rejected, str):  # whole dialogues, as Anthropic HH has them
        better, worse = prompts.split_dialogue(chosen), prompts.split_dialogue(rejected)
        if better is None or worse is None or better[0] != worse[0]:
            raise Unusable("no prompt, and chosen and rejected are not two answers to one dialogue")
        system, turns = prompts.parse_dialogue(better[0])
        return Dialogue(tuple(turns), better[1], worse[1], system)
    system, better = _dialogue(chosen, "chosen")
    other, worse = _dialogue(rejected, "rejected")
    shared = commonprefix([better[:-1], worse[:-1]])
    if system != other or not shared or not len(shared) + 1 == len(better) == len(worse):
        raise Unusable("no prompt, and chosen and rejected differ before their last message")
    return Dialogue(tuple(shared), better[-1][1], worse[-1][1], system)


def _prompt(value: Any) -> tuple[str | None, Turns]:
    """Return the system message, or None, and the turns: of messages, a dialogue as in HH, or a question."""
    if not isinstance(value, str):
        return _dialogue(value, "prompt")
    if value.startswith(HUMAN) and value.rstrip().endswith(prompts.ASSISTANT.rstrip()):
        system, turns = prompts.parse_dialogue(value.rstrip() + " ")
        return system, tuple(turns)
    return None, ((True, value),)


def _answer(prompt: tuple[str | None, Turns], value: Any, name: str) -> tuple[str | None, Turns, str]:
    """Return the system message, the turns before an answer, and the answer.

    Args:
        prompt: The system message and the turns of the row's `prompt`.
        value: An answer as text, or a dialogue that ends with it. If the user speaks first in the dialogue,
            it is whole; if not, it follows the prompt.
        name: The field's name.

    Raises:
        Unusable: There is no answer, or the dialogue is another one than the prompt's.
    """
    system, turns = prompt
    if not isinstance(value, str):
        own_system, said = _dialogue(value, name)
    elif value.startswith(HUMAN):
        own_system, said = prompts.parse_dialogue(value)
    else:
        own_system, said = None, ((False, value.removeprefix(" ")),)
    if not said or said[-1][0]:
        raise Unusable(f"{name} does not end with a message of the assistant")
    before = tuple(said[:-1])
    if before and before[0][0]:
        asked, told = ([(user, text.strip()) for user, text in part] for part in (turns, before))
        if not any(told[start : start + len(asked)] == asked for start in range(len(told))):
            raise Unusable(f"the messages of {name} do not hold the prompt")
        turns = before
    else:
        turns += before
    if own_system is not None and system not in (None, own_system):
        raise Unusable(f"{name} has another system message than the prompt")
    return system if own_system is None else own_system, turns, said[-1][1]


def _dialogue(value: Any, name: str) -> tuple[str | None, Turns]:
    """Return the system message, or None, and the turns of a list of messages."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Unusable(f"{name} is not a list of {{role, content}}")
    system: str | None = None
    turns = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise Unusable(f"{name}[{number}] is not {{role, content}}")
        text, role = _text(message.get("content"), f"{name}[{number}].content"), message.get("role")
        if role in SYSTEM and number == 0:
            system = text
        elif role in USER or role in ASSISTANT:
            turns.append((role in USER, text))
        else:
            raise Unusable(f"{name}[{number}].role={role!r}: expected user or assistant, or system at first")
    return system, tuple(turns)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is not a text")
    return value
