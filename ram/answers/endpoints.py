"""Clients of servers that implement OpenAI's completion protocol, with many requests in flight.

A request that fails for a transient reason (no connection, overload, malformed answer) is sent again to the
next server, after a pause that doubles. If all its attempts fail, it is reported and the others continue.

Nothing that a server sends is trusted: an attempt has one deadline from the first byte to the last, an answer
has a largest size and must not be compressed, counts must be possible, and texts are made safe to show.
"""

import asyncio
import concurrent.futures
import itertools
import json
import os
import queue
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from ram.answers.jobs import AnswerJob
from ram.data.text import text_of
from ram.errors import UserError
from ram.log import log, printable, redacted
from ram.storage.files import fingerprint
from ram.vllm import laws

if TYPE_CHECKING:
    import httpx  # elsewhere in functions: every command imports this module, few ask a server

Read = Callable[[dict[str, Any]], Any]  # extracts the result from the JSON of one answer
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # status codes after which a retry may succeed
FATAL = {401, 403, 404, 405}  # status codes that every other request to this server will get too
FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 30.0  # seconds
MAX_BYTES = 4 << 20  # of an answer; as parsed JSON it may take twenty times as much


class RequestFailed(Exception):
    """All attempts of one request failed."""


# What servers call an answer's end: OpenAI's words, and those of text-generation-inference.
FINISHED = ("stop", "length", "eos", "eos_token", "stop_sequence")


class Tally:
    """Count of requests and tokens, by the servers' own `usage`, and their price.

    Args:
        prices: Price of a million input tokens and of a million output tokens; None if unknown.
    """

    def __init__(self, prices: tuple[float | None, float | None] = (None, None)) -> None:
        self.prices = prices
        self.lock = threading.Lock()
        self.sent = 0
        self.answered = 0
        self.uncounted = 0  # answers without a `usage`
        self.input_tokens = 0
        self.output_tokens = 0

    def add(self, answer: dict[str, Any], sent: dict[str, Any]) -> None:
        """Count one answer. Malformed answers count too, because the server charges for them.

        A count that the request cannot have caused is not believed: a token of the prompt has at least one
        byte, a template adds some, and `max_tokens` limits those of the answer.
        """
        usage = usage_of(answer)
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        most = len(json.dumps(sent)) + 10_000
        with self.lock:
            self.answered += 1
            if is_count(prompt, most) and is_count(completion, sent.get("max_tokens", most)):
                self.input_tokens += prompt
                self.output_tokens += completion
            else:
                self.uncounted += 1

    @property
    def price(self) -> float | None:
        """Price of all answers so far, in the currency of `prices`."""
        input_price, output_price = self.prices
        if input_price is None or output_price is None:
            return None
        return (self.input_tokens * input_price + self.output_tokens * output_price) / 1e6

    def __str__(self) -> str:
        text = f"{self.answered:,} requests answered, {self.input_tokens:,} input tokens and "
        text += f"{self.output_tokens:,} output tokens"
        if self.uncounted:
            text += f" ({self.uncounted:,} answers without a count)"
        return text if self.price is None else f"{text}, price {self.price:.2f}"


class ServerSettings(Protocol):
    """The settings of `Endpoints`, which sampling and judges have among others."""

    @property
    def urls(self) -> list[str]: ...
    @property
    def model(self) -> str | None: ...
    @property
    def key_env(self) -> str | None: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def timeout(self) -> float: ...


def usage_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a server's counts of tokens, empty if it gives none."""
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else {}


