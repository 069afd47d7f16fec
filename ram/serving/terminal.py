"""A chat with a proposal and its aligners in a terminal, or over a pipe.

/aligner [NAME]     continues with another model    /compare [QUESTION]   the proposal's answer and a pair's
/set [KEY=VALUE]    changes a setting; alone: shows them; /set KEY= takes the default again
/reset              forgets the dialogue            /quit, Ctrl-D         ends the chat
/help               prints these lines              Ctrl-C                stops an answer, keeps its text
"""

import contextlib
import difflib
import io
import json
import queue
import secrets
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ram.answers.influence import remark
from ram.data.text import token_texts
from ram.decoding.par import MODEL_KEYS
from ram.decoding.requests import BadRequest, EngineError, UnknownAligner
from ram.errors import UserError, nearest
from ram.serving.loop import Done, Piece
from ram.serving.registry import Models
from ram.settings.serving import PROPOSAL

Turns = Sequence[tuple[bool, str]]  # each: whether it is the user's, text
Marked = list[tuple[str, bool]]  # pieces of a text, each with whether it differs from the other answer
KEPT = "\n\t\u200c\u200d"  # not printable to Python, but part of texts: the joiners of Persian and of emoji
COMMANDS = ("/aligner", "/compare", "/set", "/reset", "/quit", "/help")
OF_PAIRS = ("sample_mode", *MODEL_KEYS)  # keys that the proposal alone does not have
OWN_KEYS = ("max_new_tokens", "seed")  # of /set, beside those of the next-token distribution
MIN_WIDTH = 28  # columns of an answer; in a narrower terminal the answers are shown one below the other


