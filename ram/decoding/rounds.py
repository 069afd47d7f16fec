"""One round of decoding: draft, verify, accept, for rows of many aligners and many settings.

    rows -> drafts by each aligner -> one forward of the verifier over all -> a law for each kind of settings

A draft and the law's own draw use the same counter-based noise, so a draft is exactly the token that the
plain loop would have drawn there, or it is rejected: the output is the plain loop's for every mode and width.
A pair's aligner is its own drafter, and its logits enter the law. The verifier's forward depends on neither
the aligner nor the settings, so all rows share it; rows of equal settings share the law. A row's first round
also reads its prompt.

Shapes: R rows of a frame, W positions that a round verifies, D drafts, V vocabulary.
"""

import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ram.decoding.cache import ServedModel
from ram.decoding.frames import Drafters, Frame, RowSet, RowState, fetch
from ram.decoding.par import ALL
from ram.decoding.rows import append_token
from ram.decoding.scheduler import Ticket
from ram.decoding.steps import Part, cat

Chunks = Sequence[tuple[Ticket, int]]  # rows of whose prompts a round only reads some tokens


class RowsFailed(Exception):
    """A model failed for some rows; the other rows can go on."""

    def __init__(self, tickets: Sequence[Ticket], error: Exception) -> None:
        super().__init__(str(error))
        self.tickets, self.error = list(tickets), error


class RoundResult(NamedTuple):
    """The costs and the outcome of a round.

    Args:
        tokens: tokens of the verifier's forward.
        step: seconds of one drafting step; None if there was none that could be timed.
        verify: seconds of the verifier's forward and of the laws.
        agreement: drafts compared and drafts kept, by whether a pair decoded the row.
        failures: rows whose law failed, with the error.
    """

    tokens: int
    step: float | None
    verify: float
    agreement: dict[bool, list[int]]
    failures: list[tuple[Ticket, Exception]]


