"""The plain loop: one token per forward of each model. It is the specification of every faster one.

    token ids -> batches (left-padded) -> one forward of each model per token -> par.next_token_law
              -> Gumbel-max draw -> Generation

The noise depends only on (seed, row id, position, stream, token), so a row's text does not depend on the
batch it is decoded in, nor on the loop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ram.decoding.par import (
    IGNORE_INDEX,
    PARParams,
    checked,
    gumbel_argmax,
    gumbel_noise,
    next_token_law,
    seen_mask,
    warp,
)
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


class _Member:
    """One model of the pair with its key-value cache; gives the last position's logits, cut to the
    vocabulary.
    """

    def __init__(self, model, vocab_size: int) -> None:
        from transformers import DynamicCache

        self.model, self.vocab_size, self.cache = model, vocab_size, DynamicCache()

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """ids, positions: (B, T) new tokens; mask: (B, S) over everything so far. Returns (B, V)."""
        device = self.model.device
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # Rows beyond the tokenizer are padding of the embedding; they name no token.
        return output.logits[:, -1, : self.vocab_size]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows.to(self.model.device))


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


def draw(law: torch.Tensor, seed: int, row_ids: torch.Tensor, positions: torch.Tensor, stream: int = 0):
    return gumbel_argmax(law, gumbel_noise(seed, row_ids, positions, law.shape[-1], stream))


@torch.inference_mode()
def decode_batch(
    proposal,
    aligner,
    tokenizer,
    prompt_ids: Sequence[Sequence[int]],
    params: PARParams,
    *,
    max_new_tokens: int,
    seed: int,
    row_ids: Sequence[int],
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> Iterator[list[Row]]:
    """Decodes one batch, one token per step; yields all rows after each step, the finished ones included.

    prompt_ids: non-empty ids per row. stop_token_ids: further ids that end an answer as EOS does. This is the
    plain loop: every law is computed in full, from one forward of each model over one new position per row.
    """
    members = [_Member(model, len(tokenizer)) for model in (proposal, aligner) if model is not None]
    pair, watch = len(members) == 2, StopWatch(tokenizer, stop)
    eos = eos_token_ids(tokenizer, proposal, aligner)
    ends = {*eos, *stop_token_ids}
    device = members[0].model.device
    rows = [Row(index, pair) for index in range(len(prompt_ids))]

    # Left padding: the last prompt token of every row stands in the same column, and masked columns add exact
    # zeros.
    width = max(len(ids) for ids in prompt_ids)
    context = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    for i, ids in enumerate(prompt_ids):
        context[i, width - len(ids) :] = torch.as_tensor(ids)
    context = context.to(device)
    mask = torch.zeros(len(rows), width + max_new_tokens, dtype=torch.int64, device=device)
    mask[:, :width] = context != IGNORE_INDEX
    mask[:, width:] = 1
    seen = seen_mask(context, len(tokenizer))
    new_ids, positions = context.clamp(min=0), (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    live = torch.arange(len(rows), device=device)  # which row stands in each line of the batch
    row_ids = torch.as_tensor(list(row_ids), dtype=torch.int64, device=device)

    for step in range(max_new_tokens):
        logits = [m.step(new_ids, mask[:, : width + step], positions).to(device) for m in members]
        z_p = logits[0] if proposal is not None else None
        z_q = logits[-1] if aligner is not None else None
        at, ids = torch.full_like(live, step), row_ids[live]

        candidates = None
        if pair and params.sample_mode == "snis":
            nucleus = next_token_law(z_p, None, params).logprobs
            draws = [draw(nucleus, seed, ids, at, stream) for stream in range(1, params.n_candidates + 1)]
            candidates = torch.stack(draws, dim=-1)
        law = next_token_law(z_p, z_q, params, seen, eos, candidates)
        noise = gumbel_noise(seed, ids, at, len(tokenizer))
        token = gumbel_argmax(law.logprobs, noise)
        report = {"token": checked(token, law)}
        if pair:
            report["fell_back"], report["kl"] = law.fell_back, law.kl
            report["as_proposal"] = gumbel_argmax(law.proposal_logprobs, noise) == token
            report["as_draft"] = gumbel_argmax(warp(wide(z_q), params, seen), noise) == token
        seen = seen.scatter(1, token.unsqueeze(1), True)

        report = {key: value.tolist() for key, value in report.items()}
        for line, index in enumerate(live.tolist()):
            row = rows[index]
            if row.finish is None:
                row.proposal_forwards += proposal is not None
                row.aligner_forwards += aligner is not None
                append_token(row, report, line, ends, watch, last=step + 1 == max_new_tokens)
        yield rows

        running = [line for line, index in enumerate(live.tolist()) if rows[index].finish is None]
        if not running:
            return
        new_ids, positions = token.unsqueeze(1), positions[:, -1:] + 1
        if 2 * len(running) <= len(live):  # half of the batch is done: go on with the rest only
            kept = torch.as_tensor(running, device=device)
            live, mask, seen, new_ids, positions = (t[kept] for t in (live, mask, seen, new_ids, positions))
            for member in members:
                member.keep_rows(kept)


def wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
