"""The text of token ids: whole characters, stop strings, the share of each token.

    ids -> Spelling: the bytes of each token -> Text: grows by tokens, ends before the first stop string

The text of some ids is the bytes of their tokens, decoded as UTF-8 with errors="replace". Special tokens are
marks: they have no bytes, and user text never contains them.
"""

import codecs
import functools
import re
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that byte-level BPE spells as themselves
_OTHERS = sorted(set(range(256)) - set(_PLAIN))
BYTE_LEVEL = {chr(byte): byte for byte in _PLAIN} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # spelling of a single byte in SentencePiece vocabularies


class Spelling:
    """The bytes that each token of a vocabulary adds after other tokens.

    Attributes:
        marks: id -> spelling of each special token.
        drops_space: whether the tokenizer drops the first space of a text when it decodes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder  # pyright: ignore[reportAttributeAccessIssue]
        special = set(tokenizer.all_special_ids)
        self.marks = {i: str(token) for i, token in added.items() if token.special or i in special}
        self.added = {i: str(token) for i, token in added.items() if i not in self.marks}
        # What kind of tokenizer this is shows in how it joins tokens, whatever its decoder is called.
        self.byte_level = self._join("Ġ", "Ċ") == " \n"
        self.byte_tokens = self._join("<0x41>") == "A"
        self.drops_space = self._after("▁a") == " " + self._join("▁a")
        self.known: dict[int, bytes] = {}

    def data(self, token_id: int) -> bytes:
        """Return the bytes of a token; a mark has none."""
        if (data := self.known.get(token_id)) is None:
            self.known[token_id] = data = self._bytes(token_id)
        return data

    def name(self, token_id: int) -> str:
        """Return a token's spelling in the vocabulary."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def word(self, token_id: int) -> str:
        """Return a mark's spelling, or a token's text; its spelling if it is not made of whole characters."""
        try:
            return self.marks.get(token_id) or self.data(token_id).decode() or self.name(token_id)
        except UnicodeDecodeError:
            return self.name(token_id)

    def _bytes(self, token_id: int) -> bytes:
        token = cast(str | None, self.tokenizer.convert_ids_to_tokens(token_id))
        if token is None or token_id in self.marks:
            return b""
        if self.byte_tokens and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if not self.byte_level:
            return self._after(token).encode("utf-8", "replace")
        if token_id in self.added or not all(letter in BYTE_LEVEL for letter in token):
            return token.encode("utf-8", "replace")
        return bytes(BYTE_LEVEL[letter] for letter in token)

    def _join(self, *tokens: str) -> str:
        return self.tokenizer.convert_tokens_to_string(list(tokens))

    def _after(self, token: str) -> str:
        """The text of a token between two others: tokenizers treat the ends of a text in their own ways."""
        before, whole = self._join("a"), self._join("a", token, "a")
        after = len(self._join("a", "a")) - len(before)
        return whole[len(before) : len(whole) - after]


@functools.lru_cache(maxsize=16)
def spelling(tokenizer: "PreTrainedTokenizerBase") -> Spelling:
    """Return the spelling of a tokenizer's vocabulary, made once."""
    return Spelling(tokenizer)