def is_count(value: object, most: int) -> TypeGuard[int]:
    """Return whether a server's value is a possible number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


class Endpoints:
    """A context manager for requests to one or more servers of the same model.

    Args:
        settings: urls (each up to and including /v1), model, key_env, concurrency, retries, and timeout in
            seconds, of a whole attempt.
        tally: Counts all answers.
    """

    def __init__(self, settings: ServerSettings, tally: Tally | None = None) -> None:
        import httpx

        self.settings = settings
        self.urls: list[str] = [url.rstrip("/") for url in settings.urls]
        self.names = [redacted(url) for url in self.urls]  # for people: without passwords
        self.tally = tally or Tally()
        key = os.environ.get(settings.key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{settings.key_env} holds no key: expected printable ASCII characters")
        limits = httpx.Limits(max_connections=settings.concurrency)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.client = httpx.AsyncClient(timeout=None, limits=limits, headers=headers)
        self.next_server = itertools.count(random.randrange(len(self.urls)))
        self.lost: dict[tuple[int, str], str] = {}  # (number of a server, path) -> why it is asked no more
        self.failed_in_a_row = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> "Endpoints":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._run(self._close()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()

    def _run(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def model(self) -> str:
        """Return the model to request: the configured name, or the first name that the servers list."""
        if self.settings.model:
            return self.settings.model
        try:
            return printable(str(self.send("GET", "models")["data"][0]["id"]))
        except (RequestFailed, LookupError, TypeError) as error:
            raise UserError(
                f"{self.names[0]}/models lists no model ({error}); set the model's name"
            ) from None

    def send(self, method: str, path: str, body: dict[str, Any] | None = None, read: Read = dict) -> Any:
        """Send one request, with retries, and return `read` of its answer.

        Args:
            read: Extracts the result from the answer's JSON. If it raises, the attempt has failed.

        Raises:
            RequestFailed: All attempts failed.
            UserError: No attempt can succeed: the URLs or the key are wrong.
        """
        return self._run(self._send(method, path, body, read)).result()

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, read: Read) -> Any:
        import httpx

        pause = FIRST_PAUSE
        attempt = 0
        while True:
            servers = [number for number in range(len(self.urls)) if (number, path) not in self.lost]
            if not servers:
                raise UserError(f"{self.lost[0, path]}; {self.advice()}")
            server = servers[next(self.next_server) % len(servers)]
            attempt += 1
            name, retry_after = f"{self.names[server]}/{path}", None
            try:
                async with asyncio.timeout(self.settings.timeout):
                    status, headers, content = await self._receive(
                        method, f"{self.urls[server]}/{path}", body
                    )
                if status == 200:
                    return self._result(content, body, read)
                reason = f"{status}: {_reason(status, content)}"
                if status in FATAL:
                    if (server, path) not in self.lost:
                        log.warning(f"{name} answers {reason}: it is asked no more")
                    self.lost[server, path] = f"{name} answers {reason}"
                    attempt -= 1
                    continue
                if status not in TRANSIENT:
                    raise RequestFailed(reason)
                retry_after = _retry_after(headers)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(f"{name!r} is not a valid URL ({error}); {self.advice()}") from None
            except TimeoutError:
                reason = f"no whole answer in {self.settings.timeout:g} s"
            except ValueError as error:
                reason = str(error)
            except httpx.HTTPError as error:
                cause: BaseException = error
                while isinstance(error, httpx.ConnectError) and (
                    first := cause.__cause__ or cause.__context__
                ):
                    cause = first  # it names the reason
                reason = f"{type(cause).__name__}: {cause}"
            if attempt > self.settings.retries:
                raise RequestFailed(f"{printable(reason)} ({attempt} tries)")
            # The random factor keeps many failed requests from coming back at the same moment.
            await asyncio.sleep(retry_after if retry_after is not None else pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _receive(
        self, method: str, url: str, body: dict[str, Any] | None
    ) -> "tuple[int, httpx.Headers, bytes]":
        """Return status, headers and content of an answer; ValueError if it is too large or compressed."""
        content = bytearray()
        async with self.client.stream(method, url, json=body) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":  # a few bytes could become any number
                raise ValueError(f"the answer is compressed ({encoding[:20]}), which was not asked for")
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_BYTES:
                    raise ValueError(f"the answer is longer than {MAX_BYTES:,} bytes")
        return response.status_code, response.headers, bytes(content)

    def _result(self, content: bytes, body: dict[str, Any] | None, read: Read) -> Any:
        try:
            answer = json.loads(content, parse_constant=_refuse)
            if body is not None:
                self.tally.add(answer, body)
            return read(answer)
        except Exception as error:  # a malformed answer can make `read` raise anything
            raise ValueError(f"the answer lacks the requested result ({repr(error)[:200]})") from None

    def advice(self) -> str:
        return f"check the urls and the key in the environment variable {self.settings.key_env}"

    def complete(
        self, requests: Iterable[tuple[Any, dict[str, Any]]], read: Read, path: str = "completions"
    ) -> Iterator[tuple[Any, Any]]:
        """Send all requests, `concurrency` at a time, and yield their results in order of arrival.

        Args:
            requests: (key, body) of each request. The key identifies its result.
            read: Extracts the result from an answer's JSON. If it raises, the attempt has failed; if it
                returns RequestFailed, the request has.

        Yields:
            (key, result), or (key, RequestFailed) if all attempts failed.

        Raises:
            UserError: No request can succeed, or too many failed in a row.
        """
        concurrency = self.settings.concurrency
        most_failed = 2 * concurrency
        remaining = iter(requests)
        results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

        async def work(key: Any, body: dict[str, Any]) -> None:
            try:
                results.put((key, await self._send("POST", path, body, read)))
            except Exception as error:
                results.put((key, error))

        n_running = 0
        while True:
            for key, body in itertools.islice(remaining, concurrency - n_running):
                self._run(work(key, body))
                n_running += 1
            if not n_running:
                return
            key, result = results.get()
            n_running -= 1
            if isinstance(result, Exception) and not isinstance(result, RequestFailed):
                raise result
            self.failed_in_a_row = self.failed_in_a_row + 1 if isinstance(result, RequestFailed) else 0
            yield key, result
            if self.failed_in_a_row >= most_failed:
                raise UserError(f"the last {most_failed} requests all failed ({result}); {self.advice()}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _reason(status: int, content: bytes) -> str:
    """Return the first line of an error's text, safe to show."""
    import httpx

    line = content[:2000].decode(errors="replace").strip().split("\n")[0]
    return printable(line)[:200] or httpx.codes.get_reason_phrase(status)


