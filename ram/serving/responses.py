"""The engine's answers in OpenAI's format, sent whole or as a stream.

requests -> Running (events of all rows, in order of arrival) -> Choice (text, log-probabilities) -> JSON
"""

import asyncio
import contextlib
import functools
import json
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ram.data.text import Text, shares, spelling, spelt_bytes
from ram.decoding.requests import EngineError, Request, TokenLogprobs
from ram.serving.loop import Done, EngineThread, Piece
from ram.serving.protocol import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ram.serving.registry import Served

CLOSE_SECONDS = 5  # time limit for sending the end of a stream
LEAST_LOGP = -9999.0  # OpenAI's value for a token of probability 0

T = TypeVar("T")


class Gone(Exception):
    """The client hung up."""


class Running:
    """Requests in the engine, as an async iterator of their events; leaving the context cancels them.

    Args:
        streamed: notify the event loop of every piece of text. If it is false, the event loop is notified
            only when an answer ends.

    Raises:
        EngineError: The engine rejects a request. The others are cancelled.
    """

    def __init__(self, engine: EngineThread, requests: Sequence[Request], streamed: bool) -> None:
        self.engine, self.open, self.streamed = engine, len(requests), streamed
        self.loop = asyncio.get_running_loop()
        self.events: deque[tuple[int, Piece | Done]] = deque()
        self.arrived = asyncio.Event()
        self.notified = False
        self.tickets = []
        try:
            for index, request in enumerate(requests):
                self.tickets.append(engine.submit(request, functools.partial(self._receive, index)))
        except EngineError:
            self.cancel()
            raise

    def _receive(self, index: int, event: Piece | Done) -> None:
        """Queue an event and notify the event loop; runs in the engine's thread."""
        self.events.append((index, event))
        if self.notified or not (self.streamed or isinstance(event, Done)):
            return
        self.notified = True
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nothing waits for the event
            self.loop.call_soon_threadsafe(self.arrived.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        for ticket in self.tickets:
            self.engine.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        while self.open:
            if not self.events:
                await self.arrived.wait()
                self.arrived.clear()
                # Reset before the queue is read again: an event that arrives after the read notifies again.
                self.notified = False
                continue
            index, event = self.events.popleft()
            if isinstance(event, Done):
                self.open -= 1
                if event.finish_reason == "error":
                    raise ApiError(500, event.error or "decoding failed", "engine_error")
                if event.finish_reason == "cancelled":  # by the engine, because the server is stopping
                    raise ApiError(503, "the server is shutting down", "shutting_down")
            yield index, event


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it as soon as the client hangs up.

    Raises:
        Gone: The client hung up first.
    """

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Shown(NamedTuple):
    """A token's characters, bytes and log-probability; None for the first token of a prompt."""

    id: int
    text: str
    data: bytes
    logprob: float | None

    @property
    def value(self) -> float | None:
        return None if self.logprob is None else max(self.logprob, LEAST_LOGP)

    def chat(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.value, "bytes": list(self.data)}


class Echo(NamedTuple):
    """A prompt to repeat before its answers, and the log-probabilities of its tokens after the first."""

    text: str
    ids: Sequence[int]
    logprobs: list[TokenLogprobs] | None


class Placed(NamedTuple):
    """A token of an answer, its most likely alternatives, and where its text begins."""

    own: Shown
    top: list[Shown]
    start: int


class Choice:
    """One answer while it is decoded: its text and the log-probabilities of its tokens.

    Args:
        continued: as in `requests.Request`.
    """

    def __init__(self, index: int, tokenizer: "PreTrainedTokenizerBase", continued: bool) -> None:
        self.index, self.text = index, ""
        self.done: Done | None = None
        self.spelling = spelling(tokenizer)
        self.spelt = Text(self.spelling, continued=continued)  # knows no stop strings: `text` is cut already
        self.token_ids: list[int] = []
        self.begin = 0  # where the text that `spelt` spells begins
        self.logprobs: list[Placed] = []

    def echo(self, prompt: "Echo") -> None:
        """Begin the text with the prompt's."""
        if prompt.logprobs is not None:
            self.spelt = Text(self.spelling)
            self.logprobs = self.place(prompt.ids, [None, *prompt.logprobs], prompt.text, 0)
            self.spelt = Text(self.spelling, continued=True)
        self.text, self.begin = prompt.text, len(prompt.text)

    def add(self, event: Piece | Done) -> list[Placed]:
        """Add an event to the answer; return the new entries of `logprobs`."""
        if isinstance(event, Done):
            self.done = event
            return []
        start, known = len(self.text), len(self.logprobs)
        self.text += event.text
        self.token_ids += event.token_ids
        if event.logprobs is not None:
            self.logprobs += self.place(event.token_ids, event.logprobs, event.text, start)
        return self.logprobs[known:]

    def place(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], text: str, start: int
    ) -> list[Placed]:
        """Give each new token its share of their text, which begins at a position."""
        tops, pieces = [], []
        for token, known in zip(ids, logprobs, strict=True):
            top = known.top if known else ()
            tops.append([self._candidate(other, value) for other, value in top])
            pieces.append(self.spelt.data(token))
            self.spelt.add(token)
        ends = [max(self.begin + end - start, 0) for end in self.spelt.ends[-len(ids) :]]
        left = spelt_bytes(b"".join(pieces), text)
        placed = []
        for token, known, top, piece, share in zip(
            ids, logprobs, tops, pieces, shares(text, ends), strict=True
        ):
            own = Shown(token, share, piece[:left], None if known is None else known.logprob)
            placed.append(Placed(own, [own if other.id == token else other for other in top], start))
            start, left = start + len(share), max(left - len(piece), 0)
        return placed

    def _candidate(self, token: int, logprob: float) -> Shown:
        """A token that could have come next: a mark's spelling, or the characters that it would complete."""
        data = self.spelt.data(token)
        return Shown(token, self.spelling.marks.get(token) or self.spelt.characters(token), data, logprob)

    @property
    def finished(self) -> Done:
        """The end of the answer; only once it has ended."""
        assert self.done is not None, f"answer {self.index} has not ended"
        return self.done


