"""A round of decoding for rows of many aligners and many settings, after `speculation`.

    rows -> drafts by each aligner -> one forward of the proposal over all -> a law for each kind of settings

The proposal's forward depends on neither the aligner nor the settings, and a law only on its logits and
settings: so all rows share the first, and rows of equal settings the second, whatever their aligners.
"""

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ram.decoding.cache import Hold, Part, Pool, cat
from ram.decoding.par import ALL, NEG_INF, Noise, PARParams, seen_mask
from ram.decoding.rows import Row, StopWatch
from ram.decoding.speculation import draft_law, draw_laws, fetch, grow


@dataclass(eq=False)
class Member:
    """A model and the pool that holds its keys and values; of an aligner also the ids that end a pair's
    answer.
    """

    model: Any
    pool: Pool
    eos: tuple[int, ...] = ()


@dataclass(eq=False)
class Job:
    """A row that is decoded: what it wants and how far it is.

    drafter: an aligner, of its own pair or, where the proposal decodes alone, any; None drafts nothing.
    logprobs: of the tokens of the latest round, where wanted.
    """

    row: Row
    tokens: list[int]  # prompt and answer
    params: PARParams
    pair: bool
    drafter: Member | None
    watch: StopWatch
    max_new_tokens: int
    seed: int
    row_id: int
    eos: tuple[int, ...]
    stop_token_ids: tuple[int, ...] = ()  # which end the answer, too
    wants: int | None = None  # likeliest tokens to report; None for no log-probabilities
    line: int = -1
    holds: dict[Member, Hold] = field(default_factory=dict)
    logprobs: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = len(self.tokens) + self.max_new_tokens
        p = self.params
        self.penalised = p.repetition_penalty != 1.0 or p.base_repetition_penalty != 1.0

    @property
    def unread(self) -> int:
        return max(hold.unread for hold in self.holds.values())


