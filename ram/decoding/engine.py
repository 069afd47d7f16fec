"""One frozen proposal serves requests for many aligners: a thread that decodes, listeners that are told.

    submit -> waiting -> rows (a line and positions each) -> rounds -> Piece, Piece, ..., Done

Rows come and go between rounds (`rounds.py`): those of different aligners and settings share the proposal's
forward. An answer's tokens are those that `decoding.generate` gives for that request alone with its seed and
row id, since its noise depends on those and the position only.

Memory is decided by `max_tokens`: the proposal and each aligner have a pool of so many positions, allocated
once (`pool.py`), and a request enters when its prompt and the longest answer it may get fit into what is
free; until then it waits, and all that came later behind it. A long prompt is read in pieces, one per round,
beside what the others decode; short prompts that came later are read beside it.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch

from ram.decoding.cache import open_pool
from ram.decoding.par import signed
from ram.decoding.requests import (
    BadRequest,
    Busy,
    Closed,
    Done,
    EngineError,
    Listener,
    Piece,
    Request,
    TokenLogprobs,
    TooLong,
    UnknownAligner,
)
from ram.decoding.rounds import Failed, Job, Member, Rounds
from ram.decoding.rows import CHANGED, FELL_BACK, Row, ShownText, StopWatch, eos_token_ids
from ram.decoding.slots import has_slots
from ram.decoding.speculation import DraftLength

__all__ = [
    "BadRequest", "Busy", "Closed", "Done", "Engine", "EngineError", "Listener", "Piece", "Request", "Ticket",
    "TokenLogprobs", "TooLong", "UnknownAligner",
]  # fmt: skip
log = logging.getLogger("ram")
SPAN = 10  # seconds that the speed in the figures is of


@dataclass(eq=False)
class Ticket:
    """A request that was taken; the rest is the engine's."""

    request: Request
    listener: Listener
    member: Member | None  # of the aligner, as it was when the request came
    cancelled: bool = False
    job: Job | None = None
    shown: ShownText | None = None
    sent: int = 0  # tokens that the listener has heard of
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of those it has not


