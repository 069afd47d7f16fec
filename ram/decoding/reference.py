"""The plain loop: one token per forward of each model. It specifies what the decoding engine must draw.

    token ids -> batches (left-padded) -> one forward of each model per token -> par.next_token_law
              -> Gumbel-max draw -> rows

The noise depends only on (seed, row id, position, stream, token), so a row's text depends neither on the
batch it is decoded in, nor on the loop.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ram.data.text import Text, spelling
from ram.decoding.par import (
    IGNORE_INDEX,
    NEG_INF,
    PARParams,
    align,
    checked,
    gumbel_argmax,
    gumbel_noise,
    next_token_law,
    seen_mask,
)
from ram.decoding.rows import DecodingRow, append_token, eos_token_ids
from ram.models.abilities import (
    Truth,
    check_decodable,
    distance,
    fall_back,
    keep,
    objection,
    whole_logits,
)
from ram.models.vocabulary import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _Cached:
    """One of the models with its library's key-value cache."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        from transformers import DynamicCache

        self.model, self.vocab_size = model, vocab_size
        self.cache = DynamicCache(config=model.config) if hasattr(model, "base_model") else DynamicCache()

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, V) after the last token, cut to the vocabulary.

        Args:
            ids, positions: (B, T) new tokens.
            mask: (B, S) over everything so far.
        """
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
            use_cache=True,
            **keep(self.model, 1),
        ).logits
        # Rows beyond the tokenizer are padding of the embedding; they name no token.
        return logits[:, -1, : self.vocab_size]

    def keep_rows(self, rows: torch.Tensor) -> None:
        # It selects rows, too, and knows all kinds of layers.
        self.cache.reorder_cache(cast(torch.LongTensor, rows.to(self.model.device)))


class _Whole:
    """One of the models by whole forwards of each row alone: slow, and right for every causal model."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.rows: list[list[int]] = []

    def step(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `_Cached.step`."""
        new, real = ids.tolist(), mask[:, -ids.shape[1] :].tolist()
        self.rows = self.rows or [[] for _ in new]
        for row, tokens, flags in zip(self.rows, new, real, strict=True):
            row += [token for token, flag in zip(tokens, flags, strict=True) if flag]
        return torch.cat([whole_logits(self.model, row, 1) for row in self.rows])[:, : self.vocab_size]

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[index] for index in rows.tolist()]


def cache_objection(model: Any, longest: int) -> str | None:
    """Return why a model cannot be decoded with its library's cache, or None if it can.

    Args:
        longest: tokens of the longest row.
    """
    if not hasattr(model, "base_model"):
        return None
    return objection(model, "its library's cache", _cache_difference, longest)


def _cache_difference(model: Any, truth: Truth) -> float:
    """How far the cache is from the truth: ragged rows, then single tokens, half of the rows to the end."""
    rows, new, worst = truth.rows, 12, 0.0
    member, live = _Cached(model, truth.logprobs[0].shape[-1]), torch.arange(len(rows))
    width = max(map(len, rows)) - new
    ids = torch.zeros(len(rows), width + new, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, -len(row) :], mask[line, -len(row) :] = torch.tensor(row), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for end in range(width, width + new):
        start = 0 if end == width else end - 1
        logits = member.step(ids[live, start:end], mask[live, :end], positions[live, start:end])
        for line, own in zip(live.tolist(), logits.log_softmax(-1), strict=True):
            worst = max(worst, distance(own, truth.logprobs[line][len(rows[line]) - 1 - (width + new - end)]))
        if end == width + new // 2:
            member.keep_rows(torch.arange(0, len(rows), 2))
            live = live[::2]
    return worst


def member(model: Any, vocab_size: int, longest: int) -> "_Cached | _Whole":
    """Return a model with the fastest way to decode it that is right.

    Args:
        longest: tokens of the longest row.

    Raises:
        UserError: if it has none: the model cannot decode.
    """
    reason = cache_objection(model, longest)
    if reason is None:
        return _Cached(model, vocab_size)
    check_decodable(model, longest)
    fall_back(model, "its library's cache", "a whole forward per token", reason)
    return _Whole(model, vocab_size)


def draw(
    law: torch.Tensor, seed: int, row_ids: torch.Tensor, positions: torch.Tensor, stream: int = 0
) -> torch.Tensor:
    """Draw one token per row (B,) from log-probabilities (B, V)."""
    return gumbel_argmax(law, gumbel_noise(seed, row_ids, positions, law.shape[-1], stream))


def decode_batches(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[Sequence[int]],
    params: PARParams,
    *,
    batch_size: int,
    row_ids: Sequence[int],
    **settings,
) -> Iterator[list[DecodingRow]]:
    """Decode any number of prompts, the longest first; yield the rows that got a token after each step.

    A row's index is its prompt's. If a batch does not fit into the device's memory, its unfinished rows are
    decoded again in two halves.
    """
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    while batches:
        batch = batches.pop(0)
        ids, own_ids = [prompt_ids[i] for i in batch], [row_ids[i] for i in batch]
        live = range(len(batch))
        try:
            for rows in decode_batch(proposal, aligner, tokenizer, ids, params, row_ids=own_ids, **settings):
                for row, index in zip(rows, batch, strict=True):
                    row.index = index
                yield [rows[line] for line in live]
                live = [line for line in live if rows[line].finish is None]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            middle = (len(live) + 1) // 2
            halves = [batch[line] for line in live[:middle]], [batch[line] for line in live[middle:]]
            batches[:0] = [half for half in halves if half]


@torch.inference_mode()
def decode_batch(
    proposal: "PreTrainedModel | None",
    aligner: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[Sequence[int]],
    params: PARParams,
    *,
    max_new_tokens: int,
    seed: int,
    row_ids: Sequence[int],
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    continued: bool = False,
) -> Iterator[list[DecodingRow]]:
    """Decode one batch, one token per step; yield all rows after each step, the finished ones included.

    Every law is computed in full, from one forward of each model over one new position per row.

    Args:
        prompt_ids: non-empty ids per row.
        row_ids: select the random numbers of each row, together with the seed.
        stop_token_ids: further ids that end an answer as EOS does.
        continued: the answers' texts continue the prompts'.
    """
    found = vocabulary(tokenizer, proposal, aligner)
    longest, size = max(map(len, prompt_ids)) + max_new_tokens, found.size
    members = [member(model, size, longest) for model in (proposal, aligner) if model is not None]
    pair, words = len(members) == 2, spelling(tokenizer)
    eos = eos_token_ids(tokenizer, proposal, aligner)
    ends = {*eos, *stop_token_ids}
    device = members[0].model.device
    unused = torch.tensor(found.unused, device=device) if found.unused else None
    rows = [DecodingRow(index, pair, Text(words, stop, continued)) for index in range(len(prompt_ids))]

    # Left padding: the last prompt token of every row is in the same column. Masked columns add exact zeros.
    width = max(len(ids) for ids in prompt_ids)
    context = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
    for i, ids in enumerate(prompt_ids):
        context[i, width - len(ids) :] = torch.as_tensor(ids)
    context = context.to(device)
    mask = torch.zeros(len(rows), width + max_new_tokens, dtype=torch.int64, device=device)
    mask[:, :width] = context != IGNORE_INDEX
    mask[:, width:] = 1
    seen = seen_mask(context, size)
    assert seen is not None
    new_ids, positions = context.clamp(min=0), (mask[:, :width].cumsum(-1) - 1).clamp(min=0)
    live = torch.arange(len(rows), device=device)  # the row in each line of the batch
    all_row_ids = torch.as_tensor(list(row_ids), dtype=torch.int64, device=device)

    for step in range(max_new_tokens):
        logits = [m.step(new_ids, mask[:, : width + step], positions).to(device) for m in members]
        if unused is not None:
            logits = [values.index_fill(-1, unused, NEG_INF) for values in logits]
        z_p = logits[0] if proposal is not None else None
        z_q = logits[-1] if aligner is not None else None
        at, ids = torch.full_like(live, step), all_row_ids[live]

        candidates = None
        if pair and params.sample_mode == "snis":
            nucleus = next_token_law(z_p, None, params).logprobs
            draws = [
                draw(nucleus, seed, ids, at, stream) for stream in range(1, 1 + (params.n_candidates or 0))
            ]
            candidates = torch.stack(draws, dim=-1)
        law = next_token_law(z_p, z_q, params, seen, eos, candidates)
        noise = gumbel_noise(seed, ids, at, size)
        token = gumbel_argmax(law.logprobs, noise)
        report = {"token": checked(token, law)}
        if z_q is not None and law.proposal_logprobs is not None:
            report["fell_back"], report["kl"] = law.fell_back, law.kl
            report["as_proposal"] = gumbel_argmax(law.proposal_logprobs, noise) == token
            report["as_draft"] = gumbel_argmax(align(z_q, params, seen), noise) == token
        seen = seen.scatter(1, token.unsqueeze(1), True)

        values = {key: value.tolist() for key, value in report.items()}
        lines = live.tolist()
        for line, index in enumerate(lines):
            row = rows[index]
            if row.finish is None:
                row.proposal_forwards += proposal is not None
                row.aligner_forwards += aligner is not None
                append_token(row, values, line, ends, last=step + 1 == max_new_tokens)
        yield rows

        running = [line for line, index in enumerate(lines) if rows[index].finish is None]
        if not running:
            return
        new_ids, positions = token.unsqueeze(1), positions[:, -1:] + 1
        if 2 * len(running) <= len(live):  # half of the batch has ended: go on with the rest only
            kept = torch.as_tensor(running, device=device)
            live, mask, seen, new_ids, positions = (t[kept] for t in (live, mask, seen, new_ids, positions))
            for one in members:
                one.keep_rows(kept)
