"""One frozen verifier decodes the rows of many aligners and settings together, a round at a time.

    add -> waiting -> running rows (a line and positions each) -> step: a round -> Tokens, ..., Finished

One thread owns an engine; it has no lock, no thread and no HTTP. Rows come and go between rounds. An answer
depends only on its request: its noise depends on seed, row id and position, whatever else is decoded.

A row enters when its prompt and its longest possible answer fit into the free positions of its models; until
then it waits, and later rows wait behind it. Clients take turns, and one client's rows hold at most half of
the lines and positions, but a single row always enters. If `max_read` is set, a long prompt is read in
pieces, one per round, while other rows decode.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from ram.data.text import Text, spelling
from ram.decoding.cache import ServedModel
from ram.decoding.drafting import DraftPolicy, Load
from ram.decoding.requests import (
    BadRequest,
    Event,
    Failed,
    Finished,
    Request,
    Tokens,
    TooLong,
    UnknownAligner,
)
from ram.decoding.rounds import Rounds, RowsFailed
from ram.decoding.rows import CHANGED, FELL_BACK, eos_token_ids
from ram.decoding.scheduler import Queue, Role, Source, Ticket, plan
from ram.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Figures(NamedTuple):
    """Counts since the start, and the rows waiting and running now.

    Args:
        counts: rounds, prompt_tokens, tokens, accepted, drafted, fell_back, changed, hits (rows that share an
            earlier row's positions), hit_tokens.
    """

    waiting: int
    rows: int
    counts: Mapping[str, int]


class Engine:
    """Decodes requests by rounds.

    Args:
        verifier: the model that all rows share.
        alone: whether the verifier is a proposal, an aligner, or both members of a pair; decides the law of a
            row without an aligner.
        aligners: names and models of the pairs' aligners.
        drafter: drafts for rows without an aligner; by default the first aligner.
        max_read: prompt tokens read in one round; None reads prompts at once.
    """

    def __init__(
        self,
        verifier: ServedModel,
        tokenizer: "PreTrainedTokenizerBase",
        policy: DraftPolicy,
        *,
        alone: Literal["proposal", "aligner", "pair"] = "proposal",
        aligners: Mapping[str, ServedModel] | None = None,
        drafter: ServedModel | None = None,
        max_read: int | None = None,
    ) -> None:
        self.verifier, self.tokenizer, self.policy = verifier, tokenizer, policy
        self.alone, self.drafter, self.max_read = alone, drafter, max_read
        self.aligners = dict(aligners or {})  # replaced, never changed: any thread may read it
        with torch.inference_mode():
            self.rounds = Rounds(verifier)
        self.waiting: Queue[Ticket] = Queue()
        self.running: list[Ticket] = []  # in the order in which they entered
        self.counts: Counter[str] = Counter()

    # ---- any thread ----------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises BadRequest, UnknownAligner or TooLong if a request cannot be decoded."""
        new = request.max_new_tokens
        if new < 1:
            raise BadRequest(f"max_new_tokens={new}: expected at least 1")
        self.check_prompt(request)

    def check_prompt(self, request: Request) -> None:
        """Raises as `check`, for a request that may ask for no new tokens."""
        ids, new, vocab_size = request.prompt_ids, request.max_new_tokens, self.verifier.vocab_size
        aligner = self._aligner(request.aligner)
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise BadRequest(f"the prompt must have tokens, with ids from 0 to {vocab_size - 1}")
        limit = self.verifier.pool.columns
        if aligner is not None:
            limit = min(limit, aligner.max_positions or limit)
        if len(ids) + new > limit:
            raise TooLong(
                f"the prompt has {len(ids)} tokens and the answer may have {new}: together more than {limit}"
            )

    def ticket(self, request: Request) -> Ticket:
        """Bind a request to the models that serve it now. Raises UnknownAligner."""
        aligner, verifier = self._aligner(request.aligner), self.verifier
        if aligner is not None:
            role = Role(verifier, aligner, "verifier", "drafter")
            eos = eos_token_ids(self.tokenizer, verifier.model, aligner.model)
        else:
            drafter = self.drafter or next(iter(self.aligners.values()), None)
            longest = len(request.prompt_ids) + request.max_new_tokens
            if drafter is not None and longest > (drafter.max_positions or longest):
                drafter = None
            z_p: Source | None = None if self.alone == "aligner" else "verifier"
            z_q: Source | None = None if self.alone == "proposal" else "verifier"
            role = Role(verifier, drafter, z_p, z_q)
            eos = eos_token_ids(self.tokenizer, verifier.model, *verifier.others)
        text = Text(spelling(self.tokenizer), request.stop, request.continued)
        return Ticket(request, role, (*eos, *request.ends), text)

    def members(self, request: Request) -> "dict[str, PreTrainedModel]":
        """Return the models that decide a request's law, by their roles. Raises UnknownAligner."""
        aligner = self._aligner(request.aligner)
        models = {self.alone: self.verifier.model}
        return models if aligner is None else models | {"aligner": aligner.model}

    def cancel(self, ticket: Ticket) -> None:
        """End a row before the next step, if it has not ended."""
        ticket.cancelled = True

    def _aligner(self, name: str | None) -> ServedModel | None:
        if name is None:
            return None
        if name not in self.aligners:
            known = ", ".join(sorted(self.aligners)) or "none"
            raise UnknownAligner(f"unknown aligner {name!r}; known: {known}")
        return self.aligners[name]

    # ---- one thread at a time ------------------------------------------------------------------------------

    def add_aligner(self, name: str, served: ServedModel) -> None:
        """Serve an aligner to later requests, in place of one of the same name."""
        self.aligners = {**self.aligners, name: served}

    def remove_aligner(self, name: str) -> None:
        """Refuse later requests for an aligner; bound ones are finished. Raises UnknownAligner."""
        if name not in self.aligners:
            raise UnknownAligner(f"unknown aligner {name!r}")
        self.aligners = {key: served for key, served in self.aligners.items() if key != name}

    # ---- the owner's thread --------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no row waits or runs."""
        return not self.waiting and not self.running

    def add(self, ticket: Ticket) -> None:
        """Let a ticket wait for its turn; neither decodes nor blocks."""
        self.waiting.append(ticket)

    def figures(self) -> Figures:
        return Figures(len(self.waiting), len(self.running), dict(self.counts))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Drop cancelled rows, admit waiting ones, decode one round; return the events in order."""
        events: list[Event] = []
        cancelled = [ticket for ticket in [*self.waiting, *self.running] if ticket.cancelled]
        for ticket in cancelled:
            if ticket in self.running:
                self._leave(ticket)
            else:
                self.waiting.remove(ticket)
            events.append(self._end(ticket, "cancelled"))
        self._admit(events)
        if self.running:
            self._round(events)
        return events

    def _admit(self, events: list[Event]) -> None:
        while self.rounds.free and (ticket := self.waiting.first(self._may_enter)) is not None:
            try:
                if not self.rounds.enter(ticket):
                    return
                self.running.append(ticket)
                shared = ticket.allocations[self.verifier].read
                self.counts["prompt_tokens"] += len(ticket.request.prompt_ids)
                self.counts["hits"] += shared > 0
                self.counts["hit_tokens"] += shared
            except Exception as error:
                log.exception("a request could not be started")
                events.append(self._fail(ticket, error))
            self.waiting.remove(ticket)

    def _may_enter(self, ticket: Ticket) -> bool:
        """Whether a ticket's client holds less than its share; a client without a name has all."""
        own = [other for other in self.running if other.request.client == ticket.request.client]
        if not (ticket.request.client and own):
            return True
        limits, positions = self.verifier.pool.limits, sum(other.end for other in [*own, ticket])
        return len(own) < limits.rows // 2 and positions <= limits.positions // 2

    def _round(self, events: list[Event]) -> None:
        tickets, chunks = plan(self.running, self.max_read)
        before = {ticket: len(ticket.row.ids) for ticket in tickets}
        failures: list[tuple[Ticket, Exception]] = []
        self.counts["rounds"] += 1
        try:
            widths = self._widths(tickets, sum(count for _, count in chunks))
            result = self.rounds.run(tickets, widths, chunks)
            self.policy.learn(result)
            failures = result.failures
        except RowsFailed as failed:
            log.exception("an aligner failed")
            failures = [(ticket, failed.error) for ticket in failed.tickets]
        except Exception as error:
            log.exception("a round failed")
            failures = [(ticket, error) for ticket in [*tickets, *(ticket for ticket, _ in chunks)]]
        for ticket, error in failures:
            self._leave(ticket)
            events.append(self._fail(ticket, error))
        failed = {ticket for ticket, _ in failures}
        for ticket in tickets:
            new = tuple(ticket.row.ids[before[ticket] :])
            self.counts["tokens"] += len(new)
            if ticket in failed or not new:
                continue
            logprobs = None if ticket.request.logprobs is None else tuple(ticket.logprobs)
            events.append(Tokens(ticket, new, logprobs))
            if ticket.row.finish is not None:
                self._leave(ticket)
                events.append(self._end(ticket, ticket.row.finish))

    def _widths(self, tickets: list[Ticket], read: int) -> dict[bool, int]:
        """The widths of the next round, by whether a pair decodes a row; read: tokens of chunks beside."""
        widths = {True: 1, False: 1}
        new = not any(ticket.row.ids for ticket in tickets)
        beside = read + sum(ticket.unread for ticket in tickets if not ticket.row.ids)
        for is_pair in (True, False):
            own = [ticket for ticket in tickets if ticket.role.is_pair == is_pair]
            roles = [ticket.role for ticket in own]
            role = next((role for role in roles if role.drafter is not None), None)
            if role is not None:
                others = (len(tickets) - len(roles)) * widths[not is_pair]
                room = max(ticket.end - len(ticket.tokens) for ticket in own)
                widths[is_pair] = self.policy.width(Load(role, len(roles), beside + others, new, room))
        return widths

    def _leave(self, ticket: Ticket) -> None:
        self.running.remove(ticket)
        self.rounds.leave(ticket)

    def _end(self, ticket: Ticket, reason: str) -> Finished:
        self._count(ticket)
        return Finished(ticket, ticket.row, reason)

    def _fail(self, ticket: Ticket, error: Exception) -> Failed:
        self._count(ticket)
        return Failed(ticket, ticket.row, error)

    def _count(self, ticket: Ticket) -> None:
        events = ticket.row.events or []
        self.counts["accepted"] += ticket.row.accepted
        self.counts["drafted"] += len(events)
        self.counts[FELL_BACK] += events.count(FELL_BACK)
        self.counts[CHANGED] += ticket.row.changed
        ticket.role = ticket.role._replace(drafter=None)
