"""The output of a row while it grows: tokens, the strings that end it, the text that may be shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ram.errors import UserError

AGREED, CHANGED, FELL_BACK = "agreed", "changed", "fell_back"  # what happened to a token of a pair


@dataclass
class Generation:
    """One finished row.

    token_ids: every token drawn, the closing EOS included. text: decoded, special tokens and what follows a
    stop string left out. finish_reason: "stop" (EOS or a stop string) or "length". stats: proposal_forwards,
    aligner_forwards, drafted, accepted (drafts from the aligner that the pair's law confirmed),
    fallback_fraction, changed_fraction (shares of its tokens), mean_kl (nats). events: per token of a pair
    "agreed" (the proposal alone would have drawn the same with the same noise), "changed" or "fell_back";
    None for one model alone.
    """

    token_ids: list[int]
    text: str
    finish_reason: str
    stats: dict[str, float] = field(default_factory=dict)
    events: list[str] | None = None


class StopWatch:
    """Finds a stop string in a growing output, also where it spans several tokens."""

    def __init__(self, tokenizer, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        # A token adds at least a byte, except a stray empty one: so many tokens back a stop string can begin.
        self.window = max((len(s.encode()) for s in self.stop), default=0) + 8

    def text(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def cut(self, text: str) -> str | None:
        """The text before the first stop string, None where there is none."""
        found = [index for index in (text.find(s) for s in self.stop) if index >= 0]
        return text[: min(found)] if found else None

    def hit(self, token_ids: Sequence[int]) -> bool:
        """Whether the newest token completed a stop string."""
        return bool(self.stop) and self.cut(self.text(token_ids[-self.window :])) is not None


class ShownText:
    """The text of a growing answer, as far as it may be shown."""

    def __init__(self, watch: StopWatch) -> None:
        self.watch, self.shown, self.pending = watch, "", ""
        self.start = self.end = 0  # tokens before `end` have given text, read together from `start` on

    def more(self, ids: list[int], finished: bool) -> str:
        """What may be shown that was not yet; ids: all that the text is made of."""
        if finished:
            text = self.watch.text(ids)
            stopped = self.watch.cut(text)
            new = (text if stopped is None else stopped)[len(self.shown) :]
        else:
            before, text = self.watch.text(ids[self.start : self.end]), self.watch.text(ids[self.start :])
            if text.startswith(before) and not text.endswith("\ufffd"):  # the last character is whole
                self.pending += text[len(before) :]
                self.start, self.end = self.end, len(ids)
            starts = (s[:n] for s in self.watch.stop for n in range(1, len(s)))
            held = max((len(s) for s in starts if self.pending.endswith(s)), default=0)
            new = self.pending[: len(self.pending) - held]
            self.pending = self.pending[len(new) :]
        self.shown += new
        return new


class Row:
    """The output of one row while it grows."""

    def __init__(self, index: int, pair: bool) -> None:
        self.index, self.ids, self.finish = index, [], None
        self.events: list[str] | None = [] if pair else None
        self.kl_sum, self.accepted = 0.0, 0
        self.proposal_forwards = self.aligner_forwards = 0
        self.ended_by_token = False

    @property
    def shown_ids(self) -> list[int]:
        """What the text is made of: all but the token that ended the answer."""
        return self.ids[:-1] if self.ended_by_token else self.ids

    @property
    def stats(self) -> dict[str, float]:
        n, pair = len(self.ids), self.events is not None
        fallen, changed = (self.events.count(what) if pair else 0 for what in (FELL_BACK, CHANGED))
        return {
            "proposal_forwards": self.proposal_forwards,
            "aligner_forwards": self.aligner_forwards,
            "drafted": n * pair,
            "accepted": self.accepted,
            "fallback_fraction": fallen / n if n else 0.0,
            "changed_fraction": changed / n if n else 0.0,
            "mean_kl": self.kl_sum / n if n else 0.0,
        }

    def generation(self, watch: StopWatch) -> Generation:
        text = watch.text(self.shown_ids)
        stopped = watch.cut(text)
        shown = text if stopped is None else stopped
        return Generation(self.ids, shown, self.finish, self.stats, self.events)


def eos_token_ids(tokenizer, *models) -> tuple[int, ...]:
    """Every id that ends an answer for one of the models: EOS as an int or a list, wherever it is
    configured.
    """
    found: set[int] = set()
    for model in (m for m in models if m is not None):
        for source in (model.config, getattr(model, "generation_config", None)):
            value = getattr(source, "eos_token_id", None)
            found.update([value] if isinstance(value, int) else value or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def append_token(
    row: Row, report: dict[str, list], line: int, ends: set[int], watch: StopWatch, last: bool
) -> None:
    """Adds a token to a row and notes whether it ends it; `report` holds what is known of each by line.

    Raises UserError for one that was drawn from no law at all.
    """
    if report["token"][line] < 0:
        raise UserError(
            f"token {len(row.ids)} of an answer has no law: logits that are not numbers (NaN or inf). The "
            "weights of a model are damaged, or it overflows: try dtype=float32, or another checkpoint"
        )
    row.ids.append(report["token"][line])
    if row.events is not None:
        agreed = AGREED if report["as_proposal"][line] else CHANGED
        row.events.append(FELL_BACK if report["fell_back"][line] else agreed)
        row.kl_sum += report["kl"][line]
        row.accepted += report["as_draft"][line]
    row.ended_by_token = row.ids[-1] in ends
    if row.ended_by_token or watch.hit(row.ids):
        row.finish = "stop"
    elif last:
        row.finish = "length"