class Rounds:
    """Decodes the rows of an engine round by round."""

    def __init__(self, verifier: ServedModel) -> None:
        limits = verifier.pool.limits
        self.verifier, self.device = verifier, verifier.pool.device
        self.columns, self.free = limits.columns, list(range(limits.rows))
        self.state = RowState(limits.rows, limits.columns, limits.vocab_size, self.device)
        self.sets: dict[tuple[bool, bool], tuple[list[Ticket], RowSet]] = {}  # of the latest round

    def enter(self, ticket: Ticket) -> bool:
        """Give a row its line and positions; return False if too few are free. A failure takes nothing."""
        if not self.free:
            return False
        assert ticket.end - 1 <= self.columns
        ticket.line = self.free[-1]
        with contextlib.ExitStack() as undo:
            undo.callback(ticket.allocations.clear)
            for member in filter(None, (ticket.role.verifier, ticket.role.drafter)):
                # The last token is never read.
                allocation = member.pool.admit(ticket.line, ticket.tokens, ticket.end - 1)
                if allocation is None:
                    return False
                undo.callback(member.pool.positions.undo, allocation)
                ticket.allocations[member] = allocation
            self.state.admit(ticket)
            undo.pop_all()
        self.free.pop()
        return True

    def leave(self, ticket: Ticket) -> None:
        """Take a row's line back; its pools may keep what it has read for other rows."""
        self.free.append(ticket.line)
        for member, allocation in ticket.allocations.items():
            member.pool.positions.release(allocation)
        ticket.allocations = {}
        self.sets.clear()  # they hold the row's models

    @torch.inference_mode()
    def run(self, tickets: Sequence[Ticket], widths: dict[bool, int], chunks: Chunks = ()) -> RoundResult:
        """Decode some tokens of each row, and read some tokens of other rows' prompts.

        Args:
            widths: most positions to verify per row, by whether a pair decodes it.

        Raises:
            RowsFailed: if a drafter fails; nothing has changed then.
        """
        frames = self.frames(tickets, widths)
        self.read_drafters(chunks)
        steps = [self.draft(frame) for frame in frames if frame.count]
        start = time.perf_counter()
        logits, tokens = self.verify(frames, chunks)
        drawn, failures = [], []
        for frame, frame_logits in zip(frames, logits, strict=True):
            for group, seens in zip(frame.rows.groups, frame.seens, strict=True):
                try:
                    report, logprobs = frame.draw(group, seens, frame_logits)
                    kept = report["kept"].squeeze(1)
                    seen = seens[0] if seens else None
                    self.state.advance(frame.lines[group.at], kept, report["token"], seen)
                    drawn.append((frame, group, report, logprobs))
                except Exception as error:
                    failures += [(ticket, error) for ticket in group.tickets]
        reports = fetch([report for _, _, report, _ in drawn])  # the one wait for the device
        agreement = {True: [0, 0], False: [0, 0]}
        for (frame, group, _, logprobs), report in zip(drawn, reports, strict=True):
            for index, ticket in enumerate(group.tickets):
                ticket.logprobs = logprobs[index]
                try:
                    row_report = {key: values[index] for key, values in report.items()}
                    counts = self.accept(ticket, row_report, frame)
                except Exception as error:
                    failures.append((ticket, error))
                    continue
                for i, count in enumerate(counts):
                    agreement[group.role.is_pair][i] += count
        step = next((seconds for seconds in steps if seconds is not None), None)
        return RoundResult(tokens, step, time.perf_counter() - start, agreement, failures)

    def frames(self, tickets: Sequence[Ticket], widths: dict[bool, int]) -> list[Frame]:
        """Group the rows by the number of positions that they take: pairs, drafted rows, other rows."""
        frames, sets = [], {}
        kinds: dict[tuple[bool, bool], list[Ticket]] = defaultdict(list)
        for ticket in tickets:
            is_pair, drafter = ticket.role.is_pair, ticket.role.drafter
            kinds[is_pair, is_pair or (drafter is not None and widths[False] > 1)].append(ticket)
        for (is_pair, drafted), rows in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True):
            latest = self.sets.get((is_pair, drafted))
            if latest is None or latest[0] != rows:
                latest = rows, RowSet(rows, drafted, self.device)
            sets[is_pair, drafted] = latest
            room = max(ticket.end - len(ticket.tokens) for ticket in rows)
            width = min(widths[is_pair], room) if drafted else 1
            count = rows[0].role.draft_count(width) if drafted else 0
            frames.append(Frame(latest[1], width, count, self.state))
        self.sets = sets
        return frames

    def draft(self, frame: Frame) -> float | None:
        """Draw all drafts of a frame; return the seconds of one step that follows another.

        A pair's law needs its aligner's logits at all W positions, so a pair has W drafts; for one model
        alone a draft at the last position would be useless.
        """
        steady = frame.count > 1 and not any(
            ticket.allocations[ticket.role.draft_model].unread for ticket in frame.tickets
        )
        ids = frame.last.squeeze(1)
        if not steady:
            logits = [self.first_drafts(frame, drafters) for drafters in frame.rows.drafters]
            ids = frame.draw_drafts(cat(logits))
        if frame.count == 1:
            return None
        start, steps, first = time.perf_counter(), [], len(frame.drafts)
        for members, slices, rows in frame.rows.drafters:
            with failing(frame.tickets[rows]):
                pools = [member.pool for member in members]
                lines = [frame.lines[own] for own in slices]
                spans = [span_of(frame.tickets[own]) for own in slices]
                places = frame.places[rows, first : frame.count]
                steps.append((pools[0].steps(pools, lines, spans, frame.longest, places), rows))
        for _ in range(first, frame.count):
            logits = []
            for step, rows in steps:
                with failing(frame.tickets[rows]):
                    logits.append(step.step(ids[rows]).to(self.device))
            ids = frame.draw_drafts(cat(logits))
        for step, _ in steps:
            step.close()
        return (time.perf_counter() - start) / (frame.count - first)

    def first_drafts(self, frame: Frame, drafters: Drafters) -> torch.Tensor:
        """Read what the drafters have not read; logits (R, V) after each row's last token."""
        with failing(frame.tickets[drafters.rows]):
            pairs = zip(drafters.members, drafters.slices, strict=True)
            made = [self.parts(member, frame, rows, frame.last[:, :0]) for member, rows in pairs]
            pools = [member.pool for member in drafters.members]
            logits = iter(pools[0].together(pools, [parts for parts, _ in made]))
            ordered = [in_order([next(logits) for _ in parts], order) for parts, order in made]
            return cat([rows[:, 0].to(self.device) for rows in ordered])

    def verify(self, frames: Sequence[Frame], chunks: Chunks) -> tuple[list[torch.Tensor], int]:
        """One forward of the verifier; logits (R, W, V) of each frame, and the tokens that it read."""
        parts, counts, orders = [], [], []
        for frame in frames:
            own, order = self.parts(self.verifier, frame, ALL, frame.drafted[:, : frame.width - 1])
            parts += own
            counts.append(len(own))
            orders.append(order)
        parts += self.chunk_parts(self.verifier, chunks)
        logits = iter(self.verifier.pool(parts)) if parts else iter(())
        for ticket, count in chunks:
            for allocation in ticket.allocations.values():
                allocation.read += min(count, allocation.unread)
        ordered = [
            in_order([next(logits).to(self.device) for _ in range(count)], order)
            for count, order in zip(counts, orders, strict=True)
        ]
        return ordered, sum(part.ids.numel() for part in parts)

    def read_drafters(self, chunks: Chunks) -> None:
        for drafter in {ticket.role.drafter: None for ticket, _ in chunks if ticket.role.drafter is not None}:
            with failing([ticket for ticket, _ in chunks if ticket.role.drafter is drafter]):
                if parts := self.chunk_parts(drafter, chunks):
                    drafter.pool(parts)

    def parts(
        self, member: ServedModel, frame: Frame, rows: slice, drafts: torch.Tensor
    ) -> tuple[list[Part], torch.Tensor | None]:
        """Make the parts that read each row's unread tokens, its last token and its drafts.

        Rows with a similar number of unread tokens form a part.

        Args:
            rows: the rows of the frame that the member reads.
            drafts: (R of the frame, D).

        Returns:
            The parts, and the index of each row among the rows of the parts; None if they are in order.
        """
        tickets = frame.tickets[rows]
        unread = [ticket.allocations[member].unread for ticket in tickets]
        buckets: dict[int, list[int]] = defaultdict(list)
        for index, count in enumerate(unread):
            buckets[max(count, 1).bit_length()].append(index)
        if len(buckets) == 1:
            return [self.part(member, frame, rows, tickets, drafts)], None
        order = list(itertools.chain(*buckets.values()))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        start = rows.start or 0
        moved = torch.tensor([[start + index for index in order], inverse], device=self.device)
        parts, begin = [], 0
        for indices in buckets.values():
            at, begin = moved[0, begin : begin + len(indices)], begin + len(indices)
            parts.append(self.part(member, frame, at, [tickets[index] for index in indices], drafts))
        return parts, moved[1]

    def part(
        self,
        member: ServedModel,
        frame: Frame,
        at: torch.Tensor | slice,
        tickets: Sequence[Ticket],
        drafts: torch.Tensor,
    ) -> Part:
        allocations = [ticket.allocations[member] for ticket in tickets]
        unread = [allocation.unread for allocation in allocations]
        last, drafts, lines, count = frame.last[at], drafts[at], frame.lines[at], 1 + drafts.shape[1]
        seen = min(max(len(ticket.tokens) for ticket in tickets) - 1 + count, self.columns)
        span, most = span_of(tickets), max(unread)
        if not most:
            return Part(torch.cat([last, drafts], dim=1), frame.places[at, :count], lines, span, seen)
        start = torch.tensor([[allocation.read] for allocation in allocations], device=self.device)
        length, end = frame.length[at], frame.end[at]
        columns = start + self.state.ahead[: most + count]
        needed = length - 1 - start + self.state.ahead[:count]  # the last token, then the drafts
        ids = self.state.tokens[lines.unsqueeze(1), columns.clamp(max=self.columns)]
        ids.scatter_(1, needed, torch.cat([last, drafts], dim=1))
        fits = (columns < length - 1 + count) & (columns < end - 1)
        places = torch.where(fits, columns, self.columns)
        return Part(ids.clamp(min=0), places, lines, span, seen, needed, min(unread))

    def chunk_parts(self, member: ServedModel, chunks: Chunks) -> list[Part]:
        """A part for each prompt that is only read; it needs no logits."""
        parts = []
        for ticket, count in chunks:
            allocation = ticket.allocations.get(member)
            if allocation is None or not allocation.unread:
                continue
            line, begin = ticket.line, allocation.read
            end = begin + min(count, allocation.unread)
            places = self.state.ahead[begin:end].unsqueeze(0)
            ids = self.state.tokens[line : line + 1, begin:end]
            lines = torch.arange(line, line + 1, device=self.device)
            span = slice(line, line + 1)
            parts.append(Part(ids, places, lines, span, end, places[:, :0], end - begin - 1))
        return parts

    def accept(self, ticket: Ticket, report: dict[str, list], frame: Frame) -> tuple[int, int]:
        """Append the kept tokens to a row, up to one that ends it; report: one entry per position.

        Returns:
            The number of drafts that were compared, and of those that were kept.
        """
        row, length, role = ticket.row, len(ticket.tokens), ticket.role
        (count,), before = report["kept"], len(row.ids)
        ticket.uncovered = count == 0
        row.proposal_forwards += role.z_p == "verifier"
        row.aligner_forwards += frame.width if role.is_pair else role.z_q == "verifier"
        for position in range(count):
            if row.finish is None:
                last = len(row.ids) + 1 == ticket.request.max_new_tokens
                append_token(row, report, position, ticket.ends, last)
        ticket.tokens += row.ids[before:]
        ticket.logprobs = ticket.logprobs[: len(row.ids) - before]
        compared = report["compared"][: len(row.ids) - before]
        wasted = row.finish is not None and bool(compared and compared[-1])  # a draft beyond an end is no use
        reads = [(role.verifier, frame.width)]
        if frame.count:
            reads.append((role.draft_model, frame.count))
        for member, new in reads:
            allocation = ticket.allocations[member]
            allocation.read = min(length - 1 + new, len(ticket.tokens) - 1)
            member.pool.positions.note(allocation)
        return len(compared), sum(compared) - wasted


def span_of(tickets: Sequence[Ticket]) -> slice | None:
    """The lines of some rows as a slice, or None if they are not consecutive."""
    first = tickets[0].line
    consecutive = all(ticket.line == first + index for index, ticket in enumerate(tickets))
    return slice(first, first + len(tickets)) if consecutive else None


def in_order(logits: Sequence[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    """(R, C, V) of parts, with the rows in the order of the frame."""
    return cat(logits) if order is None else cat(logits)[order]


@contextlib.contextmanager
def failing(tickets: Sequence[Ticket]) -> Iterator[None]:
    """Attribute an error inside the context to these rows."""
    try:
        yield
    except Exception as error:
        raise RowsFailed(tickets, error) from error
