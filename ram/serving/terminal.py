"""Dialogues with a proposal and its aligners in a terminal, or over a pipe.

/aligner [NAME]     goes on with another model      /compare [QUESTION]   the proposal's answer and a pair's
/reset              forgets the dialogue            /quit, Ctrl-D         leaves
/help               these lines                     Ctrl-C                ends an answer; what was said stays
"""

import contextlib
import difflib
import queue
import secrets
import shutil
import signal
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from ram.decoding.requests import EngineError, UnknownAligner
from ram.decoding.rows import StopWatch
from ram.errors import UserError, nearest
from ram.serving.loop import Done, Piece
from ram.serving.registry import Models
from ram.settings.serving import PROPOSAL

Turns = Sequence[tuple[bool, str]]
Marked = list[tuple[str, bool]]  # pieces of a text, and whether each is one that differs
KEPT = "\n\t\u200c\u200d"  # not printable to Python, but part of texts: the joiners of Persian and of emoji
COMMANDS = ("/aligner", "/compare", "/reset", "/quit", "/help")
REVERSED, PLAIN = "\033[7m", "\033[0m"
LEAST_WIDTH = 28  # columns of an answer; in narrower ones two stand below each other


class Chat:
    """One dialogue. fancy: a terminal, with a prompt, colours and columns; else plain lines."""

    def __init__(self, models: Models, output, fancy: bool) -> None:
        self.models, self.output, self.fancy = models, output, fancy
        self.name = next((name for name in models.served if name != PROPOSAL), PROPOSAL)
        self.turns: list[tuple[bool, str]] = []

    def write(self, text: str) -> None:
        self.output.write(text)
        self.output.flush()

    # ---- answers -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def answer(self, name: str, turns: Turns, seed: int) -> Iterator[Iterator[Piece]]:
        """The pieces of an answer as they come; leaving the context cancels it. Raises EngineError."""
        models, served = self.models, self.models.find(name)
        new = models.new_tokens(None)
        ids = models.encode_dialogue(turns, None, new, served.add_bos)
        (request,) = models.requests(served, [ids], models.law({}), new, seed, models.template_stops)
        events: queue.SimpleQueue = queue.SimpleQueue()

        def pieces() -> Iterator[Piece]:
            while not isinstance(event := events.get(), Done):
                yield event
            if event.finish_reason == "error":
                raise EngineError(event.error)

        ticket = models.engine.submit(request, events.put)
        try:
            yield pieces()
        finally:
            models.engine.cancel(ticket)

    def seed(self) -> int:
        given = self.models.settings.config.seed
        return secrets.randbits(32) if given is None else given

    def say(self, text: str) -> None:
        """One question and its answer, which Ctrl-C ends; one that ends before it begins was not asked."""
        turns, said, end = [*self.turns, (True, text)], "", "\n"
        self.write(f"{self.name}> ")
        try:
            with self.answer(self.name, turns, self.seed()) as pieces:
                for piece in pieces:
                    said += piece.text
                    self.write(printable(piece.text))
        except EngineError as error:
            self.write(f"not answered: {error}\n")
            return
        except KeyboardInterrupt:
            if not said:
                self.write("(stopped; the question is forgotten)\n")
                return
            end = " (stopped)\n"
        self.turns = [*turns, (False, said)]
        self.write(end)

    def compare(self, question: str) -> None:
        """The proposal's and a pair's answer to the question, or to the last one; neither is remembered."""
        other = self.name
        if other == PROPOSAL:
            other = next((name for name in self.models.served if name != PROPOSAL), None)
        turns = [*self.turns, (True, question)] if question else self.turns[:-1]
        if other is None or not turns:
            self.write(
                "nothing to compare: " + ("no aligner is loaded\n" if turns else "ask something first\n")
            )
            return
        seed, names = self.seed(), (PROPOSAL, other)
        how = "reversed" if self.fancy else "in brackets"
        self.write(f"({PROPOSAL} and {other}; {how}: what the other one has not)\n")
        try:
            with contextlib.ExitStack() as stack:  # both are decoded at once
                asked = [stack.enter_context(self.answer(name, turns, seed)) for name in names]
                found = [list(pieces) for pieces in asked]
        except EngineError as error:
            self.write(f"not answered: {error}\n")
            return
        ids = [[token for piece in pieces for token in piece.token_ids] for pieces in found]
        texts = ["".join(piece.text for piece in pieces) for pieces in found]
        if ids[0] == ids[1]:
            self.write(f"{printable(texts[0])}\n(both gave this answer, token by token)\n")
            return
        shown = [
            [
                (text, token in changed)
                for token, text in enumerate(token_texts(self.models.tokenizer, row, whole))
            ]
            for row, whole, changed in zip(ids, texts, differing(*ids), strict=True)
        ]
        columns = shutil.get_terminal_size().columns
        width = (columns - 3) // 2
        if not self.fancy:
            for name, text in zip(names, shown, strict=True):
                self.write(f"{name}: {bracketed(text)}\n")
        elif width < LEAST_WIDTH:
            for name, text in zip(names, shown, strict=True):
                lines = (line.rstrip(" ") for line in wrapped(text, columns))
                self.write("\n".join([f"{name}:", *lines]) + "\n")
        else:
            sides = [[name, *wrapped(text, width)] for name, text in zip(names, shown, strict=True)]
            self.write("\n".join(side_by_side(*sides, width)) + "\n")

    # ---- commands ------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Whether the dialogue goes on."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/help":
            self.write(__doc__.partition("\n\n")[2])
        elif word == "/reset":
            self.turns = []
            self.write("(forgotten)\n")
        elif word == "/compare":
            self.compare(rest.strip())
        elif word == "/aligner":
            try:
                self.name = self.models.find(rest.strip() or self.name).name
                self.write(f"(talking to {self.name}; there are: {', '.join(self.models.served)})\n")
            except UnknownAligner as error:
                self.write(f"{error}\n")
        else:
            self.write(f"unknown command {word!r}: {nearest(word, COMMANDS)}\n")
        return True

    def hold(self, lines: Iterable[str]) -> None:
        """The whole dialogue, from the lines that the user types."""
        for line in lines:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.say(line)
            except KeyboardInterrupt:  # wherever it comes, the dialogue goes on
                self.write("(stopped)\n")