class Failed(Exception):
    """Some rows cannot go on; the others are none the worse."""

    def __init__(self, jobs: list[Job], error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.jobs = jobs


class Took(NamedTuple):
    """What a round took: tokens of the proposal's forward, seconds of a draft (None where none followed
    another) and of the forward and the laws; how many drafts were compared and how many kept, by whether they
    were for pairs.
    """

    tokens: int
    step: float | None
    verify: float
    kept: dict[bool, list[int]]


class _Group(NamedTuple):
    """Rows of equal settings, whose laws are computed together."""

    jobs: list[Job]
    at: torch.Tensor | slice  # which rows of the frame
    seens: list[torch.Tensor | None]  # (R, V) ids seen before each position


class _Frame:
    """Rows that take the same number of positions in a round; R rows, W = width."""

    def __init__(self, jobs: list[Job], width: int, columns: int, vocab: int, seen, device) -> None:
        self.jobs, self.width, self.device = jobs, width, device
        self.count = width if jobs[0].pair else width - 1  # drafts
        numbers = [
            (job.line, len(job.tokens), job.end, job.tokens[-1], len(job.row.ids), job.row_id, job.seed)
            for job in jobs
        ]
        numbers = torch.tensor(numbers, device=device).unsqueeze(-1).unbind(1)  # each (R, 1)
        lines, length, end, self.last, step, row_ids, seeds = numbers
        self.lines, ahead = lines.squeeze(1), torch.arange(width, device=device)
        wanted = length - 1 + ahead
        self.places = torch.where(wanted < end - 1, wanted, columns)  # (R, W)
        self.longest = min(max(len(job.tokens) for job in jobs) - 1 + width, columns)
        noise = (seeds.expand(-1, width), row_ids.expand(-1, width), step + ahead)
        self.noise = Noise(*noise, vocab)
        self.drafts: list[torch.Tensor] = []  # (R, 1) each
        self.draft_logits: list[torch.Tensor] = []  # (R, V) each
        self.groups = self._group(seen)

    def _group(self, seen: torch.Tensor | None) -> list[_Group]:
        rows = defaultdict(list)
        for index, job in enumerate(self.jobs):
            rows[job.params, job.eos, job.pair].append(index)
        found = []
        for mine in rows.values():
            at = ALL if len(rows) == 1 else torch.tensor(mine, device=self.device)
            jobs = [self.jobs[index] for index in mine]
            found.append(_Group(jobs, at, [seen[self.lines[at]] if jobs[0].penalised else None]))
        return found

    @property
    def drafted(self) -> torch.Tensor:
        """(R, D) the drafts so far."""
        return torch.cat([self.last[:, :0], *self.drafts], dim=1)

    def draw_drafts(self, logits: torch.Tensor) -> torch.Tensor:
        """The next draft of each row (R,) from its drafter's logits (R, V)."""
        column, found = len(self.drafts), torch.empty_like(self.last[:, 0])
        for group in self.groups:
            job, seen = group.jobs[0], group.seens[-1]
            law = draft_law(logits[group.at], job.params, seen, job.eos, not job.pair)
            found[group.at] = mine = self.noise.draw(law, group.at, column)
            group.seens.append(None if seen is None else seen.scatter(1, mine.unsqueeze(1), True))
        self.drafts.append(found.unsqueeze(1))
        self.draft_logits.append(logits)
        return found

    def draw(self, group: _Group, logits: torch.Tensor) -> list[dict[str, list]]:
        """What the laws of a group's rows draw at their W positions and what is known of that, row by row.

        logits: (R, W, V) of the proposal, for all rows of the frame.
        """
        (jobs, at, seens), drafted, width = group, self.drafted, self.width
        job, seen, z_q = jobs[0], None, None
        if seens[0] is not None:
            seen = torch.stack(seens[:width], dim=1).flatten(0, 1)
        if job.pair:
            z_q = torch.stack([each[at] for each in self.draft_logits], dim=1).flatten(0, 1)
        z_p = logits[at].flatten(0, 1)
        laws, found = draw_laws(z_p, z_q, job.params, seen, job.eos, self.noise, at)
        found = {key: value.view(-1, width) for key, value in found.items()}
        found |= {"as_draft": found["token"][:, : drafted.shape[1]] == drafted[at]}
        tokens, laws = found["token"], laws.view(-1, width, laws.shape[-1])
        logprobs = [
            [] if job.wants is None else _report(laws[index], tokens[index], job.wants)
            for index, job in enumerate(jobs)
        ]
        found = {key: value.tolist() for key, value in fetch(found).items()} | {"logprobs": logprobs}
        return [{key: values[index] for key, values in found.items()} for index in range(len(jobs))]


def _report(laws: torch.Tensor, tokens: torch.Tensor, count: int) -> list:
    """Of each position the token's log-probability and the likeliest tokens with theirs; (W, V), (W,).

    What stands for a token that has no law (-1) means nothing: its row ends with an error.
    """
    chosen = laws.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1).tolist()
    values, ids = (each.tolist() for each in laws.topk(min(count, laws.shape[1]), dim=1))
    return [
        (own, [(token, value) for token, value in zip(ids[i], values[i], strict=True) if value > NEG_INF])
        for i, own in enumerate(chosen)
    ]


