"""One frozen proposal serves requests for many aligners: a thread that decodes, listeners that are told.

    submit -> waiting -> rounds of drafting and verifying -> Piece, Piece, ..., Done

This first form decodes one request at a time.
"""

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from par import Noise, PARParams, next_token_law, seen_mask
from plain_loop import Row, StopWatch, eos_token_ids
from slots import has_slots
from speculation import decode_rows

log = logging.getLogger("ram")


class EngineError(Exception):
    """A request that the engine does not take; the text is for whoever sent it."""


class Busy(EngineError):
    """As many requests wait as may: try again later."""


class Closed(EngineError):
    """The engine takes no more requests."""


class UnknownAligner(EngineError):
    """No aligner has this name."""


class TooLong(EngineError):
    """Prompt and answer need more positions than a model or the engine holds."""


class BadRequest(EngineError):
    """A request that means nothing: no prompt, no tokens wanted, ids that the vocabulary lacks."""


@dataclass(frozen=True)
class Request:
    """What to decode: a prompt by one pair, or by the proposal alone (aligner None).

    seed, row_id: whose noise the answer draws; equal ones give equal answers whatever else is decoded. stop:
    strings that end the answer. logprobs: how many candidates of the law to give with each token; None gives
    no log-probabilities at all, 0 the token's own.
    """

    prompt_ids: tuple[int, ...]
    aligner: str | None
    params: PARParams
    max_new_tokens: int
    seed: int = 0
    row_id: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class TokenLogprobs(NamedTuple):
    """A token's log-probability in nats under the law it was drawn from, and the likeliest tokens' (id, log
    p), best first; tokens that the law excludes are not among them.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """The next tokens of an answer.

    text: what they add that is safe to show; all pieces' texts together are the answer's text, all token ids
    its ids (the closing EOS and the tokens of a stop string included). Tokens whose text may still become
    another character or a stop string wait for the next piece. logprobs: one per token, None where not asked.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] | None


class Done(NamedTuple):
    """The end of a request, whatever the end.

    finish_reason: stop, length, cancelled or error. n_prompt, n_completion: tokens. stats: as in
    `plain_loop.Generation`. error: a text for the client where the reason is error, else None.
    """

    finish_reason: str
    n_prompt: int
    n_completion: int
    stats: dict[str, float]
    error: str | None = None


Listener = Callable[[Piece | Done], None]


class Ticket:
    """A request that was taken."""

    numbers = itertools.count()

    def __init__(self, request: Request, listener: Listener, model) -> None:
        self.number, self.request, self.listener, self.model = next(self.numbers), request, listener, model
        self.cancelled = False


class ShownText:
    """The text of a growing answer, as far as it may be shown."""

    def __init__(self, watch: StopWatch) -> None:
        self.watch, self.shown = watch, ""

    def more(self, row: Row) -> str:
        """What may be shown that was not yet."""
        text = self.watch.text(row.shown_ids)
        if row.finish is not None:
            stopped = self.watch.cut(text)
            text = text if stopped is None else stopped
        else:
            text = text.rstrip("\ufffd")  # the beginning of a character
            starts = (s[:n] for s in self.watch.stop for n in range(1, len(s)))
            text = text[: len(text) - max((len(s) for s in starts if text.endswith(s)), default=0)]
            if not text.startswith(self.shown):  # some tokenizers take a character back until it is whole
                return ""
        new = text[len(self.shown) :]
        self.shown += new
        return new


