"""The server's decoding thread: it owns the engine, bounds the queue, and reports to listeners.

submit (any thread) -> inbox -> engine.Engine.step -> text -> Piece, Piece, ..., Done
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ram.decoding.cache import Limits, ServedModel, open_model
from ram.decoding.drafting import Clocked
from ram.decoding.engine import Engine
from ram.decoding.requests import (
    BadRequest,
    EngineError,
    Event,
    Failed,
    Finished,
    Request,
    ScoringFailed,
    TokenLogprobs,
    Tokens,
)
from ram.decoding.rows import CHANGED, FELL_BACK
from ram.decoding.scheduler import Queue, Ticket
from ram.decoding.scoring import Row, Scheme, score
from ram.log import log
from ram.models.abilities import max_positions
from ram.models.vocabulary import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
SPAN = 10  # seconds over which `tokens_per_second` is measured


class Busy(EngineError):
    """The queue is full: try again later."""


class Closed(EngineError):
    """The server accepts no more requests."""


class Piece(NamedTuple):
    """The next tokens of an answer.

    Args:
        token_ids: all pieces of an answer that was not broken off make up its token ids, the closing EOS and
            the tokens of a stop string included.
        text: the text of these tokens. Tokens wait for a later piece if their text may still become another
            character or a stop string.
        logprobs: one entry per token; None if the request asked for none.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None


class Done(NamedTuple):
    """The end of a request.

    Args:
        finish_reason: stop, length, cancelled or error.
        n_prompt, n_completion: tokens.
        stats: as in `rows.Generation`.
        error: a text for the client if the reason is error, else None.
    """

    finish_reason: str
    n_prompt: int
    n_completion: int
    stats: dict[str, float]
    error: str | None = None


# A computation on the models of a request, by role, and the tokenizer; see `EngineThread.measure`.
Measure = Callable[["dict[str, PreTrainedModel]", "PreTrainedTokenizerBase"], T]