class Rounds:
    """Decodes jobs round by round, at most `lines` at once."""

    def __init__(self, proposal: Member, vocab_size: int, lines: int) -> None:
        self.proposal, self.vocab, self.lines = proposal, vocab_size, lines
        self.device, self.columns = proposal.pool.device, proposal.pool.columns
        self.free = list(range(lines))
        self.seen: torch.Tensor | None = None  # (lines, V), from the first penalty on

    def enter(self, job: Job) -> bool:
        """Gives a job its line and positions, where there are some; one that fails here has taken none."""
        if not self.free:
            return False
        job.line, count = self.free[-1], job.end - 1  # the last token is never read
        with contextlib.ExitStack() as undo:
            for member in filter(None, (self.proposal, job.drafter)):
                hold = member.pool.admit(job.line, job.tokens, count)
                if hold is None:
                    return False
                undo.callback(member.pool.give_back, hold.positions)
                job.holds[member] = hold
            if job.penalised:
                if self.seen is None:
                    self.seen = torch.zeros(self.lines, self.vocab, dtype=torch.bool, device=self.device)
                self.seen[job.line] = seen_mask(torch.tensor([job.tokens]), self.vocab)[0].to(self.device)
            undo.pop_all()
        self.free.pop()
        return True

    def leave(self, job: Job) -> None:
        """Takes a job's line back; what it has read stays for others."""
        self.free.append(job.line)
        for member, hold in job.holds.items():
            member.pool.release(hold)
        job.holds = {}

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job], widths, chunks: Sequence[tuple[Job, int]] = ()) -> Took:
        """Decodes some tokens for each of the jobs, and reads so many tokens of other jobs' prompts.

        widths: at most how many tokens, by whether a pair decodes (True) or the proposal alone (False).

        Raises Failed where an aligner or a law fails for some.
        """
        frames = []
        for pair, drafted in ((True, True), (False, True), (False, False)):
            wide = widths[pair]
            mine = [job for job in jobs if job.pair == pair]
            if not pair:
                mine = [job for job in mine if (job.drafter is not None and wide > 1) == drafted]
            if mine:
                mine.sort(
                    key=lambda job: (hash(job.drafter.pool.kind), id(job.drafter)) if job.drafter else ()
                )
                wide = min(wide, max(job.max_new_tokens - len(job.row.ids) for job in mine)) if drafted else 1
                frames.append(_Frame(mine, wide, self.columns, self.vocab, self.seen, self.device))
        for member in {job.drafter: None for job, _ in chunks if job.drafter}:
            with blamed([job for job, _ in chunks if job.drafter is member]):
                parts = self.chunk(member, chunks)
                if parts:
                    member.pool(parts)
        steps = [self.draft(frame) for frame in frames if frame.count]
        start = time.perf_counter()
        parts, orders = [], []
        for frame in frames:
            mine, order = self.parts(self.proposal, frame.jobs, frame.drafted[:, : frame.width - 1])
            parts, orders = parts + mine, [*orders, (len(mine), order)]
        more = self.chunk(self.proposal, chunks)
        logits = iter(self.proposal.pool(parts + more) if parts + more else ())
        kept, failed = {True: [0, 0], False: [0, 0]}, None
        for job, count in chunks:
            for hold in job.holds.values():
                hold.read += min(count, hold.unread)
        for frame, (count, order) in zip(frames, orders, strict=True):
            mine = arranged([next(logits) for _ in range(count)], order)
            for group in frame.groups:
                jobs = group.jobs
                try:
                    found = frame.draw(group, mine)
                    for index, job in enumerate(group.jobs):
                        jobs = [job]
                        for i, count in enumerate(self.accept(job, found[index], frame)):
                            kept[job.pair][i] += count
                except Exception as error:
                    failed = Failed(jobs, error)
        if failed:
            raise failed
        tokens = sum(part.ids.numel() for part in parts + more)
        step = next((seconds for seconds in steps if seconds is not None), None)
        return Took(tokens, step, time.perf_counter() - start, kept)

    def draft(self, frame: _Frame) -> float | None:
        """Lets each aligner draft for its rows.

        A pair's law needs its aligner's logits at all W positions, so there are W drafts; the last one for a
        proposal alone would be in vain. Returns the seconds of one that followed another.
        """
        spans, found, count = [], [], frame.count
        for member, mine in itertools.groupby(frame.jobs, key=lambda job: job.drafter):
            start = spans[-1][1].stop if spans else 0
            spans.append((member, slice(start, start + len(list(mine)))))
        kinds = []  # aligners whose forwards are one, and which rows are theirs
        for _, same in itertools.groupby(spans, key=lambda span: span[0].pool.kind):
            members, slices = zip(*same, strict=True)
            kinds.append((members, slices, slice(slices[0].start, slices[-1].stop)))
        for members, slices, whole in kinds:
            with blamed(frame.jobs[whole]):
                found += self.first_drafts(members, [(frame.jobs[mine], frame.last[mine]) for mine in slices])
        ids = frame.draw_drafts(cat(found))
        if count == 1:
            return None
        start, steps = time.perf_counter(), []
        for members, slices, whole in kinds:
            with blamed(frame.jobs[whole]):
                pools, lines = [member.pool for member in members], [frame.lines[mine] for mine in slices]
                steps.append((pools[0].steps(pools, lines, frame.longest), whole))
        for column in range(1, count):
            found = []
            for step, whole in steps:
                with blamed(frame.jobs[whole]):
                    found.append(step.step(ids[whole], frame.places[whole, column]).to(self.device))
            ids = frame.draw_drafts(cat(found))
        for step, _ in steps:
            step.close()
        return (time.perf_counter() - start) / (count - 1)

    def first_drafts(self, members: Sequence[Member], rows) -> list[torch.Tensor]:
        """Logits (R, V) after each row's last token, by aligner; rows: each one's jobs and last tokens."""
        made = [
            self.parts(member, jobs, last[:, :0]) for member, (jobs, last) in zip(members, rows, strict=True)
        ]
        pools = [member.pool for member in members]
        logits = iter(pools[0].together(pools, [parts for parts, _ in made]))
        ordered = (arranged([next(logits) for _ in parts], order) for parts, order in made)
        return [each[:, 0].to(self.device) for each in ordered]

    def parts(self, member: Member, jobs: Sequence[Job], drafts: torch.Tensor):
        """Parts for what a model has not read of each row, its last token and the drafts (R, D): rows that
        lag alike go together. And where each job's row is among theirs, None where they are in order.
        """
        rows = defaultdict(list)
        for index, job in enumerate(jobs):
            rows[job.holds[member].unread.bit_length()].append(index)
        order = [index for mine in rows.values() for index in mine]
        if len(rows) == 1:
            return [self.part(member, jobs, drafts)], None
        parts = [self.part(member, [jobs[i] for i in mine], drafts[mine]) for mine in rows.values()]
        return parts, torch.tensor(order, device=self.device).argsort()

    def part(self, member: Member, jobs: Sequence[Job], drafts: torch.Tensor) -> Part:
        holds, count = [job.holds[member] for job in jobs], 1 + drafts.shape[1]
        most = max(hold.unread for hold in holds)
        ids = [hold.tokens[hold.read :] for hold in holds]
        ids = [mine + [0] * (most + count - len(mine)) for mine in ids]
        numbers = [
            (hold.read, len(hold.tokens), job.end, job.line) for hold, job in zip(holds, jobs, strict=True)
        ]
        ids, numbers = (torch.tensor(each, device=self.device) for each in (ids, numbers))
        start, length, end, lines = numbers.unsqueeze(-1).unbind(1)
        columns = start + torch.arange(most + count, device=self.device)
        fits = (columns < length - 1 + count) & (columns < end - 1)
        wanted = length - 1 - start + torch.arange(count, device=self.device)  # the last token, the drafts
        if count > 1:
            ids.scatter_(1, wanted[:, 1:], drafts)
        seen = min(max(len(job.tokens) for job in jobs) - 1 + count, self.columns)
        places = torch.where(fits, columns, self.columns)
        return Part(ids, places, lines.squeeze(1), seen, wanted if most else None)

    def chunk(self, member: Member, chunks: Sequence[tuple[Job, int]]) -> list[Part]:
        """A part for each prompt that is only read for now; no logits are wanted."""
        found = []
        for job, count in chunks:
            hold = job.holds.get(member)
            if hold is None or not hold.unread:
                continue
            end = hold.read + min(count, hold.unread)
            ids, places, lines = (
                torch.tensor(each, device=self.device)
                for each in ([hold.tokens[hold.read : end]], [list(range(hold.read, end))], [job.line])
            )
            found.append(Part(ids, places, lines, end, places[:, :0]))
        return found

    def accept(self, job: Job, found: dict[str, list], frame: _Frame) -> tuple[int, int]:
        """Moves a row on by what it keeps, up to the first token that was not the draft's; gives how many
        drafts were compared and kept.
        """
        same, row, before = found["as_draft"][: frame.width - 1], job.row, len(job.row.ids)
        count = 1 + (same.index(False) if False in same else len(same))
        row.proposal_forwards += 1
        row.aligner_forwards += frame.width * job.pair
        ends = {*job.eos, *job.stop_token_ids}
        tried = grow(row, found, count, ends, job.watch, job.max_new_tokens)
        length, new = len(job.tokens), row.ids[before:]
        job.tokens += new
        job.logprobs = found["logprobs"][: len(new)]
        if job.penalised:
            self.seen[job.line, torch.tensor(new, device=self.device)] = True
        for member, count in ((self.proposal, frame.width), (job.drafter, frame.count)):
            if not count:
                continue
            hold = job.holds[member]
            hold.read = min(length - 1 + count, len(job.tokens) - 1)
            member.pool.note(hold)
        return tried


def arranged(logits: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    """(R, C, V) of parts, row by row as they were given."""
    found = cat(logits)
    return found if order is None else found[order]


@contextlib.contextmanager
def blamed(jobs: Sequence[Job]):
    """What fails inside is their aligner's fault."""
    try:
        yield
    except Exception as error:
        raise Failed(list(jobs), error) from error
