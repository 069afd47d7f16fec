"""The answer of one row while it grows: its tokens, the strings that end it, the text safe to show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ram.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AGREED, CHANGED, FELL_BACK = "agreed", "changed", "fell_back"  # events of a pair's tokens


@dataclass
class Generation:
    """A finished answer.

    Args:
        token_ids: every token drawn, the closing EOS included.
        text: the decoded answer without special tokens, cut before the first stop string.
        finish_reason: "stop" (EOS or a stop string) or "length".
        stats: proposal_forwards, aligner_forwards, drafted, accepted (drafts of the aligner that the pair's
            law confirmed), fallback_fraction and changed_fraction (shares of its tokens: those that fell
            back; those that the proposal alone would not have drawn), mean_kl (nats).
        events: for a pair, one of "agreed" (the proposal alone would have drawn the same token with the same
            noise), "changed" or, whatever was drawn then, "fell_back" per token; None if one model decodes
            alone.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stats: dict[str, float] = field(default_factory=dict)
    events: list[str] | None = None


class StopWatch:
    """Finds a stop string in a growing answer, also if it spans several tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.stop = [string for string in stop if string]
        # A token adds at least one byte, except for a stray empty one, so a stop string that the newest token
        # completes begins within this many tokens.
        self.window = max((len(string.encode()) for string in self.stop), default=0) + 8

    def text(self, token_ids: Sequence[int]) -> str:
        """Decode tokens without the special ones."""
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return cast(str, self.tokenizer.decode(list(token_ids), **settings))

    def cut(self, text: str) -> str | None:
        """Return the text before the first stop string, or None if it has no stop string."""
        starts = [index for index in (text.find(string) for string in self.stop) if index >= 0]
        return text[: min(starts)] if starts else None

    def hit(self, token_ids: Sequence[int]) -> bool:
        """Return whether the newest token completed a stop string."""
        return bool(self.stop) and self.cut(self.text(token_ids[-self.window :])) is not None


class ShownText:
    """The text of a growing answer, as far as it is safe to show."""

    def __init__(self, watch: StopWatch) -> None:
        self.watch = watch
        self.shown = self.pending = ""
        self.start = self.end = 0  # tokens before `end` have given text; they are decoded from `start` on

    def more(self, ids: Sequence[int], finished: bool) -> str:
        """Return the text that has become safe to show; `ids` are all tokens of the answer so far."""
        if finished:
            text = self.watch.text(ids)
            stopped = self.watch.cut(text)
            new = (text if stopped is None else stopped)[len(self.shown) :]
        else:
            before, text = self.watch.text(ids[self.start : self.end]), self.watch.text(ids[self.start :])
            if text.startswith(before) and not text.endswith("\ufffd"):  # the last character is complete
                self.pending += text[len(before) :]
                self.start, self.end = self.end, len(ids)
            beginnings = (string[:n] for string in self.watch.stop for n in range(1, len(string)))
            held = max((len(text) for text in beginnings if self.pending.endswith(text)), default=0)
            new = self.pending[: len(self.pending) - held]
            self.pending = self.pending[len(new) :]
        self.shown += new
        return new


class DecodingRow:
    """Tokens, events and counts of one row while it is decoded."""

    def __init__(self, index: int, pair: bool) -> None:
        self.index = index
        self.ids: list[int] = []
        self.finish: str | None = None  # "stop" or "length" once it has ended
        self.ended_by_token = False
        self.events: list[str] | None = [] if pair else None
        self.kl_sum = 0.0
        self.accepted = self.changed = self.proposal_forwards = self.aligner_forwards = 0

    @property
    def shown_ids(self) -> list[int]:
        """The tokens that make up the text: all but the one that ended the answer."""
        return self.ids[:-1] if self.ended_by_token else self.ids

    @property
    def stats(self) -> dict[str, float]:
        """The counts and shares of `Generation.stats`."""
        n, events = len(self.ids), self.events or []
        return {
            "proposal_forwards": self.proposal_forwards,
            "aligner_forwards": self.aligner_forwards,
            "drafted": len(events),
            "accepted": self.accepted,
            "fallback_fraction": events.count(FELL_BACK) / n if n else 0.0,
            "changed_fraction": self.changed / n if n else 0.0,
            "mean_kl": self.kl_sum / n if n else 0.0,
        }

    def generation(self, watch: StopWatch) -> Generation:
        """Return the finished answer with its text."""
        assert self.finish is not None, "the row has not ended"
        text = watch.text(self.shown_ids)
        stopped = watch.cut(text)
        return Generation(
            self.ids, text if stopped is None else stopped, self.finish, self.stats, self.events
        )


def append_token(
    row: DecodingRow,
    report: Mapping[str, Sequence],
    position: int,
    ends: set[int],
    watch: StopWatch,
    last: bool,
) -> None:
    """Append one drawn token to a row, and end the row if the token ends it.

    Args:
        report: `token`, and for a pair `fell_back`, `kl`, `as_proposal`, `as_draft`; one entry per position.
        position: the entry of the report to append.
        ends: token ids that end an answer.
        last: whether the row has no room for another token.

    Raises:
        UserError: if the token was drawn from a law that is not a number.
    """
    token = report["token"][position]
    if token < 0:
        raise UserError(
            f"token {len(row.ids)} of an answer has no law: logits that are not numbers (NaN or inf). The "
            "weights of a model are damaged, or it overflows: try dtype=float32, or another checkpoint"
        )
    row.ids.append(token)
    if row.events is not None:
        event = AGREED if report["as_proposal"][position] else CHANGED
        row.changed += event == CHANGED
        row.events.append(FELL_BACK if report["fell_back"][position] else event)
        row.kl_sum += report["kl"][position]
        row.accepted += report["as_draft"][position]
    row.ended_by_token = token in ends
    if row.ended_by_token or watch.hit(row.ids):
        row.finish = "stop"
    elif last:
        row.finish = "length"


def eos_token_ids(tokenizer: "PreTrainedTokenizerBase", *models: "PreTrainedModel | None") -> tuple[int, ...]:
    """Return every id that ends an answer: EOS of the tokenizer and of each model's two configurations."""
    ids: set[int] = set()
    for model in models:
        for source in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            value: int | list[int] | None = getattr(source, "eos_token_id", None)
            ids.update([value] if isinstance(value, int) else value or [])
    if tokenizer.eos_token_id is not None:
        ids.add(cast(int, tokenizer.eos_token_id))
    return tuple(sorted(ids))
