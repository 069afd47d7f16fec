"""Drafting ahead: a small model drafts several tokens, one forward of the large one verifies them all.

    waiting rows -> slots (a cache line each) -> rounds: draft, verify, accept -> finished rows

The draft and the law's own draw use the same counter-based noise, so a draft stands exactly where the plain
loop would have drawn that token: the output is the plain loop's, token by token, for every mode. For a pair
the aligner is its own draft, and its logits enter the law as they are; a round of width 1 is the plain loop.
A row lies in its slot by position, so rows of any length share a batch without padding, taking tokens back is
a smaller length, and a finished row's slot goes to the next one that waits.
"""

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import torch
from transformers import Cache, DynamicLayer

from par import PARParams, gumbel_argmax, gumbel_noise, next_token_law, warp
from plain_loop import Row, StopWatch, append_token, eos_token_ids, wide

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # positions verified in one forward


class SlotCache(Cache):
    """Keys and values of some slots, a column per position and one more for what nobody may read.

    `aim` says where the next forward's tokens go and what they see; nothing is ever moved or grown.
    """

    def __init__(self, slots: int, columns: int, device: torch.device) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots, self.columns, self.stored = slots, columns, []
        self.lines = torch.arange(slots, device=device)

    def aim(self, slots: torch.Tensor | None, places: torch.Tensor, seen: int) -> None:
        """slots: (R,) whose tokens come, None for all; places: (R, T) their columns; seen: columns read."""
        self.chosen, self.seen = slots, seen
        lines = self.lines[: len(places)] if slots is None else slots
        self.where = (lines.unsqueeze(1), places)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == len(self.stored):
            _, heads, _, size = key_states.shape
            shape = (self.slots, self.columns + 1, heads, size)
            self.stored.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        found = []
        for stored, states in zip(self.stored[layer_idx], (key_states, value_states), strict=True):
            stored[self.where] = states.transpose(1, 2)
            lines = stored if self.chosen is None else stored[self.chosen]
            found.append(lines[:, : self.seen].transpose(1, 2))
        return tuple(found)

    def keep(self, slots: torch.Tensor) -> None:
        self.slots, self.lines = len(slots), self.lines[: len(slots)]
        self.stored = [(keys[slots], values[slots]) for keys, values in self.stored]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _Member:
    """A model with its slots."""

    def __init__(self, model, slots: int, columns: int, vocab_size: int) -> None:
        self.model, self.vocab_size, self.cache = model, vocab_size, SlotCache(slots, columns, model.device)
        self.forwards = 0

    def __call__(
        self, ids: torch.Tensor, places: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, slots=None
    ) -> torch.Tensor | None:
        """Logits (R, T, V) of new tokens; None where only some `slots` are filled with a prompt.

        ids, places, positions: (R, T); mask: (R, 1, T, S), which columns each token sees.
        """
        device = self.model.device
        ids, places, positions, mask = (t.to(device) for t in (ids, places, positions, mask))
        self.cache.aim(slots, places, mask.shape[-1])
        model = self.model if slots is None else self.model.base_model
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.forwards += 1
        return output.logits[..., : self.vocab_size] if slots is None else None


def can_draft(*models) -> bool:
    """Whether the models keep all keys and values by position, as slots do: no sliding window, no state."""
    for model in models:
        if not hasattr(model, "base_model"):  # no transformers model: it keeps what it likes
            return False
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
        window = getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
        if set(kinds) != {"full_attention"} or window or model._is_stateful:
            return False
    return True


class DraftLength:
    """Chooses how many positions a round verifies, from what the rounds before cost and kept.

    With agreement rate b a round of width w keeps (1 - b^w) / (1 - b) tokens of a row on average and costs w
    steps of the drafter and one forward over w positions. Both times are medians of the latest rounds; of a
    width that was never tried, interpolated. Width 1 is the plain loop, so drafting ends where it costs more.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed, self.trials = fixed, deque([1, 8, 4, 1, 8, 4])
        self.agreed, self.compared, self.draft = 1.0, 2.0, deque(maxlen=9)
        self.verify: dict[int, deque] = defaultdict(lambda: deque(maxlen=5))

    def choose(self) -> int:
        if self.fixed is not None:
            return self.fixed
        if self.trials:
            return self.trials.popleft()
        rate = min(self.agreed / self.compared, 0.999)
        step = statistics.median(self.draft)
        known = sorted((width, statistics.median(times)) for width, times in self.verify.items())

        def kept_per_second(width: int) -> float:
            return (1 - rate**width) / (1 - rate) / (width * step + _between(known, width))

        return max(WIDTHS, key=kept_per_second)

    def learn(self, width: int, draft: float, verify: float, agreed: int, compared: int) -> None:
        """draft, verify: seconds; agreed of the `compared` tokens that were kept were the draft's."""
        self.agreed, self.compared = 0.98 * self.agreed + agreed, 0.98 * self.compared + compared
        self.draft.append(draft / width)
        self.verify[width].append(verify)