class Chat:
    """One dialogue.

    Args:
        models: The proposal and its aligners.
        output: The stream to write to.
        fancy: The output is a terminal: use colours and columns instead of plain lines.
    """

    def __init__(self, models: Models, output: TextIO, fancy: bool) -> None:
        self.models, self.output, self.fancy = models, output, fancy
        self.name = next((name for name in models.served if name != PROPOSAL), PROPOSAL)
        self.turns: list[tuple[bool, str]] = []
        self.given: dict[str, Any] = {}  # the keys that /set has changed
        self.ended: dict[str, Done] = {}  # the end of each model's latest answer

    def write(self, text: str) -> None:
        """Write a text at once."""
        self.output.write(text)
        self.output.flush()

    # ---- answers -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def answer(self, name: str, turns: Turns, seed: int) -> Iterator[Iterator[Piece]]:
        """Decode an answer; its pieces are yielded as they arrive. Leaving the context cancels it.

        Raises:
            EngineError: If the request is refused, or decoding fails.
        """
        models, served = self.models, self.models.find(name)
        new = models.new_tokens(self.given.get("max_new_tokens"))
        ids = models.encode_dialogue(served, turns, None, new)
        stops = {"stop": served.stops, "stop_token_ids": served.stop_ids}
        (request,) = models.requests(served, [ids], models.law(self.law(name)), new, seed, **stops)
        events: queue.SimpleQueue[Piece | Done] = queue.SimpleQueue()

        def pieces() -> Iterator[Piece]:
            while not isinstance(event := events.get(), Done):
                yield event
            if event.finish_reason == "error":
                raise EngineError(event.error or "decoding failed")
            self.ended[name] = event

        ticket = models.engine.submit(request, events.put)
        try:
            yield pieces()
        finally:
            models.engine.cancel(ticket)

    def law(self, name: str) -> dict[str, Any]:
        """The keys of the next-token distribution that /set has changed and that a model has."""
        skipped = {*OWN_KEYS, *(OF_PAIRS if name == PROPOSAL else ())}
        return {key: value for key, value in self.given.items() if key not in skipped}

    def seed(self) -> int:
        """The seed that was set, or a new one."""
        seed = self.given.get("seed", self.models.settings.config.seed)
        return secrets.randbits(32) if seed is None else seed

    def say(self, text: str) -> None:
        """Ask a question and write its answer.

        Ctrl-C stops the answer. If nothing of it was written yet, the question is forgotten.
        """
        turns, answer, end = [*self.turns, (True, text)], "", "\n"
        self.write(f"{self.name}> ")
        try:
            with self.answer(self.name, turns, self.seed()) as pieces:
                for piece in pieces:
                    answer += piece.text
                    self.write(printable(piece.text))
        except EngineError as error:
            self.write(f"not answered: {error}\n")
            return
        except KeyboardInterrupt:
            if not answer:
                self.write("(stopped; the question is forgotten)\n")
                return
            end = " (stopped)\n"
        self.turns = [*turns, (False, answer)]
        self.write(end)
        if end == "\n":
            self.write_remark(self.name)

    def write_remark(self, name: str) -> None:
        """Write a line if the aligner of a pair changed next to nothing of its latest answer."""
        ended = self.ended[name]
        if name != PROPOSAL and (line := remark(ended.n_completion, ended.stats)):
            self.write(f"({line})\n")

    def compare(self, question: str) -> None:
        """Write the proposal's and a pair's answer to a question, or to the last one if it is empty.

        Neither answer becomes part of the dialogue.
        """
        other = self.name
        if other == PROPOSAL:
            other = next((name for name in self.models.served if name != PROPOSAL), None)
        turns = [*self.turns, (True, question)] if question else self.turns[:-1]
        if other is None or not turns:
            reason = "no aligner is loaded" if turns else "ask something first"
            self.write(f"nothing to compare: {reason}\n")
            return
        seed, names = self.seed(), (PROPOSAL, other)
        marking = "reversed" if self.fancy else "in brackets"
        self.write(f"({PROPOSAL} and {other}; {marking}: tokens that the other answer does not have)\n")
        try:
            with contextlib.ExitStack() as stack:  # both are decoded at the same time
                running = [stack.enter_context(self.answer(name, turns, seed)) for name in names]
                answers = [list(pieces) for pieces in running]
        except EngineError as error:
            self.write(f"not answered: {error}\n")
            return
        ids = [[token for piece in pieces for token in piece.token_ids] for pieces in answers]
        texts = ["".join(piece.text for piece in pieces) for pieces in answers]
        if ids[0] == ids[1]:
            self.write(f"{printable(texts[0])}\n(both answers are the same, token by token)\n")
            self.write_remark(other)
            return
        marked: list[Marked] = []
        for token_ids, text, changed in zip(ids, texts, differing(ids[0], ids[1]), strict=True):
            pieces = token_texts(self.models.tokenizer, token_ids, text)
            marked.append([(piece, index in changed) for index, piece in enumerate(pieces)])
        if self.fancy:
            self.show_columns(names, marked)
        else:
            for name, pieces in zip(names, marked, strict=True):
                self.write(f"{name}: {bracketed(pieces)}\n")
        self.write_remark(other)

    def show_columns(self, names: Sequence[str], answers: Sequence[Marked]) -> None:
        """Write two answers side by side, or one below the other if the terminal is narrow."""
        console = Console(file=self.output, force_terminal=True, color_system="standard", highlight=False)
        texts = [Text.assemble(*(highlighted(piece) for piece in answer)) for answer in answers]
        if (console.width - 3) // 2 < MIN_WIDTH:
            for name, text in zip(names, texts, strict=True):
                console.print(Text(f"{name}:"), text, sep="\n")
            return
        table = Table(box=box.ASCII, show_edge=False, expand=True, header_style="")
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*texts)
        console.print(table)

    # ---- commands ------------------------------------------------------------------------------------------

    def defaults(self) -> dict[str, Any]:
        """The value of every key of /set unless it is changed."""
        known = self.models.defaults()
        return {"max_new_tokens": known.pop("max_tokens")} | known

    def set(self, argument: str) -> None:
        """Change a setting, `key=value`; take its default again, `key=`; or show all, an empty argument."""
        defaults = self.defaults()
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not argument:
            shown = [shown_setting(key, self.given.get(key, default)) for key, default in defaults.items()]
            self.write(textwrap.fill("  ".join(shown), 100, break_on_hyphens=False) + "\n")
            return
        if key not in defaults:
            self.write(f"unknown setting {key!r}: {nearest(key, list(defaults))}\n")
            return
        if not equals:
            self.write(f"{shown_setting(key, self.given.get(key, defaults[key]))}\n")
            return
        given = {other: known for other, known in self.given.items() if other != key}
        if value:
            given[key] = parsed(value)
        before, self.given = self.given, given
        try:
            self.check_settings()
        except EngineError as error:
            self.given = before
            self.write(f"not set: {error}\n")
            return
        now = shown_setting(key, given.get(key, defaults[key]))
        default = shown_setting(key, defaults[key]).partition("=")[2]
        unused = "; the proposal alone does not use it" if self.name == PROPOSAL and key in OF_PAIRS else ""
        self.write(f"({now}; default {default}{unused})\n")

    def check_settings(self) -> None:
        """Raise EngineError if a setting is out of bounds."""
        self.models.law({key: value for key, value in self.given.items() if key not in OWN_KEYS})
        for key, least in (("max_new_tokens", 1), ("seed", 0)):
            value = self.given.get(key, least)
            if type(value) is not int or not least <= value < 1 << 63:
                raise BadRequest(f"{key}={value}: expected a whole number of at least {least}")
        self.models.new_tokens(self.given.get("max_new_tokens"))

    def command(self, line: str) -> bool:
        """Run a command; returns whether the chat continues."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/help":
            self.write((__doc__ or "").partition("\n\n")[2])
        elif word == "/reset":
            self.turns = []
            self.write("(forgotten)\n")
        elif word == "/compare":
            self.compare(rest.strip())
        elif word == "/set":
            self.set(rest.strip())
        elif word == "/aligner":
            try:
                self.name = self.models.find(rest.strip() or self.name).name
                self.write(f"(talking to {self.name}; there are: {', '.join(self.models.served)})\n")
            except UnknownAligner as error:
                self.write(f"{error}\n")
        else:
            self.write(f"unknown command {word!r}: {nearest(word, COMMANDS)}\n")
        return True

    def run(self, lines: Iterable[str]) -> None:
        """Hold the whole dialogue, given the lines that the user types."""
        for line in lines:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.say(line)
            except KeyboardInterrupt:  # Ctrl-C never ends the chat
                self.write("(stopped)\n")


def typed_lines(chat: Chat) -> Iterator[str]:
    """Read lines from a terminal, with editing, until Ctrl-D; Ctrl-C clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (its import lets input() edit lines and remember them)
    while True:
        try:
            yield input("you> ")
        except KeyboardInterrupt:
            chat.write("\n(Ctrl-D or /quit leaves)\n")
        except EOFError:
            chat.write("\n")
            return


