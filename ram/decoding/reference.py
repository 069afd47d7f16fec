"""The plain loop: one token per forward of each model. It is the specification of every faster one.

    token ids -> batches (left-padded) -> one forward of each model per token -> par.next_token_law
              -> Gumbel-max draw -> Generation

The noise depends only on (seed, row id, position, stream, token), so a row's text does not depend on the
batch it is decoded in, nor on the loop.
"""

from collections.abc import Iterator, Sequence

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
from ram.decoding.rows import Row, StopWatch, append_token, eos_token_ids


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
