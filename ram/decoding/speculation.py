"""Drafting ahead: a small model drafts several tokens, one forward of the large one verifies them all.

    waiting rows -> slots (a cache line each) -> rounds: draft, verify, accept -> finished rows

The draft and the law's own draw use the same counter-based noise, so a draft stands exactly where the plain
loop would have drawn that token: the output is the plain loop's, token by token, for every mode. For a pair
the aligner is its own draft, and its logits enter the law as they are; a round of width 1 is the plain loop.
Rows of any length share a batch without padding. A row's first round reads its prompt on the way: the drafts
follow the prompt in the forward that verifies them.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ram.decoding.par import ALL, Noise, PARParams, checked, next_token_law, seen_mask, warp
from ram.decoding.reference import wide
from ram.decoding.rows import Row, StopWatch, append_token, eos_token_ids
from ram.decoding.slots import Slots, open_slots

TIGHT = {"cpu"}  # devices where a line less is time won
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # positions verified in one forward


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

    def choose(self, rows: int = 1, beside: int = 0) -> int:
        """The width of the next round; see `best`."""
        if self.fixed is not None:
            return self.fixed
        self.rounds += 1
        turn, again = divmod(self.rounds - 1, 16)
        if turn == 0 and again < 2 * len(self.TRIALS):
            return self.TRIALS[again % len(self.TRIALS)]
        if again == 0:
            return self.TRIALS[turn % len(self.TRIALS)]
        return self.best(rows, beside)

    def best(self, rows: int = 1, beside: int = 0) -> int:
        """The width that pays most by what is known; where verifying is clocked by tokens, for so many rows
        and so many tokens beside theirs.
        """
        if self.fixed is not None or not self.draft:
            return self.fixed or self.TRIALS[-1]
        rate = min(self.agreed / self.compared, 0.999)
        step = min(self.draft)
        known = sorted((width, min(times)) for width, times in self.verify.items())

        def kept_per_second(width: int) -> float:
            return (1 - rate**width) / (1 - rate) / (width * step + _between(known, rows * width + beside))

        return max(WIDTHS, key=kept_per_second)

    def learn(self, agreed: int, compared: int) -> None:
        """agreed of the `compared` tokens that were kept were the draft's."""
        self.agreed, self.compared = 0.98 * self.agreed + agreed, 0.98 * self.compared + compared

    def clock(self, width: int, draft: float, verify: float) -> None:
        """draft, verify: seconds of a round in which no prompt was read."""
        self.clock_tokens(width, draft / width, verify)

    def clock_tokens(self, tokens: int, step: float | None, verify: float) -> None:
        """step: seconds of one draft, where there was one; verify: of a forward over so many tokens."""
        self.draft += [] if step is None else [step]
        self.verify[tokens].append(verify)


def _between(known: list[tuple[int, float]], width: int) -> float:
    """Linear interpolation; beyond both ends the nearest known time."""
    below = [point for point in known if point[0] <= width] or known[:1]
    above = [point for point in known if point[0] >= width] or known[-1:]
    (w0, t0), (w1, t1) = below[-1], above[0]
    return t0 if w1 == w0 else t0 + (t1 - t0) * (width - w0) / (w1 - w0)