class _Measurement:
    """A computation that waits for its turn, and the place of its result."""

    def __init__(self, request: Request, models: "dict[str, PreTrainedModel]", measure: Measure[Any]) -> None:
        self.request, self.models, self.measure = request, models, measure
        self.result: Future[Any] = Future()

    def run(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Compute the result, unless nobody waits for it any more."""
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            self.result.set_result(self.measure(self.models, tokenizer))
        except Exception as error:
            log.exception("a prompt could not be scored")
            self.result.set_exception(ScoringFailed(f"scoring failed: {error}".split("\n")[0]))


Listener = Callable[[Piece | Done], None]


class _Stream:
    """The part of an answer that its listener has not received yet."""

    def __init__(self, ticket: Ticket, listener: Listener) -> None:
        self.ticket, self.listener = ticket, listener
        self.sent = self.shown = 0  # tokens and characters that were sent
        self.logprobs: list[TokenLogprobs] = []  # of tokens that were not
        self.end: Finished | Failed | None = None

    def piece(self) -> Piece | None:
        """Return the next piece, or None if no text has become safe to show."""
        row, finished = self.ticket.row, self.ticket.row.finish is not None
        count, end = row.settled()
        text = row.text.text[self.shown : end]
        ids = tuple(row.ids[self.sent : count])
        if not (text or (finished and ids)):
            return None
        known = None if self.ticket.request.logprobs is None else tuple(self.logprobs[: len(ids)])
        self.sent, self.shown, self.logprobs = count, self.shown + len(text), self.logprobs[len(ids) :]
        return Piece(ids, text, known)

    def done(self) -> Done:
        assert self.end is not None
        row, error = self.ticket.row, None
        if isinstance(self.end, Failed):
            reason, cause = "error", self.end.error
            error = f"decoding failed: {type(cause).__name__}: {cause}".split("\n")[0]
        else:
            reason = self.end.reason
        return Done(reason, len(self.ticket.request.prompt_ids), len(row.ids), row.stats, error)


class EngineThread:
    """Decodes requests in a thread of its own.

    Listeners are called in that thread and must not block; if one raises, its request is cancelled.

    Args:
        max_rows: requests decoded at once.
        max_tokens: positions of prompts and answers held at once, for the proposal and for each aligner.
        max_waiting: requests accepted beyond `max_rows`; a client that has a name gets half of both.
        max_read: prompt tokens read in one round; other rows wait for their next tokens meanwhile.

    Raises:
        ValueError: if a model keeps no keys and values by position or lacks rows for the tokenizer, or if
            memory has no room for a pool.
    """

    def __init__(
        self,
        proposal: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        aligners: "Mapping[str, PreTrainedModel]",
        *,
        max_rows: int = 16,
        max_tokens: int = 16384,
        max_waiting: int = 256,
        max_read: int = 256,
    ) -> None:
        columns = min(max_tokens, max_positions(proposal.config) or max_tokens)
        size, unused = vocabulary(tokenizer, proposal, *aligners.values())
        self.limits = Limits(size, max_rows, max_tokens, columns, unused=unused)
        self.max_open = max_rows + max_waiting
        verifier = open_model(proposal, self.limits)
        self.engine = Engine(verifier, tokenizer, Clocked(), max_read=max_read)
        self.lock = threading.Condition()
        self.inbox: list[Ticket] = []
        self.scorings: Queue[_Measurement] = Queue()
        self.streams: dict[Ticket, _Stream] = {}  # of all requests that have not ended
        self.closing = self.broken = False
        self.counts: Counter[str] = Counter()
        self.recent: deque[tuple[float, int]] = deque()  # time and tokens of the latest rounds
        self.latest = self.engine.figures()
        for name, model in aligners.items():
            self.add_aligner(name, model)
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    # ---- any thread ----------------------------------------------------------------------------------------

    @property
    def aligners(self) -> dict[str, ServedModel]:
        return self.engine.aligners

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Accept a request; its listener receives Pieces and, in any case, one Done.

        Raises:
            EngineError: if the request is refused: BadRequest, UnknownAligner, TooLong, Busy or Closed.
        """
        with self.lock:
            if self.closing:
                raise Closed("decoding has stopped" if self.broken else "the server is shutting down")
            self.engine.check(request)
            client = request.client
            count = sum(other.request.client == client for other in self.streams) if client else 0
            if len(self.streams) >= self.max_open or count >= max(self.max_open // 2, 1):
                whose = f"{count} requests of this client" if count else f"{len(self.streams)} requests"
                raise Busy(f"{whose} are being answered or wait already; try again later")
            ticket = self.engine.ticket(request)
            self.streams[ticket] = _Stream(ticket, listener)
            self.inbox.append(ticket)
            self.counts["requests"] += 1
            self.counts[f"aligner {request.aligner}"] += 1
            self.lock.notify_all()
        return ticket

    def score(self, request: Request) -> "Future[list[TokenLogprobs]]":
        """Compute the log-probabilities of a prompt's tokens after the first, between two rounds.

        Args:
            request: its `logprobs` is the number of most likely tokens to report, its `params` is the law.

        Raises:
            EngineError: as `submit`; BadRequest if the law has no probabilities.
        """
        try:
            scheme = Scheme(request.params, "proposal", None if request.aligner is None else "aligner")
        except ValueError as error:
            raise BadRequest(str(error)) from None
        prompt, count = request.prompt_ids, request.logprobs or 0

        def logprobs(
            models: "dict[str, PreTrainedModel]", tokenizer: "PreTrainedTokenizerBase"
        ) -> list[TokenLogprobs]:
            row, ends = Row(prompt[:1], prompt[1:]), request.ends
            ((scores,),) = score(models, tokenizer, [row], [scheme], top=max(count, 1), ends=ends)
            ids, values = scores.top_ids, scores.top_logprobs
            if ids is None or values is None:  # a prompt of one token
                return []
            return TokenLogprobs.listed(scores.logprobs, ids[:, :count], values[:, :count])

        return self.measure(request, logprobs)

    def measure(self, request: Request, measure: "Measure[T]") -> "Future[T]":
        """Compute something with the models of a request, between two rounds.

        Args:
            request: its prompt and its model are checked.
            measure: takes the models by role (proposal, aligner) and the tokenizer.

        Raises:
            EngineError: as `submit`.
        """
        with self.lock:
            if self.closing:
                raise Closed("the server is shutting down")
            self.engine.check_prompt(request)
            models = self.engine.members(request)
            own = sum(other.request.client == request.client for other in self.scorings)
            if len(self.scorings) >= self.max_open or (request.client and own >= self.max_open // 2):
                raise Busy(f"{len(self.scorings)} prompts wait to be scored; try again later")
            scoring = _Measurement(request, models, measure)
            self.scorings.append(scoring)
            self.lock.notify_all()
        return scoring.result

    def cancel(self, ticket: Ticket) -> None:
        """End a request with Done("cancelled") before its next round, if it has not ended."""
        with self.lock:
            self.engine.cancel(ticket)
            self.lock.notify_all()

    def add_aligner(self, name: str, model: "PreTrainedModel") -> None:
        """Serve an aligner to later requests, in place of one of the same name.

        Raises:
            ValueError: as the constructor does.
        """
        served = open_model(model, self.limits)
        with self.lock:
            self.engine.add_aligner(name, served)

    def remove_aligner(self, name: str) -> None:
        """Refuse later requests for an aligner; accepted ones are finished. Raises UnknownAligner."""
        with self.lock:
            self.engine.remove_aligner(name)

    def figures(self) -> dict:
        """Return the counts since the start, and the current load.

        tokens_per_second covers the last SPAN seconds; acceptance, the drafts for pairs; prefix_hits, the
        requests that share an earlier row's positions and the proposal's tokens that were not read again;
        bytes, the weights by model and the pools.
        """
        with self.lock:
            counts, recent, now = Counter(self.counts), list(self.recent), time.monotonic()
            rows, decoded = self.latest.rows, self.latest.counts
            waiting = len(self.inbox) + self.latest.waiting
            members = {"proposal": self.engine.verifier}
            members |= {f"aligner {name}": served for name, served in self.engine.aligners.items()}
        drafted = max(decoded.get("drafted", 0), 1)
        return {
            "alive": self.alive,
            "requests": counts["requests"],
            "finished": {reason: counts[reason] for reason in ("stop", "length", "cancelled", "error")},
            "by_aligner": {name[8:]: counts[name] for name in members if name != "proposal"},
            "prompt_tokens": decoded.get("prompt_tokens", 0),
            "completion_tokens": decoded.get("tokens", 0),
            "tokens_per_second": sum(count for at, count in recent if at > now - SPAN) / SPAN,
            "waiting": waiting,
            "rows": rows,
            "rounds": decoded.get("rounds", 0),
            "acceptance": decoded.get("accepted", 0) / drafted,
            "fallback_fraction": decoded.get(FELL_BACK, 0) / drafted,
            "changed_fraction": decoded.get(CHANGED, 0) / drafted,
            "prefix_hits": {"requests": decoded.get("hits", 0), "tokens": decoded.get("hit_tokens", 0)},
            "bytes": {
                "weights": {name: served.weight_bytes for name, served in members.items()},
                "pools": {name: served.pool.bytes for name, served in members.items()},
            },
        }

    @property
    def alive(self) -> bool:
        """Whether requests are decoded."""
        return self.thread.is_alive() and not self.broken

    def close(self, wait: bool = True) -> None:
        """Refuse later requests; return once all accepted ones have ended, or (wait=False) are cancelled."""
        with self.lock:
            self.closing = True
            if not wait:
                for ticket in self.streams:
                    self.engine.cancel(ticket)
                for scoring in self.scorings:
                    scoring.result.cancel()
            self.lock.notify_all()
        self.thread.join()

    # ---- the thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._receive():
                if not self.engine.idle:
                    self._deliver(self.engine.step())
                self._score_one()
        except BaseException as error:  # a bug of this program; no listener may wait forever
            log.exception("the engine has stopped")
            with self.lock:
                self.closing = self.broken = True
                streams, self.streams, self.inbox = list(self.streams.values()), {}, []
                for scoring in self.scorings:
                    scoring.result.cancel()
            reason = f"the engine has stopped: {error}".split("\n")[0]
            for stream in streams:
                n_prompt = len(stream.ticket.request.prompt_ids)
                self._tell(stream, Done("error", n_prompt, 0, {}, reason))

    def _receive(self) -> bool:
        """Wait for work and hand it to the engine; return False when the thread is to end."""
        with self.lock:
            self.lock.wait_for(lambda: self.inbox or self.scorings or not self.engine.idle or self.closing)
            for ticket in self.inbox:
                self.engine.add(ticket)
            self.inbox.clear()
            self.latest = self.engine.figures()
        return not self.engine.idle or len(self.scorings) > 0

    def _score_one(self) -> None:
        with self.lock:
            if (scoring := self.scorings.first()) is None:
                return
            self.scorings.remove(scoring)
        scoring.run(self.engine.tokenizer)

    def _deliver(self, events: list[Event]) -> None:
        """Send the results of a round to the listeners; a request's place is free before its Done is sent."""
        streams: dict[_Stream, None] = {}
        now, tokens = time.monotonic(), 0
        with self.lock:
            for event in events:
                stream = self.streams[event.ticket]
                streams[stream] = None
                if isinstance(event, Tokens):
                    tokens += len(event.token_ids)
                    stream.logprobs += event.logprobs or ()
                    continue
                stream.end = event
                del self.streams[event.ticket]
                self.counts["error" if isinstance(event, Failed) else event.reason] += 1
            self.recent.append((now, tokens))
            while self.recent[0][0] < now - SPAN:
                self.recent.popleft()
            self.latest = self.engine.figures()
        for stream in streams:
            broken_off = stream.end is not None and stream.ticket.row.finish is None
            if not broken_off and (piece := stream.piece()) is not None:
                self._tell(stream, piece)
            if stream.end is not None:
                self._tell(stream, stream.done())

    def _tell(self, stream: _Stream, event: Piece | Done) -> None:
        try:
            stream.listener(event)
        except Exception:
            log.exception("a listener failed: its request is cancelled")
            self.engine.cancel(stream.ticket)