def _retry_after(headers: "httpx.Headers") -> float | None:
    """Return the header Retry-After in seconds; None if it is missing or gives a date."""
    try:
        seconds = float(headers["Retry-After"])
    except (KeyError, ValueError):
        return None
    return min(max(seconds, 0.0), LONGEST_PAUSE) if seconds == seconds else None


def answers(job: AnswerJob, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the configured servers' answers to some prompts of a job, in order of arrival.

    If all attempts of a request fail, its answer has only `index` and the reason, `failed`.
    """
    settings = job.settings
    tokenizer, prompt_ids = job.encoded
    prefix = "" if job.pair.aligner else "base_"
    top_k = getattr(settings, f"{prefix}top_k")
    repetition_penalty = getattr(settings, f"{prefix}repetition_penalty")
    common: dict[str, Any] = {
        "max_tokens": job.max_new_tokens,
        "temperature": getattr(settings, f"{prefix}temperature"),
        "top_p": getattr(settings, f"{prefix}top_p"),
    }
    # Not every server accepts the following keys, so they are sent only if they have an effect.
    if job.stop:
        common["stop"] = job.stop
    # As ids: servers such as vLLM leave special tokens out of the text in which they look for strings.
    if ids := job.stop_ids(tokenizer):
        common["stop_token_ids"] = ids
    if top_k > 0:
        common["top_k"] = top_k
    if repetition_penalty != 1.0:
        common["repetition_penalty"] = repetition_penalty
    if job.pair.is_pair:
        common |= laws.request_settings(job.params)  # all of them: the server has defaults of its own

    def request(index: int) -> tuple[int, dict[str, Any]]:
        prompt: list[int] | str = prompt_ids[index]
        if settings.endpoint.send == "text":
            prompt = text_of(tokenizer, prompt, marks=True).removeprefix(
                str(tokenizer.bos_token or "")  # the server adds its own
            )
        seed = int(fingerprint([job.seed, job.row_ids[index]])[:8], 16) >> 1  # 31 bits: any server takes it
        return index, common | {"model": model, "prompt": prompt, "seed": seed}

    def read(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}")
        # Half of a surrogate pair is a character that was cut, as by our own decoding; no file can hold it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        n_tokens = usage_of(answer).get("completion_tokens")
        if not is_count(n_tokens, job.max_new_tokens):
            n_tokens = len(tokenizer(text).input_ids)
        if (reason := choice.get("finish_reason")) not in FINISHED:
            raise ValueError(f"finish_reason is {reason!r}: the answer is not whole")
        return {
            "text": text,
            "finish_reason": "length" if reason == "length" else "stop",
            "n_tokens": n_tokens,
            "stats": {"drafted": 0, "accepted": 0},
        }

    if not indices:
        return
    with Endpoints(settings.endpoint) as servers:
        model = servers.model()
        log.info(f"{job.label}: {len(indices)} rows to {model} at {', '.join(servers.names)}")
        for index, result in servers.complete(map(request, indices), read):
            if isinstance(result, RequestFailed):
                yield {"index": index, "failed": str(result)}
            else:
                yield {"index": index, **result}
