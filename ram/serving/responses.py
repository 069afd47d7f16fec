"""Answers of the engine as OpenAI's protocol tells them: whole, or piece by piece as they grow.

requests -> Running (events of all rows, in the order they come) -> Choice (text, log-probabilities) -> JSON
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
from typing import Any

from starlette.responses import Response

from ram.decoding.requests import EngineError, Request
from ram.decoding.rows import StopWatch
from ram.serving.loop import Done, EngineThread, Piece
from ram.serving.protocol import ApiError

LAST_WORDS = 5  # seconds that the end of a stream may take to be sent
LEAST_LOGP = -9999.0  # what the protocol says for a token that the law excludes


class Gone(Exception):
    """The client hung up."""


class Running:
    """Some requests in the engine, cancelled when the context is left. Raises EngineError where the engine
    does not take all of them.

    streamed: whether what comes is wanted as soon as it does; else the loop is left alone until an answer
    ends.
    """

    def __init__(self, engine: EngineThread, requests: Sequence[Request], streamed: bool) -> None:
        self.engine, self.open, self.streamed = engine, len(requests), streamed
        self.loop, self.events = asyncio.get_running_loop(), deque()
        self.came, self.called = asyncio.Event(), False
        self.tickets = []
        try:
            for index, request in enumerate(requests):
                self.tickets.append(engine.submit(request, functools.partial(self._hear, index)))
        except EngineError:
            self.cancel()
            raise

    def _hear(self, index: int, event: Piece | Done) -> None:
        """Called by the engine's thread."""
        self.events.append((index, event))
        if self.called or not (self.streamed or isinstance(event, Done)):
            return
        self.called = True
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.came.set)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.cancel()

    def cancel(self) -> None:
        for ticket in self.tickets:
            self.engine.cancel(ticket)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        while self.open:
            if not self.events:
                await self.came.wait()
                self.came.clear()
                self.called = False  # before the events are looked at: what comes later calls again
                continue
            index, event = self.events.popleft()
            if isinstance(event, Done):
                self.open -= 1
                if event.finish_reason == "error":
                    raise ApiError(500, event.error or "decoding failed", "engine_error")
                if event.finish_reason == "cancelled":  # not by this side: the server is being stopped
                    raise ApiError(503, "the server is shutting down", "shutting_down")
            yield index, event