class Text:
    """A text while its tokens arrive.

    Args:
        stop: strings before which the text ends.
        continued: the text continues another one, so a first space belongs to it. Without it the space is
            dropped if the tokenizer does that, because it puts one before each text that it encodes.
        marks: spell the special tokens out.

    Attributes:
        text: the characters that are whole, before the first stop string.
        ends: for each token, the characters that were whole with it; those after a stop string count too.
        stop_ids: special tokens that are stop strings.
    """

    def __init__(
        self, spelling: Spelling, stop: Iterable[str] = (), continued: bool = False, marks: bool = False
    ) -> None:
        self.spelling, self.marks = spelling, marks
        self.stop = [string for string in stop if string]
        self.longest = max(map(len, self.stop), default=1)
        self.stop_ids = {i for i, mark in spelling.marks.items() if mark in self.stop} if self.stop else set()
        self.drop_space = spelling.drops_space and not continued
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.n_characters, self.finished, self.stopped = "", 0, False, False
        self.ends: list[int] = []
        self.whole: deque[int] = (
            deque()
        )  # numbers of tokens that end with a whole character and may be settled
        self.n_settled = 0

    def add(self, token_id: int, silent: bool = False) -> bool:
        """Append a token, without its text if it is silent; return whether a stop string is complete."""
        data = b"" if silent else self.data(token_id)
        self.drop_space = self.drop_space and not self.spelling.data(token_id)
        self._grow(self.decoder.decode(data))
        self.ends.append(self.n_characters)
        if not self.pending:
            self.whole.append(len(self.ends))
        return self.stopped

    def finish(self) -> str:
        """Append what the bytes of an incomplete character become at the end; return the text."""
        if not self.finished:
            self.finished = True
            if not self.stopped:
                self._grow(self.decoder.decode(b"", final=True))
            self.ends[-1:] = [self.n_characters] if self.ends else []
        return self.text

    def data(self, token_id: int) -> bytes:
        """Return the bytes that a token would append now."""
        mark = self.spelling.marks.get(token_id) if self.marks else None
        data = self.spelling.data(token_id) if mark is None else mark.encode()
        return data.removeprefix(b" ") if self.drop_space else data

    def characters(self, token_id: int) -> str:
        """Return the characters that a token would complete now."""
        return codecs.utf_8_decode(self.decoder.getstate()[0] + self.data(token_id), "replace", False)[0]

    @property
    def pending(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self.decoder.getstate()[0])

    def settled(self) -> int:
        """Return the number of first tokens whose text no later token can change or cut off."""
        if self.finished:
            return len(self.ends)
        tail = self.text[1 - self.longest :] if self.longest > 1 else ""
        beginnings = (i for i in range(len(tail)) if any(s.startswith(tail[i:]) for s in self.stop))
        safe = len(self.text) - len(tail) + next(beginnings, len(tail))
        while self.whole and self.ends[self.whole[0] - 1] <= safe:
            self.n_settled = self.whole.popleft()
        return self.n_settled

    def _grow(self, new: str) -> None:
        start = max(len(self.text) - self.longest + 1, 0)
        self.text += new
        self.n_characters = len(self.text)
        places = [self.text.find(string, start) for string in self.stop] if new else []
        found = [place for place in places if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


def text_of(tokenizer: "PreTrainedTokenizerBase", token_ids: Iterable[int], marks: bool = False) -> str:
    """Return the text of some ids; `marks` spells the special tokens out."""
    text = Text(spelling(tokenizer), marks=marks)
    for token_id in token_ids:
        text.add(token_id)
    return text.finish()


def token_texts(
    tokenizer: "PreTrainedTokenizerBase",
    token_ids: Iterable[int],
    text: str | None = None,
    marks: bool = False,
) -> list[str]:
    """Return the text that each token adds.

    Args:
        text: the text of the ids, if it ends before theirs: tokens after its end add nothing.
        marks: spell the special tokens out.
    """
    grown = Text(spelling(tokenizer), marks=marks)
    for token_id in token_ids:
        grown.add(token_id)
    return shares(grown.finish() if text is None else text, grown.ends)


def shares(text: str, ends: Sequence[int]) -> list[str]:
    """Return the part of a text that each token adds to it; the last one adds what is left.

    Args:
        ends: as in `Text`.
    """
    cuts = [0, *(min(end, len(text)) for end in ends[:-1]), len(text)] if ends else []
    return [text[start:end] for start, end in pairwise(cuts)]


def spelt_bytes(data: bytes, text: str) -> int:
    """Return how many of the first bytes spell a text, with which they begin; all if they do not."""
    counts = range(len(data), -1, -1)
    return next((n for n in counts if data[:n].decode("utf-8", "replace") == text), len(data))