class Engine:
    """Decodes requests in a thread of its own.

    max_rows: requests decoded at once. max_tokens: positions of prompts and answers that are held at once.
    max_waiting: requests that may be held beyond max_rows. max_read: tokens of prompts read in one round;
    others wait so long for their next tokens. Listeners are called from the engine's thread and must not
    block; one that raises loses its request. Raises ValueError for a model that keeps no keys and values by
    position, or lacks rows for the tokenizer, or where memory lacks room for a pool.
    """

    def __init__(
        self,
        proposal,
        tokenizer,
        aligners: dict[str, Any],
        *,
        max_rows: int = 16,
        max_tokens: int = 16384,
        max_waiting: int = 256,
        max_read: int = 256,
    ) -> None:
        self.tokenizer, self.vocab = tokenizer, len(tokenizer)
        self.max_rows, self.max_tokens, self.max_waiting = max_rows, max_tokens, max_waiting
        self.max_read, self.columns = max_read, min(max_tokens, positions_of(proposal) or max_tokens)
        self.proposal = self.open(proposal, proposal)
        self.rounds = Rounds(self.proposal, self.vocab, max_rows)
        self.lengths = {True: DraftLength(), False: DraftLength()}  # of drafts for pairs, for the proposal
        self.lengths[False].draft, self.lengths[False].verify = (
            self.lengths[True].draft,
            self.lengths[True].verify,
        )
        self.aligners: dict[str, Member] = {}  # replaced, never changed: its thread reads it without the lock
        self.lock = threading.Condition()
        self.taken = 0  # requests whose listener has not heard Done
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []  # the engine's thread's own, first come first
        self.closing = self.broken = False
        self.counts, self.recent = Counter(), deque()
        for name, model in aligners.items():
            self.add_aligner(name, model)
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()

    def open(self, model, *pair) -> Member:
        if not has_slots(model) or model.config.vocab_size < self.vocab:
            raise ValueError(
                f"{type(model).__name__} cannot be served: expected a transformers decoder without a sliding "
                f"window or a state, with at least the tokenizer's {self.vocab} vocabulary rows"
            )
        try:
            pool = open_pool(model, self.max_tokens, self.max_rows, self.columns, self.vocab)
        except (MemoryError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise ValueError(
                f"no room for {self.max_tokens} positions and {self.max_rows} rows beside the weights "
                f"({reason}): lower engine.max_tokens or engine.max_rows"
            ) from None
        return Member(model, pool, eos_token_ids(self.tokenizer, *pair))

    # ---- what any thread may call -------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; its listener hears Pieces and, whatever happens, one Done.

        Raises an EngineError where it is not taken: BadRequest, UnknownAligner, TooLong, Busy, Closed.
        """
        with self.lock:
            if self.closing:
                raise Closed("decoding has stopped" if self.broken else "the server is shutting down")
            member = None
            if request.aligner is not None:
                member = self.aligners.get(request.aligner)
                if member is None:
                    known = ", ".join(sorted(self.aligners)) or "none"
                    raise UnknownAligner(f"unknown aligner {request.aligner!r}; known: {known}")
            self.check(request, member)
            if self.taken >= self.max_rows + self.max_waiting:
                raise Busy(f"{self.taken} requests are being answered or wait already; try again later")
            ticket, self.taken = Ticket(request, listener, member), self.taken + 1
            self.waiting.append(ticket)
            self.counts["requests"] += 1
            self.counts[f"aligner {request.aligner}"] += 1
            self.lock.notify_all()
        return ticket

    def check(self, request: Request, member: Member | None) -> None:
        ids, new = request.prompt_ids, request.max_new_tokens
        if not ids or min(ids) < 0 or max(ids) >= self.vocab:
            raise BadRequest(f"the prompt must have tokens, with ids from 0 to {self.vocab - 1}")
        if new < 1:
            raise BadRequest(f"max_new_tokens={new}: expected at least 1")
        limit = min(self.columns, (member and positions_of(member.model)) or self.columns)
        if len(ids) + new > limit:
            raise TooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {new}: together more than {limit}"
            )

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with Done("cancelled") before its next round, where it has not ended yet."""
        with self.lock:
            ticket.cancelled = True
            self.lock.notify_all()

    def add_aligner(self, name: str, model) -> None:
        """Serves an aligner from now on; one of the same name is replaced for requests yet to come.

        Raises ValueError as the constructor does.
        """
        member = self.open(model, self.proposal.model, model)
        with self.lock:
            self.aligners = {**self.aligners, name: member}

    def remove_aligner(self, name: str) -> None:
        """Refuses further requests for an aligner; those taken are finished. Raises UnknownAligner."""
        with self.lock:
            if name not in self.aligners:
                raise UnknownAligner(f"unknown aligner {name!r}")
            self.aligners = {key: member for key, member in self.aligners.items() if key != name}

    def figures(self) -> dict[str, Any]:
        """What was served since the start, and what is going on.

        tokens_per_second: of the last SPAN seconds. acceptance: of drafts for pairs. prefix_hits: requests
        that took over what was read of a prompt, and how many of the proposal's tokens. bytes: weights by
        model, and the pools.
        """
        with self.lock:
            counts, recent, now = Counter(self.counts), list(self.recent), time.monotonic()
            members = {"proposal": self.proposal, **{f"aligner {k}": v for k, v in self.aligners.items()}}
            waiting, running = len(self.waiting), len(self.running)
        drafted = max(counts["drafted"], 1)
        return {
            "alive": self.alive,
            "requests": counts["requests"],
            "finished": {reason: counts[reason] for reason in ("stop", "length", "cancelled", "error")},
            "by_aligner": {name[8:]: counts[name] for name in members if name != "proposal"},
            "prompt_tokens": counts["prompt_tokens"],
            "completion_tokens": counts["tokens"],
            "tokens_per_second": sum(count for at, count in recent if at > now - SPAN) / SPAN,
            "waiting": waiting,
            "rows": running,
            "rounds": counts["rounds"],
            "acceptance": counts["accepted"] / drafted,
            "fallback_fraction": counts[FELL_BACK] / drafted,
            "changed_fraction": counts[CHANGED] / drafted,
            "prefix_hits": {"requests": counts["hits"], "tokens": counts["hit_tokens"]},
            "bytes": {
                "weights": {name: weight_bytes(member.model) for name, member in members.items()},
                "pools": {name: member.pool.bytes for name, member in members.items()},
            },
        }

    @property
    def alive(self) -> bool:
        """Whether requests are decoded."""
        return self.thread.is_alive() and not self.broken

    def close(self, wait: bool = True) -> None:
        """Takes no more requests; returns when all taken are finished, or (wait=False) are cancelled."""
        with self.lock:
            self.closing = True
            if not wait:
                for ticket in [*self.waiting, *self.running]:
                    ticket.cancelled = True
            self.lock.notify_all()
        self.thread.join()

    # ---- the engine's thread ------------------------------------------------------------------------------

    def work(self) -> None:
        try:
            self.serve()
        except BaseException as error:  # a mistake of ours; nobody may wait for ever
            log.exception("the engine has stopped")
            with self.lock:
                self.closing = self.broken = True
                open_tickets, self.waiting, self.running = [*self.waiting, *self.running], deque(), []
            for ticket in open_tickets:
                what = f"the engine has stopped: {error}".split("\n")[0]
                self.tell(ticket, Done("error", len(ticket.request.prompt_ids), 0, {}, what))

    @torch.inference_mode()
    def serve(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.waiting or self.running or self.closing)
                if not (self.waiting or self.running):
                    return
                gone = [ticket for ticket in self.waiting if ticket.cancelled]
                for ticket in gone:
                    self.waiting.remove(ticket)
            for ticket in gone + [ticket for ticket in self.running if ticket.cancelled]:
                self.end(ticket, "cancelled")
            self.admit()
            if self.running:
                self.step()

    def admit(self) -> None:
        """Lets requests in while there is room, in the order in which they came."""
        while self.waiting and self.rounds.free:
            ticket = self.waiting[0]
            try:
                entered = self.enter(ticket)
            except Exception as error:
                log.exception("a request could not be started")
                entered, ticket.cancelled = True, True
                self.end(ticket, "error", error)
            if not entered:
                return
            with self.lock:
                self.waiting.remove(ticket)

    def enter(self, ticket: Ticket) -> bool:
        request, pair = ticket.request, ticket.member is not None
        drafter = ticket.member or next(iter(self.aligners.values()), None)
        limit = drafter and positions_of(drafter.model)
        if limit and limit < len(request.prompt_ids) + request.max_new_tokens:
            drafter = None
        watch = StopWatch(self.tokenizer, request.stop)
        job = Job(
            row=Row(0, pair),
            tokens=list(request.prompt_ids),
            params=request.params,
            pair=pair,
            drafter=drafter,
            watch=watch,
            max_new_tokens=request.max_new_tokens,
            seed=signed(request.seed),
            row_id=request.row_id,
            eos=(ticket.member or self.proposal).eos,
            stop_token_ids=request.stop_token_ids,
            wants=request.logprobs,
        )
        if not self.rounds.enter(job):
            return False
        ticket.job, ticket.shown = job, ShownText(watch)
        self.running.append(ticket)
        found = job.holds[self.proposal].read
        self.counts["prompt_tokens"] += len(request.prompt_ids)
        self.counts["hits"] += found > 0
        self.counts["hit_tokens"] += found
        return True

    def plan(self) -> tuple[list[Job], list[tuple[Job, int]]]:
        """Who decodes in the next round, and of which prompts only a part is read.

        The oldest prompt has half of what a round reads for sure; short ones come first in the rest.
        """
        jobs = [ticket.job for ticket in self.running]
        decode, new = [job for job in jobs if job.row.ids], [job for job in jobs if not job.row.ids]
        room = self.max_read
        mine = min(new[0].unread, max(room // 2, 1)) if new else 0
        room -= mine
        for job in sorted(new[1:], key=lambda job: job.unread):
            if job.unread > room:
                break
            decode.append(job)
            room -= job.unread
        if not new:
            return decode, []
        if new[0].unread <= mine + room:
            return [*decode, new[0]], []
        return decode, [(new[0], mine + room)]

    def step(self) -> None:
        """One round, and what it gives to the listeners."""
        jobs, chunks = self.plan()
        widths = self.widths(jobs, sum(count for _, count in chunks))
        tickets = {ticket.job: ticket for ticket in self.running}
        before = sum(len(job.row.ids) for job in jobs)
        try:
            took = self.rounds.run(jobs, widths, chunks)
        except Exception as error:
            log.exception("rows could not go on")
            everyone = [*jobs, *(job for job, _ in chunks)]
            failed = error if isinstance(error, Failed) else Failed(everyone, error)
            for job in failed.jobs:
                self.end(tickets[job], "error", failed)
        else:
            for pair, (compared, agreed) in took.kept.items():
                self.lengths[pair].learn(agreed, compared)
            if took.tokens:
                self.lengths[True].clock_tokens(bucket(took.tokens), took.step, took.verify)
        now, new = time.monotonic(), sum(len(job.row.ids) for job in jobs) - before
        with self.lock:
            self.counts["rounds"] += 1
            self.counts["tokens"] += new
            self.recent.append((now, new))
            while self.recent[0][0] < now - SPAN:
                self.recent.popleft()
        for job in jobs:
            if job.holds:
                self.tell_more(tickets[job])

    def widths(self, jobs: list[Job], read: int) -> dict[bool, int]:
        """How many tokens the next round may give each row, by whether a pair decodes it; read: tokens of
        prompts beside.

        Where all have just come there is no draft: their first tokens are there the sooner.
        """
        found, pairs = {True: 1, False: 1}, sum(job.pair for job in jobs)
        if not any(job.row.ids for job in jobs):
            return found
        read += sum(job.unread for job in jobs if not job.row.ids)
        if pairs:
            found[True] = self.lengths[True].choose(pairs, read + len(jobs) - pairs)
        if len(jobs) > pairs:
            found[False] = self.lengths[False].choose(len(jobs) - pairs, read + pairs * found[True])
        return found

    def tell_more(self, ticket: Ticket) -> None:
        """Gives a listener what may be shown, and the end where the row has ended."""
        job, row = ticket.job, ticket.job.row
        ticket.logprobs += [TokenLogprobs(own, tuple(top)) for own, top in job.logprobs]
        job.logprobs = []
        text = ticket.shown.more(row.shown_ids, row.finish is not None)
        ids = tuple(row.ids[ticket.sent :])
        if text or (row.finish and ids):
            known = None if job.wants is None else tuple(ticket.logprobs)
            ticket.sent, ticket.logprobs = len(row.ids), []
            self.tell(ticket, Piece(ids, text, known))
        if row.finish is not None:
            self.end(ticket, row.finish)

    def end(self, ticket: Ticket, reason: str, error: Exception | None = None) -> None:
        """Takes a request's place back and tells its listener."""
        job, stats, count = ticket.job, {}, 0
        if job is not None:
            self.rounds.leave(job)
            self.running.remove(ticket)
            row, stats, count = job.row, job.row.stats, len(job.row.ids)
            self.counts["accepted"] += row.accepted
            self.counts["drafted"] += stats["drafted"]
            for what in (FELL_BACK, CHANGED):
                self.counts[what] += (row.events or []).count(what)
        with self.lock:
            self.counts[reason] += 1
            self.taken -= 1  # before the listener hears: who asks again at once finds the place free
        what = None if error is None else f"decoding failed: {error}".split("\n")[0]
        self.tell(ticket, Done(reason, len(ticket.request.prompt_ids), count, stats, what))
        ticket.member = ticket.job = None  # whoever keeps the ticket keeps no aligner that was removed

    def tell(self, ticket: Ticket, event: Piece | Done) -> None:
        try:
            ticket.listener(event)
        except Exception:
            log.exception("a listener failed: its request is cancelled")
            ticket.cancelled = True


def positions_of(model) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def weight_bytes(model) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def bucket(tokens: int) -> int:
    """Counts of tokens that are near each other, as one."""
    return round(2 ** (round(3 * math.log2(tokens)) / 3))