async def while_connected(receive, work: Coroutine) -> Any:
    """The result of `work`, which is cancelled, and Gone raised, as soon as the client hangs up."""

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
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class Choice:
    """One answer while it grows, and what the protocol says of each of its tokens."""

    def __init__(self, index: int, tokenizer) -> None:
        self.index, self.text, self.done = index, "", None
        self.tokenizer, self.watch = tokenizer, StopWatch(tokenizer, ())
        self.logprobs: list[tuple[int, Any, int]] = []  # token, its log-probabilities, where its text begins
        self.ids: list[int] = []  # the newest tokens, whose text may still become another
        self.length = 0  # of the text before them

    def hear(self, event: Piece | Done) -> list[tuple[int, Any, int]]:
        """Takes an event in; returns the new tokens' entries of `logprobs`."""
        if isinstance(event, Done):
            self.done = event
            return []
        self.text += event.text
        before = len(self.logprobs)
        if event.logprobs is not None:
            for token, known in zip(event.token_ids, event.logprobs, strict=True):
                self.logprobs.append((token, known, self._place(token)))
        return self.logprobs[before:]

    def _place(self, token: int) -> int:
        """How many characters of the text come before a token's own; all bytes of a character begin with
        it.
        """
        before = self.watch.text(self.ids)
        self.ids.append(token)
        text = self.watch.text(self.ids)
        start = self.length + len(os.path.commonprefix([before, text]))
        if not text.endswith("\ufffd"):
            self.ids = [token]  # what comes next is read with it: some tokenizers drop a text's first space
            self.length += len(text) - len(self.watch.text(self.ids))
        return start

    def spelling(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def chat_logprobs(self, entries: Sequence[tuple[int, Any, int]]) -> dict[str, Any]:
        content = []
        for token, known, start in entries:
            top = [self._spelt(other, value) for other, value in known.top]
            said = {"top_logprobs": top, "text_offset": start}
            content.append(self._spelt(token, known.logprob) | said)
        return {"content": content, "refusal": None}

    def _spelt(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spelling(token)
        known = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": max(logprob, LEAST_LOGP), "bytes": known}

    def completion_logprobs(self, entries: Sequence[tuple[int, Any, int]]) -> dict[str, Any]:
        return {
            "tokens": [self.spelling(token) for token, _, _ in entries],
            "token_logprobs": [max(known.logprob, LEAST_LOGP) for _, known, _ in entries],
            "top_logprobs": [
                {self.spelling(other): max(value, LEAST_LOGP) for other, value in known.top}
                for _, known, _ in entries
            ],
            "text_offset": [start for _, _, start in entries],
        }


class Answer:
    """What a request's answers have in common, whole or streamed. chat: which of the two protocols."""

    def __init__(self, chat: bool, served, seed: int, n: int, logprobs: bool, tokenizer) -> None:
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
        """Exact counts; a prompt with several answers counts once."""
        read = sum(choice.done.n_prompt for choice in choices[:: self.n])
        written = sum(choice.done.n_completion for choice in choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    async def whole(self, running: Running) -> dict[str, Any]:
        choices = self.choices(running.open)
        with running:
            async for index, event in running:
                choices[index].hear(event)
        kind = "chat.completion" if self.chat else "text_completion"
        found = [self._whole(choice) for choice in choices]
        return self.common | {"object": kind, "choices": found, "usage": self.usage(choices)}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        found = {
            "index": choice.index,
            "finish_reason": choice.done.finish_reason,
            "stats": finite(choice.done.stats),
        }
        told = self.chat_or_completion(choice, choice.logprobs)
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return found | {"message": message, "logprobs": told}
        return found | {"text": choice.text, "logprobs": told}

    def chat_or_completion(self, choice: Choice, entries) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return choice.chat_logprobs(entries) if self.chat else choice.completion_logprobs(entries)

    async def chunks(self, running: Running, include_usage: bool) -> AsyncIterator[dict[str, Any]]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        common = self.common | {"object": kind} | ({"usage": None} if include_usage else {})
        choices = self.choices(running.open)
        if self.chat:
            for choice in choices:
                yield common | {"choices": [self._part(choice, "", None, {"role": "assistant"})]}
        async for index, event in running:
            entries = choices[index].hear(event)
            text = event.text if isinstance(event, Piece) else ""
            if text or entries or isinstance(event, Done):
                logprobs = self.chat_or_completion(choices[index], entries) if entries else None
                yield common | {"choices": [self._part(choices[index], text, logprobs)]}
        if include_usage:
            yield common | {"choices": [], "usage": self.usage(choices)}

    def _part(
        self, choice: Choice, text: str, logprobs, role: dict[str, str] | None = None
    ) -> dict[str, Any]:
        done = choice.done
        found = {"index": choice.index, "finish_reason": done.finish_reason if done else None}
        found |= {"logprobs": logprobs} | ({"stats": finite(done.stats)} if done else {})
        if self.chat:
            return found | {"delta": {} if done else (role or {}) | {"content": text}}
        return found | {"text": text}


class EventStream(Response):
    """Server-sent events of an answer; the engine hears at once when the client hangs up.

    What goes wrong after the first event is told as one with an `error`, as the status is sent already.
    """

    media_type = "text/event-stream"

    def __init__(self, running: Running, chunks: AsyncIterator[dict[str, Any]], seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.running, self.chunks, self.seconds = running, chunks, seconds

    async def __call__(self, scope, receive, send) -> None:
        with self.running:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            with contextlib.suppress(Gone, OSError, TimeoutError):
                await send(start)
                await while_connected(receive, self._send(send))

    async def _send(self, send) -> None:
        async def event(data: str, more: bool = True) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in self.chunks:
                    await event(to_json(chunk))
        except TimeoutError:
            failed = too_slow(self.seconds)
        except ApiError as error:
            failed = error
        else:
            failed = None
        async with asyncio.timeout(LAST_WORDS):  # a client may have stopped reading
            if failed is not None:
                await event(to_json(failed.body()))
            await event("[DONE]", more=False)


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"no whole answer within {seconds:g} seconds; it was cancelled", "timeout")


def finite(stats: dict[str, float]) -> dict[str, float]:
    """What JSON can say: the KL is infinite where the aligner excludes what the proposal does not."""
    return {key: value for key, value in stats.items() if math.isfinite(value)}


def to_json(value: Any) -> str:
    """ASCII alone: some clients take U+2028 and its like for the end of an event's line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def answer_json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), status, headers, "application/json")