class _Batch:
    """The rows being decoded, one a slot: tensors by slot on the device, lengths and rows on the host."""

    def __init__(self, members: list[Slots], device: torch.device, seen_vocab: int | None) -> None:
        self.members, self.device = members, device
        slots, self.columns = members[0].slots, members[0].columns
        self.rows: list[Row | None] = [None] * slots
        self.lengths = [1] * slots  # tokens of prompt and output; the models may not have read the last
        self.tokens = torch.zeros(slots, self.columns + 1, dtype=torch.int64, device=device)
        self.row_ids = torch.zeros(slots, dtype=torch.int64, device=device)
        self.length, self.step = torch.ones_like(self.row_ids), torch.zeros_like(self.row_ids)
        self.end = torch.full_like(self.row_ids, 2)
        shape = (slots, seen_vocab)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device) if seen_vocab else None

    @property
    def alive(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def admit(self, new: list[tuple[Row, Sequence[int], int]], max_new_tokens: int) -> list[int]:
        """Gives free slots to new rows (row, prompt ids, row id) and returns them; nothing is read yet."""
        free = [slot for slot, row in enumerate(self.rows) if row is None][: len(new)]
        longest = max(len(ids) for _, ids, _ in new)
        context = torch.full((len(new), longest), -1)
        for line, (slot, (row, ids, _)) in enumerate(zip(free, new, strict=True)):
            self.rows[slot], self.lengths[slot] = row, len(ids)
            for member in self.members:
                member.read[slot] = 0
            context[line, : len(ids)] = torch.as_tensor(list(ids))
        at, context = torch.tensor(free, device=self.device), context.to(self.device)
        for target, values in (
            (self.row_ids, [row_id for _, _, row_id in new]),
            (self.length, [len(ids) for _, ids, _ in new]),
            (self.end, [len(ids) + max_new_tokens for _, ids, _ in new]),
            (self.step, [0] * len(new)),
        ):
            target[at] = torch.tensor(values, device=self.device)
        self.tokens[at, :longest] = context.clamp(min=0)
        if self.seen is not None:
            self.seen[at] = seen_mask(context, self.seen.shape[1])
        return free

    def close_gaps(self) -> None:
        """Moves the last rows to where rows have ended, and goes on without the rest."""
        alive = self.alive
        count = len(alive)
        late = iter([slot for slot in alive if slot >= count])
        slots = [slot if self.rows[slot] is not None else next(late) for slot in range(count)]
        at = torch.tensor(slots, device=self.device)
        self.rows, self.lengths = [self.rows[s] for s in slots], [self.lengths[s] for s in slots]
        self.tokens, self.row_ids, self.length = self.tokens[at], self.row_ids[at], self.length[at]
        self.end, self.step = self.end[at], self.step[at]
        self.seen = self.seen[at] if self.seen is not None else None
        for member in self.members:
            member.keep(slots)


class _Round(NamedTuple):
    """Some rows, and where their next `width` tokens lie and what they draw with; R rows, W = width."""

    width: int
    slots: list[int]
    lines: torch.Tensor | None  # (R,) the same slots; None for all
    lengths: list[int]
    length: torch.Tensor  # (R,)
    last: torch.Tensor  # (R, 1) each row's last token
    seen: torch.Tensor | None  # (R, V)
    places: torch.Tensor  # (R, W) columns of the caches
    mask: torch.Tensor  # (R, 1, W, S)
    noise: Noise  # of those places


def fetch(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors (R, _) on the host, by one transfer: float64 holds ids, flags and divergences exactly."""
    if next(iter(found.values())).device.type == "cpu":
        return found
    together = torch.cat([value.double() for value in found.values()], dim=1).cpu()
    parts = together.split([value.shape[1] for value in found.values()], dim=1)
    return {key: part.to(found[key].dtype) for key, part in zip(found, parts, strict=True)}


def draft_law(logits: torch.Tensor, params: PARParams, seen, eos: Sequence[int], for_proposal: bool):
    """The law (R, V) that drafts are drawn from, from the drafter's logits, for a pair or an aligner alone,
    or for the proposal alone.
    """
    if for_proposal:
        return next_token_law(logits, None, params, seen, eos).logprobs
    return warp(wide(logits), params, seen)


def draw_laws(z_p, z_q, params: PARParams, seen, eos: Sequence[int], noise: Noise, *at):
    """The laws of some rows' positions from both models' logits (N, V), either None, and what they draw.

    Returns the log-probabilities (N, V), and by name (N,): token; of a pair also fell_back, kl and
    as_proposal. noise: of rows and columns; at: which of them these are, all by default.
    """
    candidates, pair = None, z_p is not None and z_q is not None
    if pair and params.sample_mode == "snis":
        nucleus = next_token_law(z_p, None, params).logprobs
        others = (noise.stream_of(stream, *at) for stream in range(1, params.n_candidates + 1))
        candidates = torch.stack([each.draw(nucleus) for each in others], dim=-1)
    law = next_token_law(z_p, z_q, params, seen, eos, candidates)
    token = checked(noise.draw(law.logprobs, *at), law)
    found = {"token": token}
    if pair:
        as_proposal = noise.draw(law.proposal_logprobs, *at) == token
        found |= {"fell_back": law.fell_back, "kl": law.kl, "as_proposal": as_proposal}
    return law.logprobs, found


def grow(row: Row, mine: dict[str, list], count: int, ends, watch, max_new_tokens: int) -> tuple[int, int]:
    """Gives a row its `count` new tokens up to an end; what follows an end inside a draft is dropped.

    mine: what is known of each token. Returns how many drafts were compared, and how many could be kept.
    """
    for i in range(count):
        if row.finish is None:
            append_token(row, mine, i, ends, watch, last=len(row.ids) + 1 == max_new_tokens)
    tried = mine["as_draft"][:count]
    wasted = row.finish is not None and bool(tried and tried[-1])  # nothing beyond an end can be kept
    return len(tried), sum(tried) - wasted


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

    def frame(self, batch: _Batch, slots: list[int], width: int) -> _Round:
        """Columns that a row will never need go where nobody reads; what is drawn there is dropped."""
        device, lines = batch.device, None
        length, end, step, row_ids, seen = batch.length, batch.end, batch.step, batch.row_ids, batch.seen
        if len(slots) < len(batch.rows):
            lines = torch.tensor(slots, device=device)
            length, end, step, row_ids = (each[lines] for each in (length, end, step, row_ids))
            seen = None if seen is None else seen[lines]
        lengths = [batch.lengths[slot] for slot in slots]
        last = (batch.tokens if lines is None else batch.tokens[lines]).gather(1, length.unsqueeze(1) - 1)
        ahead = torch.arange(width, device=device)
        wanted = length.unsqueeze(1) - 1 + ahead
        places = torch.where(wanted < end.unsqueeze(1) - 1, wanted, batch.columns)
        mask = self.visible(batch, places, max(lengths) + width - 1)
        row_ids = row_ids.unsqueeze(1).expand(-1, width)
        noise = Noise(self.seed, row_ids, step.unsqueeze(1) + ahead, self.vocab)
        return _Round(width, slots, lines, lengths, length, last, seen, places, mask, noise)

    @staticmethod
    def visible(batch: _Batch, places: torch.Tensor, columns: int) -> torch.Tensor:
        columns = torch.arange(min(columns, batch.columns), device=batch.device)
        return (columns <= places.unsqueeze(-1)).unsqueeze(1)

    def read(self, batch: _Batch, member: Slots, frame: _Round, drafted: torch.Tensor) -> torch.Tensor:
        """Reads what a model has not read of each row, then the drafts; logits (R, 1 + D, V) from its last
        token on.

        drafted: (R, D), D < W. What was not read is the last token, or a whole prompt.
        """
        count = 1 + drafted.shape[1]
        ids, places, mask = torch.cat([frame.last, drafted], dim=1), frame.places[:, :count], None
        begin = [member.read[slot] for slot in frame.slots]
        behind = [length - 1 - start for length, start in zip(frame.lengths, begin, strict=True)]
        for slot, length in zip(frame.slots, frame.lengths, strict=True):
            member.read[slot] = length - 1 + count
        if not any(behind):
            found = member(ids, places, frame.mask[:, :, :count], frame.lines)
            return found.to(batch.device)
        device, width = batch.device, max(behind) + count
        start = torch.tensor(begin, device=device).unsqueeze(1)
        columns = start + torch.arange(width, device=device)
        ahead = columns - (frame.length.unsqueeze(1) - 1)  # 0 at the last token, then the drafts
        tokens = batch.tokens if frame.lines is None else batch.tokens[frame.lines]
        ids = torch.where(
            ahead < 0,
            tokens.gather(1, columns.clamp(max=batch.columns)),
            ids.gather(1, ahead.clamp(0, count - 1)),
        )
        later = places.gather(1, ahead.clamp(0, count - 1)).masked_fill(ahead >= count, batch.columns)
        places = torch.where(ahead < 0, columns, later)
        mask = self.visible(batch, places, max(frame.lengths) + count - 1)
        wanted = (frame.length - 1).unsqueeze(1) - start + torch.arange(count, device=device)
        wanted = wanted.clamp(0, width - 1)  # an ended row's may lie anywhere
        return member(ids, places, mask, frame.lines, (wanted, min(behind))).to(device)

    def draft(self, batch: _Batch, frame: _Round):
        """Drafts (R, D), the drafter's logits of each, and the ids seen before each position (None: unused).

        A pair's aligner reads all W positions, since the law needs its logits there: D = W. Another drafter
        has nothing to say of the last one: D = W - 1.
        """
        seen, drafted = frame.seen, frame.last[:, :0]
        drafts, logits, seens = [], [], []
        count = frame.width if self.pair else frame.width - 1
        for i in range(count):
            if i == 0:
                found = self.read(batch, batch.members[1], frame, drafted)[:, 0]
            else:
                at = slice(i, i + 1)
                found = batch.members[1](drafts[-1], frame.places[:, at], frame.mask[:, :, at], frame.lines)
                found = found[:, 0].to(batch.device)
            logits.append(found)
            seens.append(seen)
            law = draft_law(found, self.params, seen, self.eos, self.proposes and not self.pair)
            drafts.append(frame.noise.draw(law, ALL, i).unsqueeze(1))
            seen = None if seen is None else seen.scatter(1, drafts[-1], True)
        for slot, length in zip(frame.slots, frame.lengths, strict=True):
            if count:
                batch.members[1].read[slot] = length - 1 + count
        seens += [] if self.pair else [seen]
        return torch.cat([drafted, *drafts], dim=1), logits, seens

    def verify(self, batch: _Batch, frame: _Round, drafted, draft_logits, seens) -> dict[str, torch.Tensor]:
        """What the law itself draws at every position, and what is known of it; all (R, W), by name."""
        logits = self.read(batch, batch.members[0], frame, drafted[:, : frame.width - 1]).flatten(0, 1)
        z_p = logits if self.proposes else None
        z_q = (
            torch.stack(draft_logits, dim=1).flatten(0, 1) if self.pair else None if self.proposes else logits
        )
        seen = None if frame.seen is None else torch.stack(seens, dim=1).flatten(0, 1)
        _, found = draw_laws(z_p, z_q, self.params, seen, self.eos, frame.noise)
        found = {key: value.view(-1, frame.width) for key, value in found.items()}
        return found | {"as_draft": found["token"][:, : drafted.shape[1]] == drafted}

    def accept(self, batch: _Batch, frame: _Round, found: dict[str, torch.Tensor], max_new_tokens: int):
        """Moves every row on by what it keeps, up to the first token that was not the draft's.

        Returns the rows worked on, and how many of how many drafts were kept. Fetching what was found is the
        round's one wait for the device.
        """
        width, tokens = frame.width, found["token"]
        kept = found["as_draft"][:, : width - 1].long().cumprod(dim=1).sum(dim=1) + 1
        found = fetch(found | {"kept": kept.unsqueeze(1)})
        report = {key: value.tolist() for key, value in found.items()}
        counts = [count for (count,) in report.pop("kept")]
        ahead = torch.arange(width, device=batch.device)
        columns = (frame.length.unsqueeze(1) + ahead).clamp(max=batch.columns)
        lines = slice(None) if frame.lines is None else frame.lines
        batch.tokens[lines] = batch.tokens[lines].scatter(1, columns, tokens)  # what is not kept: until later
        batch.length[lines] = torch.minimum(frame.length + kept, batch.end[lines])  # where an ended row stays
        batch.step[lines] += kept
        if batch.seen is not None:
            mine = torch.where(ahead < kept.unsqueeze(1), tokens, tokens[:, :1]).clamp(min=0)
            batch.seen[lines] = frame.seen.scatter(1, mine, True)
        worked, agreed, compared = [], 0, 0
        for line, slot in enumerate(frame.slots):
            row = batch.rows[slot]
            if row is None:  # it has ended, and its line goes on until the gaps are closed
                continue
            mine = {key: values[line] for key, values in report.items()}
            row.proposal_forwards += self.proposes
            row.aligner_forwards += width if self.pair else self.aligns
            batch.lengths[slot] += counts[line]
            for member in batch.members:
                member.read[slot] = min(member.read[slot], batch.lengths[slot] - 1)
            kept = grow(row, mine, counts[line], self.ends, self.watch, max_new_tokens)
            compared, agreed = compared + kept[0], agreed + kept[1]
            if row.finish is not None:
                batch.rows[slot] = None
                for member in batch.members:
                    member.read[slot] = batch.lengths[slot] - 1
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
    cuda_graphs: bool = False,
) -> Iterator[list[Row]]:
    """Decodes all rows; yields after each round the rows it worked on, a finished one for the last time.

    drafter: for one model alone, a small one of the same vocabulary that drafts for it; a pair's is its
    aligner. draft_tokens: how many tokens a round drafts ahead (0 = the plain loop); None chooses by what
    rounds cost and keep. cuda_graphs: on a GPU, forwards are captured by shape (`graphs.py`). Rows come and
    go one by one, longest prompts first.
    """
    loop = _Loop(proposal, aligner, drafter, tokenizer, params, seed, stop, stop_token_ids)
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    waiting = deque((Row(index, loop.pair), prompt_ids[index], row_ids[index]) for index in order)
    slots = min(batch_size, len(order))
    columns = max((len(ids) for ids in prompt_ids), default=0) + max_new_tokens
    models = [model for model in (loop.verifier, loop.drafter) if model is not None]
    members = [open_slots(model, slots, columns, loop.vocab, cuda_graphs) for model in models]
    penalised = params.repetition_penalty != 1.0 or params.base_repetition_penalty != 1.0
    batch = _Batch(members, loop.verifier.device, loop.vocab if penalised else None)
    fixed = None if draft_tokens is None else draft_tokens + 1
    length = DraftLength(fixed if loop.drafter is not None else 1)
    while waiting or batch.alive:
        free = len(batch.rows) - len(batch.alive)
        enter = bool(waiting and free)
        if enter:
            new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            chosen, width = batch.admit(new, max_new_tokens), length.best()
        else:
            # Nobody waits. A CPU works for every line; another device would rather keep the shape for a
            # while.
            if free and (batch.device.type in TIGHT or 2 * free >= len(batch.rows)):
                batch.close_gaps()
            chosen, width = list(range(len(batch.rows))), length.choose()
        room = max(max_new_tokens - len(row.ids) for slot in chosen if (row := batch.rows[slot]))
        start = time.perf_counter()
        frame = loop.frame(batch, chosen, min(width, room))
        drafts = loop.draft(batch, frame)
        middle = time.perf_counter()
        found = loop.verify(batch, frame, *drafts)
        worked, agreed, compared = loop.accept(batch, frame, found, max_new_tokens)
        length.learn(agreed, compared)
        if not enter:
            length.clock(frame.width, middle - start, time.perf_counter() - middle)
        yield worked