class Engine:
    """Decodes requests in a thread of its own.

    max_rows: requests decoded at once. max_tokens: positions of prompts and answers that may be held at once.
    max_waiting: requests that may wait beyond those. Listeners are called from the engine's thread and must
    not block; one that raises loses its request. Raises ValueError for a model that keeps no keys and values
    by position, or lacks rows for the tokenizer.
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
    ) -> None:
        self.proposal, self.tokenizer, self.vocab = proposal, tokenizer, len(tokenizer)
        self.max_rows, self.max_tokens, self.max_waiting = max_rows, max_tokens, max_waiting
        self.check(proposal)
        self.aligners: dict[str, Any] = {}
        for name, model in aligners.items():
            self.add_aligner(name, model)
        self.lock = threading.Condition()
        self.waiting: deque[Ticket] = deque()
        self.closing, self.counts, self.started = False, Counter(), time.monotonic()
        self.rows = 0
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()

    def check(self, model) -> None:
        if not has_slots(model) or model.config.vocab_size < self.vocab:
            raise ValueError(
                f"{type(model).__name__} cannot be served: expected a transformers decoder without a sliding "
                f"window or a state, with at least the tokenizer's {self.vocab} vocabulary rows"
            )

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Takes a request; its listener hears Pieces and, whatever happens, one Done.

        Raises an EngineError where it is not taken: BadRequest, UnknownAligner, TooLong, Busy, Closed.
        """
        with self.lock:
            if self.closing:
                raise Closed("the server is shutting down")
            model = self.proposal
            if request.aligner is not None:
                if request.aligner not in self.aligners:
                    known = ", ".join(sorted(self.aligners)) or "none"
                    raise UnknownAligner(f"unknown aligner {request.aligner!r}; known: {known}")
                model = self.aligners[request.aligner]
            self.check_request(request, model)
            if len(self.waiting) >= self.max_waiting:
                raise Busy(f"{len(self.waiting)} requests wait already; try again later")
            ticket = Ticket(request, listener, model)
            self.waiting.append(ticket)
            self.counts["requests"] += 1
            self.lock.notify_all()
        return ticket

    def check_request(self, request: Request, model) -> None:
        ids = request.prompt_ids
        if not ids or min(ids) < 0 or max(ids) >= self.vocab:
            raise BadRequest(f"the prompt must have tokens, with ids from 0 to {self.vocab - 1}")
        if request.max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens={request.max_new_tokens}: expected at least 1")
        limits = [getattr(m.config, "max_position_embeddings", None) for m in (self.proposal, model)]
        limit = min([each for each in limits if each is not None] + [self.max_tokens])
        if len(ids) + request.max_new_tokens > limit:
            raise TooLong(
                f"{len(ids)} tokens of the prompt and {request.max_new_tokens} of the answer are more than "
                f"{limit}"
            )

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with Done("cancelled"); one that has ended stays as it ended."""
        ticket.cancelled = True

    def add_aligner(self, name: str, model) -> None:
        """Serves an aligner from now on; one of the same name is replaced for requests yet to come."""
        self.check(model)
        self.aligners[name] = model

    def remove_aligner(self, name: str) -> None:
        """Refuses further requests for an aligner; those taken are finished. Raises UnknownAligner."""
        if self.aligners.pop(name, None) is None:
            raise UnknownAligner(f"unknown aligner {name!r}")

    def figures(self) -> dict[str, Any]:
        """What was served and what is going on."""
        seconds = time.monotonic() - self.started
        return {
            "requests": self.counts["requests"],
            "finished": {reason: self.counts[reason] for reason in ("stop", "length", "cancelled", "error")},
            "prompt_tokens": self.counts["prompt_tokens"],
            "completion_tokens": self.counts["tokens"],
            "tokens_per_second": self.counts["tokens"] / seconds,
            "waiting": len(self.waiting),
            "rows": self.rows,
            "aligners": sorted(self.aligners),
        }

    def close(self, wait: bool = True) -> None:
        """Takes no more requests; ends when all are finished, or (wait=False) cancels them."""
        with self.lock:
            self.closing = True
            self.cut = not wait
            self.lock.notify_all()
        self.thread.join()

    def work(self) -> None:
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.waiting or self.closing)
                if not self.waiting:
                    return
                ticket, self.rows = self.waiting.popleft(), 1
            try:
                done = self.decode(ticket)
            except Exception as error:
                log.exception("a request failed")
                n = len(ticket.request.prompt_ids)
                done = Done("error", n, 0, {}, f"decoding failed: {type(error).__name__}")
            self.counts[done.finish_reason] += 1
            self.counts["prompt_tokens"] += done.n_prompt
            self.counts["tokens"] += done.n_completion
            self.rows = 0
            self.tell(ticket, done)

    def tell(self, ticket: Ticket, event: Piece | Done) -> None:
        try:
            ticket.listener(event)
        except Exception:
            log.exception("a listener failed: its request is cancelled")
            ticket.cancelled = True

    def decode(self, ticket: Ticket) -> Done:
        request, sent = ticket.request, 0
        aligner = ticket.model if request.aligner is not None else None
        watch = StopWatch(self.tokenizer, request.stop)
        shown = ShownText(watch)
        rounds = decode_rows(
            self.proposal,
            aligner,
            self.tokenizer,
            [request.prompt_ids],
            request.params,
            max_new_tokens=request.max_new_tokens,
            seed=request.seed,
            row_ids=[request.row_id],
            stop=request.stop,
        )
        for (row,) in rounds:
            if ticket.cancelled or self.closing and self.cut:
                break
            text = shown.more(row)
            if text or row.finish is not None:
                ids = tuple(row.ids[sent:])
                known = None if request.logprobs is None else self.logprobs(request, aligner, row.ids, sent)
                self.tell(ticket, Piece(ids, text, known))
                sent = len(row.ids)
        stats = row.generation(watch).stats
        return Done(row.finish or "cancelled", len(request.prompt_ids), len(row.ids), stats)

    @torch.inference_mode()
    def logprobs(self, request: Request, aligner, ids: list[int], sent: int) -> tuple[TokenLogprobs, ...]:
        found = []
        for step in range(sent, len(ids)):
            context = torch.tensor([[*request.prompt_ids, *ids[:step]]])
            models = (self.proposal, aligner)
            z_p, z_q = (m and m(context, use_cache=False).logits[:, -1, : self.vocab] for m in models)
            candidates = None
            if aligner is not None and request.params.sample_mode == "snis":
                nucleus = next_token_law(z_p, None, request.params).logprobs
                at = torch.tensor([[request.row_id]]), torch.tensor([[step]])
                streams = range(1, request.params.n_candidates + 1)
                noises = [Noise(request.seed, *at, self.vocab, j) for j in streams]
                candidates = torch.stack([noise.draw(nucleus) for noise in noises], dim=-1)
            seen, eos = seen_mask(context, self.vocab), eos_token_ids(self.tokenizer, *models)
            law = next_token_law(z_p, z_q, request.params, seen, eos, candidates).logprobs[0]
            best = law.topk(min(request.logprobs, self.vocab))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top = tuple((token, value) for token, value in pairs if value > float("-inf"))
            found.append(TokenLogprobs(float(law[ids[step]]), top))
        return tuple(found)
