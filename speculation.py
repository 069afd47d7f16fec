"""Drafting ahead: a small model drafts several tokens, one forward of the large one verifies them all.

    waiting rows -> slots (a cache line each) -> rounds: draft, verify, accept -> finished rows

The draft and the law's own draw use the same counter-based noise, so a draft stands exactly where the plain
loop would have drawn that token: the output is the plain loop's, token by token, for every mode. For a pair
the aligner is its own draft, and its logits enter the law as they are; a round of width 1 is the plain loop.
A row lies in its slot by position, so rows of any length share a batch without padding, taking tokens back is
a smaller length, and a finished row's slot goes to the next one that waits.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    steps of the drafter and one forward over w positions. Both times are the least of the latest rounds,
    since whatever else runs only adds to them; of a width that was never tried, interpolated. Width 1 is the
    plain loop, so drafting ends where it costs more; now and then another width shows whether that still
    holds.
    """

    TRIALS = (1, 8, 4)

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed, self.rounds = fixed, 0
        self.agreed, self.compared, self.draft = 1.0, 2.0, deque(maxlen=9)
        self.verify: dict[int, deque] = defaultdict(lambda: deque(maxlen=5))

    def choose(self) -> int:
        if self.fixed is not None:
            return self.fixed
        self.rounds += 1
        turn, again = divmod(self.rounds - 1, 16)
        if turn == 0 and again < 2 * len(self.TRIALS):
            return self.TRIALS[again % len(self.TRIALS)]
        if again == 0:
            return self.TRIALS[turn % len(self.TRIALS)]
        rate = min(self.agreed / self.compared, 0.999)
        step = min(self.draft)
        known = sorted((width, min(times)) for width, times in self.verify.items())

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


class _Round(NamedTuple):
    """Where the next `width` tokens of every slot lie and what they draw with; B slots, W = width."""

    width: int
    places: torch.Tensor  # (B, W) columns of the caches
    positions: torch.Tensor  # (B, W)
    mask: torch.Tensor  # (B, 1, W, S)
    row_ids: torch.Tensor  # (B * W,)
    steps: torch.Tensor  # (B * W,) how many tokens the row had drawn before
    noise: torch.Tensor  # (B, W, V)