def check_streams() -> None:
    """Raise UserError if standard input or output is closed."""
    if sys.stdin is None or sys.stdout is None:
        raise UserError("chat: standard input or output is closed; give a terminal, a pipe or a file")


def run(models: Models) -> None:
    """Chat until the user leaves."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # background jobs of a script start with it ignored
    for stream in (sys.stdin, sys.stdout):  # bytes that are not text must not end the chat
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    fancy = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(models, sys.stdout, fancy)
    try:
        if fancy:
            chat.write(f"talking to {chat.name}; there are: {', '.join(models.served)}; /help\n")
        chat.run(typed_lines(chat) if fancy else sys.stdin)
    finally:
        models.engine.close(wait=False)


# ---- showing answers and settings --------------------------------------------------------------------------


def parsed(value: str) -> Any:
    """A value as JSON has it; any other text is itself."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def shown_setting(key: str, value: Any) -> str:
    """A setting as /set takes it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def printable(text: str) -> str:
    """A text without characters that control a terminal or change the direction of a line."""
    return "".join(
        c if c.isprintable() or c in KEPT or unicodedata.category(c) == "Zs" else "\ufffd" for c in text
    )


def highlighted(piece: tuple[str, bool]) -> tuple[str, str]:
    """A piece of an answer as rich's text and style."""
    text, marked = piece
    return printable(text).replace("\t", " "), "reverse" if marked else ""


def differing(first: Sequence[int], second: Sequence[int]) -> tuple[set[int], set[int]]:
    """The positions of each sequence that the longest common blocks leave out."""
    changed = set(range(len(first))), set(range(len(second)))
    for a, b, size in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        changed[0].difference_update(range(a, a + size))
        changed[1].difference_update(range(b, b + size))
    return changed


def bracketed(pieces: Marked) -> str:
    """A text on one line, with the marked pieces in brackets."""
    text = "".join(f"[{printable(text)}]" if marked and text else printable(text) for text, marked in pieces)
    return text.replace("][", "").replace("\n", " / ")