def typed(chat: Chat) -> Iterator[str]:
    """Lines from a terminal, with editing, until Ctrl-D; Ctrl-C begins the line anew."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    while True:
        try:
            yield input("you> ")
        except KeyboardInterrupt:
            chat.write("\n(Ctrl-D or /quit leaves)\n")
        except EOFError:
            chat.write("\n")
            return


def check_streams() -> None:
    """Raises UserError where there is nothing to read questions from, or to write answers to."""
    if sys.stdin is None or sys.stdout is None:
        raise UserError("chat: standard input or output is closed; give a terminal, a pipe or a file")


def run(models: Models) -> None:
    """Talks until the user leaves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs begin deaf to it
    for stream in (sys.stdin, sys.stdout):  # what is no text in the terminal's encoding ends nothing
        stream.reconfigure(errors="replace")
    fancy = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(models, sys.stdout, fancy)
    try:
        if fancy:
            chat.write(f"talking to {chat.name}; there are: {', '.join(models.served)}; /help\n")
        chat.hold(typed(chat) if fancy else sys.stdin)
    finally:
        models.engine.close(wait=False)


# ---- showing -----------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """A text without what would command a terminal or turn a line's direction."""
    return "".join(
        c if c.isprintable() or c in KEPT or unicodedata.category(c) == "Zs" else "\ufffd" for c in text
    )


def token_texts(tokenizer, ids: Sequence[int], whole: str) -> list[str]:
    """What each token adds to a text that begins with `whole`; a character's last token adds it."""
    watch, found, shown = StopWatch(tokenizer, ()), [], ""
    for end in range(1, len(ids) + 1):
        text = watch.text(ids[:end])
        text = (text if end == len(ids) else text.rstrip("\ufffd"))[: len(whole)]
        found.append(text[len(shown) :])
        shown = max(shown, text, key=len)
    return found


def differing(first: Sequence[int], second: Sequence[int]) -> tuple[set[int], set[int]]:
    """Which tokens of each are not matched by the other's (longest common blocks first)."""
    changed = set(range(len(first))), set(range(len(second)))
    for a, b, size in difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        changed[0].difference_update(range(a, a + size))
        changed[1].difference_update(range(b, b + size))
    return changed


def bracketed(pieces: Marked) -> str:
    """A text on one line, what is marked in brackets."""
    text = "".join(f"[{printable(text)}]" if marked and text else printable(text) for text, marked in pieces)
    return text.replace("][", "").replace("\n", " / ")


def columns_of(character: str) -> int:
    """How many columns a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(pieces: Marked, width: int) -> list[str]:
    """A text in lines of exactly `width` columns, broken between words, what is marked reversed."""
    lines: list[Marked] = [[]]
    for piece, marked in pieces:
        for character in printable(piece).replace("\t", " "):
            if character == "\n":
                lines.append([])
                continue
            line = lines[-1]
            if sum(columns_of(c) for c, _ in line) + columns_of(character) > width:
                if character == " ":
                    lines.append([])
                    continue
                space = max((i for i, (c, _) in enumerate(line) if c == " "), default=len(line) - 1)
                lines[-1], line = line[: space + 1], line[space + 1 :]
                lines.append(line)
            line.append((character, marked))
    return [_coloured(line, width) for line in lines]


def _coloured(line: Marked, width: int) -> str:
    text, before = "", False
    for character, marked in [*line, ("", False)]:
        text += (REVERSED if marked else PLAIN) * (marked != before) + character
        before = marked
    return text + " " * (width - sum(columns_of(c) for c, _ in line))


def side_by_side(left: list[str], right: list[str], width: int) -> Iterator[str]:
    """Two columns; the first line of each is its heading."""
    left[0], right[0] = (each[0][:width].ljust(width) for each in (left, right))
    for i in range(max(len(left), len(right))):
        parts = (column[i] if i < len(column) else " " * width for column in (left, right))
        yield " | ".join(parts).rstrip()