class _Loop:
    """What stays the same from round to round; `decode_rows` says what the arguments are."""

    def __init__(self, proposal, aligner, drafter, tokenizer, params, seed, stop, stop_token_ids) -> None:
        self.pair = proposal is not None and aligner is not None
        self.proposes, self.aligns = proposal is not None, aligner is not None
        self.verifier = proposal if self.proposes else aligner
        self.drafter = aligner if self.pair else drafter
        self.params, self.seed, self.vocab = params, seed, len(tokenizer)
        self.watch, self.eos = StopWatch(tokenizer, stop), eos_token_ids(tokenizer, proposal, aligner)
        self.ends = {*self.eos, *stop_token_ids}

    def frame(self, batch: "_Batch", width: int, columns: int) -> _Round:
        """Columns that a row will never need go where nobody reads; what is drawn there is dropped."""
        device = batch.device
        ahead = torch.arange(width, device=device)
        wanted = batch.length.unsqueeze(1) - 1 + ahead
        places = torch.where(wanted < batch.end.unsqueeze(1) - 1, wanted, columns)
        positions = wanted.clamp(max=columns - 1)
        seen = min(max(batch.lengths[slot] for slot in batch.alive) + width - 1, columns)
        mask = (torch.arange(seen, device=device) <= positions.unsqueeze(-1)).unsqueeze(1)
        row_ids = batch.row_ids.repeat_interleave(width)
        steps = (batch.step.unsqueeze(1) + ahead).flatten()
        noise = gumbel_noise(self.seed, row_ids, steps, self.vocab).view(-1, width, self.vocab)
        return _Round(width, places, positions, mask, row_ids, steps, noise)

    def draft(self, batch: "_Batch", frame: _Round):
        """Drafts (B, D), the drafter's logits of each, and the ids seen before each position (None: unused).

        A pair's aligner reads all W positions, since the law needs its logits there: D = W. Another drafter
        has nothing to say of the last one: D = W - 1.
        """
        ids, seen = batch.last.unsqueeze(1), batch.seen
        drafts, logits, seens = [], [], []
        for i in range(frame.width if self.pair else frame.width - 1):
            at = slice(i, i + 1)
            found = batch.members[1](ids, frame.places[:, at], frame.positions[:, at], frame.mask[:, :, at])
            logits.append(found[:, 0].to(batch.device))
            seens.append(seen)
            drafts.append(gumbel_argmax(self.draft_law(logits[-1], seen), frame.noise[:, i]))
            ids = drafts[-1].unsqueeze(1)
            seen = None if seen is None else seen.scatter(1, ids, True)
        seens += [] if self.pair else [seen]
        drafted = torch.stack(drafts, dim=1) if drafts else batch.last.new_zeros(len(batch.last), 0)
        return drafted, logits, seens

    def draft_law(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        if self.pair or not self.proposes:
            return warp(wide(logits), self.params, seen)
        return next_token_law(logits, None, self.params, seen, self.eos).logprobs

    def verify(self, batch: "_Batch", frame: _Round, drafted, draft_logits, seens) -> dict[str, torch.Tensor]:
        """What the law itself draws at every position, and what is known of it; all (B, W), by name."""
        feed = torch.cat([batch.last.unsqueeze(1), drafted[:, : frame.width - 1]], dim=1)
        logits = batch.members[0](feed, frame.places, frame.positions, frame.mask).flatten(0, 1)
        z_p = logits if self.proposes else None
        z_q = (
            torch.stack(draft_logits, dim=1).flatten(0, 1) if self.pair else None if self.proposes else logits
        )
        seen = None if batch.seen is None else torch.stack(seens, dim=1).flatten(0, 1)
        candidates = None
        if self.pair and self.params.sample_mode == "snis":
            nucleus = next_token_law(z_p, None, self.params).logprobs
            streams = range(1, self.params.n_candidates + 1)
            noises = (gumbel_noise(self.seed, frame.row_ids, frame.steps, self.vocab, j) for j in streams)
            candidates = torch.stack([gumbel_argmax(nucleus, noise) for noise in noises], dim=-1)
        law = next_token_law(z_p, z_q, self.params, seen, self.eos, candidates)
        noise = frame.noise.flatten(0, 1)
        token = gumbel_argmax(law.logprobs, noise)
        found = {"token": token}
        if self.pair:
            as_proposal = gumbel_argmax(law.proposal_logprobs, noise) == token
            found |= {"fell_back": law.fell_back, "kl": law.kl, "as_proposal": as_proposal}
        found = {key: value.view(-1, frame.width) for key, value in found.items()}
        return found | {"as_draft": found["token"][:, : drafted.shape[1]] == drafted}

    def accept(self, batch: "_Batch", frame: _Round, found: dict[str, torch.Tensor], max_new_tokens: int):
        """Moves every slot on by what it keeps, up to the first token that was not the draft's.

        Returns the rows worked on, and how many of how many drafts were kept. Fetching what was found is the
        round's one wait for the device.
        """
        width, tokens = frame.width, found["token"]
        kept = found["as_draft"][:, : width - 1].long().cumprod(dim=1).sum(dim=1) + 1
        report = {key: value.tolist() for key, value in found.items()}
        counts = kept.tolist()
        batch.last = tokens.gather(1, kept.unsqueeze(1) - 1).squeeze(1)
        batch.length, batch.step = batch.length + kept, batch.step + kept
        if batch.seen is not None:
            ahead = torch.arange(width, device=batch.device)
            mine = torch.where(ahead < kept.unsqueeze(1), tokens, batch.last.unsqueeze(1))
            batch.seen = batch.seen.scatter(1, mine, True)
        worked, agreed, compared = [], 0, 0
        for slot in batch.alive:
            row, line = batch.rows[slot], {key: values[slot] for key, values in report.items()}
            row.proposal_forwards += self.proposes
            row.aligner_forwards += width if self.pair else self.aligns
            batch.lengths[slot] += counts[slot]
            for i in range(counts[slot]):
                if row.finish is None:  # what follows an end inside a draft is dropped
                    append_token(row, line, i, self.ends, self.watch, last=len(row.ids) + 1 == max_new_tokens)
            tried = line["as_draft"][: counts[slot]]
            compared += len(tried)
            agreed += sum(tried)
            if row.finish is not None:
                agreed -= bool(tried and tried[-1])  # nothing drafted beyond an end can be kept
                batch.rows[slot] = None
            worked.append(row)
        return worked, agreed, compared


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
    loop = _Loop(proposal, aligner, drafter, tokenizer, params, seed, stop, stop_token_ids)
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    waiting = deque((Row(index, loop.pair), prompt_ids[index], row_ids[index]) for index in order)
    slots = min(batch_size, len(order))
    columns = max((len(ids) for ids in prompt_ids), default=0) + max_new_tokens
    models = [model for model in (loop.verifier, loop.drafter) if model is not None]
    members = [_Member(model, slots, columns, loop.vocab) for model in models]
    penalised = params.repetition_penalty != 1.0 or params.base_repetition_penalty != 1.0
    batch = _Batch(members, slots, loop.verifier.device, loop.vocab if penalised else None)
    fixed = None if draft_tokens is None else draft_tokens + 1
    length = DraftLength(fixed if loop.drafter is not None else 1)
    while waiting or batch.alive:
        free = len(batch.rows) - len(batch.alive)
        if waiting and free:
            batch.admit([waiting.popleft() for _ in range(min(free, len(waiting)))], max_new_tokens)
        elif 2 * len(batch.alive) <= len(batch.rows):  # nobody waits: go on with the rest only
            batch.keep(batch.alive)
        room = max(max_new_tokens - len(batch.rows[slot].ids) for slot in batch.alive)
        start = time.perf_counter()
        frame = loop.frame(batch, min(length.choose(), room), columns)
        drafts = loop.draft(batch, frame)
        middle = time.perf_counter()
        found = loop.verify(batch, frame, *drafts)
        worked, agreed, compared = loop.accept(batch, frame, found, max_new_tokens)
        length.learn(frame.width, middle - start, time.perf_counter() - middle, agreed, compared)
        yield worked