def _between(known: list[tuple[int, float]], width: int) -> float:
    """Linear interpolation; beyond both ends the nearest known time."""
    below = [point for point in known if point[0] <= width] or known[:1]
    above = [point for point in known if point[0] >= width] or known[-1:]
    (w0, t0), (w1, t1) = below[-1], above[0]
    return t0 if w1 == w0 else t0 + (t1 - t0) * (width - w0) / (w1 - w0)


class _Batch:
    """The rows being decoded, one a slot: tensors by slot on the device, lengths and rows on the host."""

    def __init__(
        self, members: list[_Member], slots: int, device: torch.device, vocab_size: int | None
    ) -> None:
        self.members, self.device = members, device
        self.rows: list[Row | None] = [None] * slots
        self.lengths = [1] * slots  # tokens of prompt and output, the last of them not yet in the caches
        self.last, self.row_ids = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(2))
        self.length = torch.ones_like(self.last)
        self.end, self.step = torch.full_like(self.last, 2), torch.zeros_like(self.last)
        wanted = (slots, vocab_size)
        self.seen = torch.zeros(wanted, dtype=torch.bool, device=device) if vocab_size else None

    @property
    def alive(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def admit(self, new: list[tuple[Row, Sequence[int], int]], max_new_tokens: int) -> None:
        """Gives free slots to new rows (row, prompt ids, row id) and reads all but their last prompt
        token.
        """
        free = [slot for slot, row in enumerate(self.rows) if row is None][: len(new)]
        for slot, (row, ids, _) in zip(free, new, strict=True):
            self.rows[slot], self.lengths[slot] = row, len(ids)
        at = torch.tensor(free, device=self.device)
        for target, values in (
            (self.last, [ids[-1] for _, ids, _ in new]),
            (self.row_ids, [row_id for _, _, row_id in new]),
            (self.length, [len(ids) for _, ids, _ in new]),
            (self.end, [len(ids) + max_new_tokens for _, ids, _ in new]),
            (self.step, [0] * len(new)),
        ):
            target[at] = torch.tensor(values, device=self.device)
        longest = max(len(ids) for _, ids, _ in new)
        context = torch.full((len(new), longest), -1)
        for line, (_, ids, _) in enumerate(new):
            context[line, : len(ids)] = torch.as_tensor(list(ids))
        context = context.to(self.device)
        if self.seen is not None:
            vocab = self.seen.shape[1]
            kept = context.masked_fill((context < 0) | (context >= vocab), vocab)
            seen = torch.zeros(len(new), vocab + 1, dtype=torch.bool, device=self.device)
            self.seen[at] = seen.scatter(1, kept, True)[:, :vocab]
        if longest == 1:
            return
        columns = torch.arange(longest - 1, device=self.device).expand(len(new), -1)
        inside = columns < self.length[at].unsqueeze(1) - 1
        mask = (columns.unsqueeze(1) <= columns.unsqueeze(2)).unsqueeze(1)
        for member in self.members:
            places = columns.masked_fill(~inside, member.cache.columns)
            member(context[:, :-1].clamp(min=0), places, columns, mask, slots=at.to(member.model.device))

    def keep(self, slots: list[int]) -> None:
        """Goes on with some slots only."""
        at = torch.tensor(slots, device=self.device)
        self.rows, self.lengths = [self.rows[s] for s in slots], [self.lengths[s] for s in slots]
        self.last, self.row_ids, self.length = self.last[at], self.row_ids[at], self.length[at]
        self.end, self.step = self.end[at], self.step[at]
        self.seen = self.seen[at] if self.seen is not None else None
        for member in self.members:
            member.cache.keep(at.to(member.model.device))


@torch.inference_mode()
def decode_rows(
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
    drafter=None,
    draft_tokens: int | None = None,
    batch_size: int = 16,
) -> Iterator[list[Row]]:
    """Decodes all rows; yields after each round the rows it worked on, a finished one for the last time.

    drafter: for one model alone, a small one of the same vocabulary that drafts for it; a pair's is its
    aligner. draft_tokens: how many tokens a round drafts ahead (0 = the plain loop); None chooses by what
    rounds cost and keep. Rows come and go one by one, longest prompts first.
    """
    pair = proposal is not None and aligner is not None
    verifier = proposal if proposal is not None else aligner
    drafter = aligner if pair else drafter
    watch, vocab = StopWatch(tokenizer, stop), len(tokenizer)
    eos = eos_token_ids(tokenizer, proposal, aligner)
    ends, device = {*eos, *stop_token_ids}, verifier.device
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    waiting = deque((Row(index, pair), prompt_ids[index], row_ids[index]) for index in order)
    slots = min(batch_size, len(order))
    columns = max((len(ids) for ids in prompt_ids), default=0) + max_new_tokens
    members = [_Member(m, slots, columns, vocab) for m in (verifier, drafter) if m is not None]
    penalised = params.repetition_penalty != 1.0 or params.base_repetition_penalty != 1.0
    batch = _Batch(members, slots, device, vocab if penalised else None)
    length = DraftLength(None if draft_tokens is None else draft_tokens + 1) if drafter else DraftLength(1)

    def draft_law(logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        if pair or proposal is None:
            return warp(wide(logits), params, seen)
        return next_token_law(logits, None, params, seen, eos).logprobs

    while waiting or batch.alive:
        free = len(batch.rows) - len(batch.alive)
        if waiting and free:
            batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))], max_new_tokens)
        elif 2 * len(batch.alive) <= len(batch.rows):  # nobody waits: go on with the rest only
            batch.keep(batch.alive)
        alive = batch.alive
        width = min(length.choose(), max(max_new_tokens - len(batch.rows[slot].ids) for slot in alive))
        start = time.perf_counter()

        # Columns that a row will never need go where nobody reads; their tokens are dropped as too many.
        seen_columns = min(max(batch.lengths[slot] for slot in alive) + width - 1, columns)
        ahead = torch.arange(width, device=device)
        columns_bw = batch.length.unsqueeze(1) - 1 + ahead
        places = torch.where(columns_bw < batch.end.unsqueeze(1) - 1, columns_bw, columns)
        positions = columns_bw.clamp(max=columns - 1)
        mask = (torch.arange(seen_columns, device=device) <= positions.unsqueeze(-1)).unsqueeze(1)
        steps = batch.step.unsqueeze(1) + ahead
        flat_ids = batch.row_ids.repeat_interleave(width)
        noise = gumbel_noise(seed, flat_ids, steps.flatten(), vocab).view(len(batch.rows), width, vocab)

        ids, seen, drafts, z_q, seens = batch.last.unsqueeze(1), batch.seen, [], [], []
        for i in range(width if pair else width - 1):
            at = slice(i, i + 1)
            logits = members[1](ids, places[:, at], positions[:, at], mask[:, :, at])[:, 0].to(device)
            draft = gumbel_argmax(draft_law(logits, seen), noise[:, i])
            z_q.append(logits)
            seens.append(seen)
            drafts.append(draft)
            ids = draft.unsqueeze(1)
            if seen is not None and i + 1 < width:
                seen = seen.scatter(1, ids, True)
        if not pair:
            seens.append(seen)
        drafted = torch.stack(drafts, dim=1) if drafts else batch.last.new_zeros(len(batch.rows), 0)
        middle = time.perf_counter()

        feed = torch.cat([batch.last.unsqueeze(1), drafted[:, : width - 1]], dim=1)
        logits = members[0](feed, places, positions, mask).flatten(0, 1)
        aligner_logits = torch.stack(z_q, dim=1).flatten(0, 1) if pair else None
        seen_all = None if batch.seen is None else torch.stack(seens, dim=1).flatten(0, 1)
        z_p, z_a = (logits, aligner_logits) if proposal is not None else (None, logits)
        candidates = None
        if pair and params.sample_mode == "snis":
            nucleus = next_token_law(z_p, None, params).logprobs
            draws = [
                gumbel_argmax(nucleus, gumbel_noise(seed, flat_ids, steps.flatten(), vocab, stream))
                for stream in range(1, params.n_candidates + 1)
            ]
            candidates = torch.stack(draws, dim=-1)
        law = next_token_law(z_p, z_a, params, seen_all, eos, candidates)
        flat_noise = noise.flatten(0, 1)
        token = gumbel_argmax(law.logprobs, flat_noise)
        shape = (len(batch.rows), width)
        report = {"token": token}
        as_draft = token.view(shape)[:, : drafted.shape[1]] == drafted
        if pair:
            report["fell_back"], report["kl"] = law.fell_back, law.kl
            report["as_proposal"] = gumbel_argmax(law.proposal_logprobs, flat_noise) == token
        kept = as_draft[:, : width - 1].long().cumprod(dim=1).sum(dim=1) + 1
        report = {key: value.view(shape).tolist() for key, value in report.items()}
        report["as_draft"], kept_by_slot = as_draft.tolist(), kept.tolist()  # the round's one wait

        batch.last = token.view(shape).gather(1, kept.unsqueeze(1) - 1).squeeze(1)
        batch.length, batch.step = batch.length + kept, batch.step + kept
        if batch.seen is not None:
            mine = torch.where(ahead < kept.unsqueeze(1), token.view(shape), batch.last.unsqueeze(1))
            batch.seen = batch.seen.scatter(1, mine, True)
        worked, agreed, compared = [], 0, 0
        for slot in alive:
            row = batch.rows[slot]
            row.proposal_forwards += proposal is not None
            row.aligner_forwards += width if pair else aligner is not None
            line = {key: values[slot] for key, values in report.items()}
            for i in range(kept_by_slot[slot]):
                if row.finish is None:  # what follows an end inside a draft is dropped
                    append_token(row, line, i, ends, watch, last=len(row.ids) + 1 == max_new_tokens)
            if drafted.shape[1]:  # a draft beyond a row's end is lost like one that the law refused
                tried = min(kept_by_slot[slot], drafted.shape[1])
                compared += tried
                agreed += sum(line["as_draft"][:tried]) - (
                    row.finish is not None and line["as_draft"][tried - 1]
                )
            batch.lengths[slot] += kept_by_slot[slot]
            worked.append(row)
            if row.finish is not None:
                batch.rows[slot] = None
        length.learn(width, middle - start, time.perf_counter() - middle, agreed, compared)
        yield worked
