"""The engine's answers in OpenAI's format, sent whole or as a stream.

requests -> Running (events of all rows, in order of arrival) -> Choice (text, log-probabilities) -> JSON
"""

import asyncio
import contextlib
import functools
import json
import math
import os
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ram.decoding.requests import EngineError, Request, TokenLogprobs
from ram.decoding.rows import StopWatch
from ram.serving.loop import Done, EngineThread, Piece
from ram.serving.protocol import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ram.serving.registry import Served

CLOSE_SECONDS = 5  # time limit for sending the end of a stream
LEAST_LOGP = -9999.0  # OpenAI's value for a token of probability 0

# A token, its log-probabilities, and the position in the text at which its own text begins.
PlacedToken = tuple[int, TokenLogprobs, int]

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


class Choice:
    """One answer while it is decoded: its text and the log-probabilities of its tokens."""

    def __init__(self, index: int, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.index = index
        self.text = ""
        self.done: Done | None = None
        self.tokenizer, self.watch = tokenizer, StopWatch(tokenizer, ())
        self.logprobs: list[PlacedToken] = []
        self.ids: list[int] = []  # the newest tokens, whose text may change with the next token
        self.length = 0  # characters of the text before them

    def add(self, event: Piece | Done) -> list[PlacedToken]:
        """Add an event to the answer; return the new entries of `logprobs`."""
        if isinstance(event, Done):
            self.done = event
            return []
        self.text += event.text
        before = len(self.logprobs)
        if event.logprobs is not None:
            for token, logprobs in zip(event.token_ids, event.logprobs, strict=True):
                self.logprobs.append((token, logprobs, self._place(token)))
        return self.logprobs[before:]

    @property
    def finished(self) -> Done:
        """The end of the answer; only once it has ended."""
        assert self.done is not None, f"answer {self.index} has not ended"
        return self.done

    def _place(self, token: int) -> int:
        """Return how many characters of the text precede a token's own text.

        Tokens that share the bytes of one character all begin at that character.
        """
        before = self.watch.text(self.ids)
        self.ids.append(token)
        text = self.watch.text(self.ids)
        start = self.length + len(os.path.commonprefix([before, text]))
        if not text.endswith("\ufffd"):
            # The next token is decoded together with this one: some tokenizers drop a text's first space.
            self.ids = [token]
            self.length += len(text) - len(self.watch.text(self.ids))
        return start

    def token_text(self, token: int) -> str:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # decode returns a list only for a batch
        return text

    def chat_logprobs(self, entries: Sequence[PlacedToken]) -> dict[str, Any]:
        content = []
        for token, logprobs, start in entries:
            top = [self._chat_token(other, value) for other, value in logprobs.top]
            entry = self._chat_token(token, logprobs.logprob)
            content.append(entry | {"top_logprobs": top, "text_offset": start})
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        utf8 = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(logprob, LEAST_LOGP), "bytes": utf8}

    def completion_logprobs(self, entries: Sequence[PlacedToken]) -> dict[str, Any]:
        return {
            "tokens": [self.token_text(token) for token, _, _ in entries],
            "token_logprobs": [max(logprobs.logprob, LEAST_LOGP) for _, logprobs, _ in entries],
            "top_logprobs": [
                {self.token_text(other): max(value, LEAST_LOGP) for other, value in logprobs.top}
                for _, logprobs, _ in entries
            ],
            "text_offset": [start for _, _, start in entries],
        }


class Answer:
    """The response to a request, sent whole or as a stream.

    Args:
        chat: use the format of chat completions; if it is false, that of text completions.
        n: answers per prompt.
        logprobs: report log-probabilities.
    """

    def __init__(
        self,
        chat: bool,
        served: "Served",
        seed: int,
        n: int,
        logprobs: bool,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.chat, self.logprobs, self.n, self.tokenizer = chat, logprobs, n, tokenizer
        self.common = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
            "seed": seed,
        }

    def choices(self, count: int) -> list[Choice]:
        return [Choice(index, self.tokenizer) for index in range(count)]

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Return the exact token counts; a prompt with several answers counts once."""
        n_prompt = sum(choice.finished.n_prompt for choice in choices[:: self.n])
        n_completion = sum(choice.finished.n_completion for choice in choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "total_tokens": n_prompt + n_completion,
        }

    async def whole(self, running: Running) -> dict[str, Any]:
        """Return the body of the response once all answers have ended."""
        choices = self.choices(running.open)
        with running:
            async for index, event in running:
                choices[index].add(event)
        kind = "chat.completion" if self.chat else "text_completion"
        bodies = [self._whole(choice) for choice in choices]
        return self.common | {"object": kind, "choices": bodies, "usage": self.usage(choices)}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        body = {
            "index": choice.index,
            "finish_reason": choice.finished.finish_reason,
            "stats": finite(choice.finished.stats),
        }
        logprobs = self._format_logprobs(choice, choice.logprobs)
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return body | {"message": message, "logprobs": logprobs}
        return body | {"text": choice.text, "logprobs": logprobs}

    def _format_logprobs(self, choice: Choice, entries: Sequence[PlacedToken]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return choice.chat_logprobs(entries) if self.chat else choice.completion_logprobs(entries)

    async def chunks(self, running: Running, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Yield the bodies of the stream's events."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        common = self.common | {"object": kind} | ({"usage": None} if include_usage else {})
        choices = self.choices(running.open)
        if self.chat:
            for choice in choices:
                yield common | {"choices": [self._part(choice, "", None, {"role": "assistant"})]}
        async for index, event in running:
            entries = choices[index].add(event)
            text = event.text if isinstance(event, Piece) else ""
            if text or entries or isinstance(event, Done):
                logprobs = self._format_logprobs(choices[index], entries) if entries else None
                yield common | {"choices": [self._part(choices[index], text, logprobs)]}
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
