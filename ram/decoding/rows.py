"""The answer of one row while it grows: its tokens, its text and what ends it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ram.data.text import Text
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


class DecodingRow:
    """Tokens, events and counts of one row while it is decoded."""

    def __init__(self, index: int, pair: bool, text: Text) -> None:
        self.index, self.text = index, text
        self.ids: list[int] = []
        self.finish: str | None = None  # "stop" or "length" once it has ended
        self.events: list[str] | None = [] if pair else None
        self.kl_sum = 0.0
        self.accepted = self.changed = self.proposal_forwards = self.aligner_forwards = 0

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

    def settled(self) -> tuple[int, int]:
        """Return how many tokens and characters nothing can change any more; all once the row has ended."""
        if self.finish is not None:
            self.text.finish()
        count = self.text.settled()
        return count, self.text.ends[count - 1] if count else 0

    def generation(self) -> Generation:
        """Return the finished answer with its text."""
        assert self.finish is not None, "the row has not ended"
        return Generation(self.ids, self.text.finish(), self.finish, self.stats, self.events)


def append_token(
    row: DecodingRow,
    report: Mapping[str, Sequence],
    position: int,
    ends: set[int],
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
    ended = token in ends or token in row.text.stop_ids
    if row.text.add(token, silent=ended) or ended:
        row.finish = "stop"
    elif last:
        row.finish = "length"


def eos_token_ids(tokenizer: "PreTrainedTokenizerBase", *models: "PreTrainedModel | None") -> tuple[int, ...]:
    """Return every id that ends an answer: EOS of the tokenizer, and of each model's files."""
    ids: set[int] = set()
    for model in models:
        for source in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            value: int | list[int] | None = getattr(source, "eos_token_id", None)
            ids.update([value] if isinstance(value, int) else value or [])
        if (own := getattr(model, "tokenizer_eos", None)) is not None:
            ids.add(own)
    if tokenizer.eos_token_id is not None:
        ids.add(cast(int, tokenizer.eos_token_id))
    return tuple(sorted(ids))