def chat_logprobs(entries: Sequence[Placed]) -> dict[str, Any]:
    content = [
        own.chat() | {"top_logprobs": [other.chat() for other in top], "text_offset": start}
        for own, top, start in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[Placed]) -> dict[str, Any]:
    return {
        "tokens": [own.text for own, _, _ in entries],
        "token_logprobs": [own.value for own, _, _ in entries],
        "top_logprobs": [None if own.logprob is None else top_logprobs(own, top) for own, top, _ in entries],
        "text_offset": [start for _, _, start in entries],
    }


def top_logprobs(own: Shown, top: Sequence[Shown]) -> dict[str, float | None]:
    """The log-probabilities of a token and its alternatives by text; `token_id:ID` if two are equal."""
    values = {own.text: own.value}
    for other in top:
        if other.id != own.id:
            values[f"token_id:{other.id}" if other.text in values else other.text] = other.value
    return values


class Answer:
    """The response to a request, sent whole or as a stream.

    Args:
        chat: use the format of chat completions; if it is false, that of text completions.
        n: answers per prompt.
        logprobs: report log-probabilities.
        prompts: the lengths of the prompts, in tokens.
        echoes: the prompts, if they are repeated.
        prompt_ids: of the prompt of a chat, if the response reports token ids.
    """

    def __init__(
        self,
        chat: bool,
        served: "Served",
        seed: int,
        n: int,
        logprobs: bool,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[int],
        continued: bool,
        echoes: Sequence[Echo] = (),
        prompt_ids: Sequence[int] | None = None,
    ) -> None:
        self.ids = None if prompt_ids is None else {"prompt_token_ids": list(prompt_ids)}
        self.chat, self.logprobs, self.n, self.tokenizer = chat, logprobs, n, tokenizer
        self.prompts, self.continued, self.echoes = prompts, continued, echoes
        self.common = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
            "seed": seed,
        }

    def choices(self) -> list[Choice]:
        count = len(self.prompts) * self.n
        choices = [Choice(index, self.tokenizer, self.continued) for index in range(count)]
        for choice in choices if self.echoes else ():
            choice.echo(self.echoes[choice.index // self.n])
        return choices

    def end_empty(self, choices: Sequence[Choice]) -> list[Choice]:
        """End the answers for which no token was asked; return them."""
        empty = [choice for choice in choices if choice.done is None]
        for choice in empty:
            choice.add(Done("length", self.prompts[choice.index // self.n], 0, {}))
        return empty

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the exact token counts; a prompt with several answers counts once."""
        n_prompt = sum(choice.finished.n_prompt for choice in choices[:: self.n])
        n_completion = sum(choice.finished.n_completion for choice in choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
        }

    async def whole(self, running: Running) -> Response:
        """Return the response once all answers have ended."""
        with running:
            events = [event async for event in running]
        # In a thread, so that other requests need not wait for the log-probabilities of a long answer.
        return await asyncio.to_thread(lambda: answer_json(self.body(events)))

    def body(self, events: Sequence[tuple[int, Piece | Done]]) -> dict[str, Any]:
        """The body of the response from all events of its answers."""
        choices = self.choices()
        for index, event in events:
            choices[index].add(event)
        self.end_empty(choices)
        kind = "chat.completion" if self.chat else "text_completion"
        bodies = [self._whole(choice) for choice in choices]
        answer = self.common | (self.ids or {}) | {"object": kind}
        return answer | {"choices": bodies, "usage": self.usage(choices)}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        body = {
            "index": choice.index,
            "finish_reason": choice.finished.finish_reason,
            "stats": finite(choice.finished.stats),
        }
        if self.ids is not None:
            body["token_ids"] = choice.token_ids
        logprobs = self._format_logprobs(choice.logprobs)
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return body | {"message": message, "logprobs": logprobs}
        return body | {"text": choice.text, "logprobs": logprobs}

    def _format_logprobs(self, entries: Sequence[Placed]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return chat_logprobs(entries) if self.chat else completion_logprobs(entries)

    async def chunks(self, running: Running, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Yield the bodies of the stream's events."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        common = self.common | {"object": kind} | ({"usage": None} if include_usage else {})
        choices = self.choices()
        for choice in choices if self.echoes else ():
            logprobs = self._format_logprobs(choice.logprobs)
            yield common | {"choices": [self._part(choice, choice.text, logprobs)]}
        if self.chat:
            for choice in choices:
                part = self._part(choice, "", None, {"role": "assistant"})
                yield common | (self.ids or {}) | {"choices": [part]}
        async for index, event in running:
            entries = choices[index].add(event)
            text = event.text if isinstance(event, Piece) else ""
            new_ids = list(event.token_ids) if isinstance(event, Piece) and self.ids is not None else []
            if text or entries or new_ids or isinstance(event, Done):
                logprobs = self._format_logprobs(entries) if entries else None
                part = self._part(choices[index], text, logprobs)
                yield common | {"choices": [part | {"token_ids": new_ids} if new_ids else part]}
        for choice in self.end_empty(choices):
            yield common | {"choices": [self._part(choice, "", None)]}
        if include_usage:
            yield common | {"choices": [], "usage": self.usage(choices)}

    def _part(
        self, choice: Choice, text: str, logprobs: dict[str, Any] | None, role: dict[str, str] | None = None
    ) -> dict[str, Any]:
        done = choice.done
        body: dict[str, Any] = {"index": choice.index, "finish_reason": done.finish_reason if done else None}
        body["logprobs"] = logprobs
        if done:
            body["stats"] = finite(done.stats)
        if self.chat:
            return body | {"delta": {} if done else (role or {}) | {"content": text}}
        return body | {"text": text}


class EventStream(Response):
    """Server-sent events of an answer; if the client hangs up, its requests are cancelled at once.

    An error after the first event is sent as an event with the key `error`, because the status has been sent
    already.

    Args:
        seconds: time limit of the answer.
    """

    media_type = "text/event-stream"

    def __init__(self, running: Running, chunks: AsyncIterator[dict[str, Any]], seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.running, self.chunks, self.seconds = running, chunks, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.running:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            with contextlib.suppress(Gone, OSError, TimeoutError):
                await send(start)
                await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def event(data: str, more: bool = True) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in self.chunks:
                    await event(to_json(chunk))
        except TimeoutError:
            failure = too_slow(self.seconds)
        except ApiError as error:
            failure = error
        else:
            failure = None
        async with asyncio.timeout(CLOSE_SECONDS):  # the client may have stopped reading
            if failure is not None:
                await event(to_json(failure.body()))
            await event("[DONE]", more=False)


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"no whole answer within {seconds:g} seconds; it was cancelled", "timeout")


def finite(stats: dict[str, float]) -> dict[str, float]:
    """Drop the values that JSON cannot express.

    The KL divergence is infinite if the aligner excludes a token that the proposal does not.
    """
    return {key: value for key, value in stats.items() if math.isfinite(value)}


def to_json(value: Any) -> str:
    """Return compact JSON in ASCII; some clients end an event's line at U+2028 and similar characters."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def answer_json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")
