"""Clients of servers that implement OpenAI's completion protocol, with many requests in flight.

A request that fails for a transient reason (no connection, overload, malformed answer) is sent again to the
next server, after a pause that doubles. If all its attempts fail, it is reported and the others continue.
"""

import itertools
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import httpx

from ram.answers.jobs import AnswerJob
from ram.errors import UserError
from ram.log import log
from ram.storage.files import fingerprint
from ram.vllm import laws

Read = Callable[[dict[str, Any]], Any]  # extracts the result from the JSON of one answer
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}  # status codes after which a retry may succeed
FATAL = {401, 403, 404, 405}  # status codes that every other request will get too
FIRST_PAUSE = 0.5  # seconds
LONGEST_PAUSE = 30.0  # seconds


class RequestFailed(Exception):
    """All attempts of one request failed."""


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

    def add(self, answer: dict[str, Any]) -> None:
        """Count one answer. Malformed answers count too, because the server charges for them."""
        usage = answer.get("usage") or {}
        input_tokens = usage.get("prompt_tokens")
        output_tokens = usage.get("completion_tokens")
        with self.lock:
            self.answered += 1
            if isinstance(input_tokens, int) and isinstance(output_tokens, int):
                self.input_tokens += input_tokens
                self.output_tokens += output_tokens
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


class Endpoints:
    """A context manager for requests to one or more servers of the same model.

    Args:
        settings: urls (each up to and including /v1), model, key_env, concurrency, retries, and timeout in
            seconds.
        tally: Counts all answers.
    """

    def __init__(self, settings: ServerSettings, tally: Tally | None = None) -> None:
        self.settings = settings
        self.urls: list[str] = [url.rstrip("/") for url in settings.urls]
        self.tally = tally or Tally()
        key = os.environ.get(settings.key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{settings.key_env} holds no key: expected printable ASCII characters")
        limits = httpx.Limits(max_connections=settings.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(timeout=settings.timeout, limits=limits, headers=headers)
        self.next_server = itertools.count(random.randrange(len(self.urls)))
        self.failed_in_a_row = 0
        self.closing = threading.Event()

    def __enter__(self) -> "Endpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def model(self) -> str:
        """Return the model to request: the configured name, or the first name that the servers list."""
        if self.settings.model:
            return self.settings.model
        try:
            return str(self.send("GET", "models")["data"][0]["id"])
        except (RequestFailed, LookupError, TypeError) as error:
            raise UserError(f"{self.urls[0]}/models lists no model ({error}); set the model's name") from None

    def send(self, method: str, path: str, body: dict[str, Any] | None = None, read: Read = dict) -> Any:
        """Send one request, with retries, and return `read` of its answer.

        Args:
            read: Extracts the result from the answer's JSON. If it raises, the attempt has failed.

        Raises:
            RequestFailed: All attempts failed.
            UserError: No attempt can succeed: the URL or the key is wrong.
        """
        pause = FIRST_PAUSE
        attempt = 0
        while True:
            attempt += 1
            url = f"{self.urls[next(self.next_server) % len(self.urls)]}/{path}"
            retry_after = None
            try:
                response = self.client.request(method, url, json=body)
                status = response.status_code
                if status in FATAL:
                    raise UserError(f"{url} answers {status}: {_reason(response)}; {self.advice()}")
                if status == 200:
                    return self._result(method, response, read)
                reason = f"{status}: {_reason(response)}"
                if status not in TRANSIENT:
                    raise RequestFailed(reason)
                retry_after = _retry_after(response)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(f"{url!r} is not a valid URL ({error}); {self.advice()}") from None
            except ValueError as error:
                reason = str(error)
            except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
                reason = f"{type(error).__name__}: {error}"
            if attempt > self.settings.retries:
                raise RequestFailed(f"{reason} ({attempt} tries)")
            # The random factor keeps many failed requests from coming back at the same moment.
            seconds = retry_after if retry_after is not None else pause * random.uniform(0.5, 1.5)
            if self.closing.wait(seconds):
                raise RequestFailed("stopped")
            pause = min(2 * pause, LONGEST_PAUSE)

    def _result(self, method: str, response: httpx.Response, read: Read) -> Any:
        try:
            answer = response.json()
            if method == "POST":
                self.tally.add(answer)
            return read(answer)
        except Exception as error:  # a malformed answer can make `read` raise anything
            raise ValueError(f"the answer lacks the requested result ({error!r})") from None

    def advice(self) -> str:
        return f"check the urls and the key in the environment variable {self.settings.key_env}"

    def complete(
        self, requests: Iterable[tuple[Any, dict[str, Any]]], read: Read, path: str = "completions"
    ) -> Iterator[tuple[Any, Any]]:
        """Send all requests, `concurrency` at a time, and yield their results in order of arrival.

        Args:
            requests: (key, body) of each request. The key identifies its result.
            read: Extracts the result from an answer's JSON. If it raises, the attempt has failed.

        Yields:
            (key, result), or (key, RequestFailed) if all attempts failed.

        Raises:
            UserError: No request can succeed, or too many failed in a row.
        """
        concurrency = self.settings.concurrency
        most_failed = 2 * concurrency
        remaining = iter(requests)
        tasks: queue.SimpleQueue[tuple[Any, dict[str, Any]] | None] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

        def work() -> None:
            while (task := tasks.get()) is not None:
                key, body = task
                try:
                    results.put((key, self.send("POST", path, body, read)))
                except (RequestFailed, UserError) as error:
                    results.put((key, error))

        # Daemon threads, because Python waits for the threads of an executor after Ctrl-C.
        for _ in range(concurrency):
            threading.Thread(target=work, daemon=True).start()
        try:
            n_running = 0
            while True:
                for request in itertools.islice(remaining, concurrency - n_running):
                    tasks.put(request)
                    n_running += 1
                if not n_running:
                    return
                key, result = results.get()
                n_running -= 1
                if isinstance(result, UserError):
                    raise result
                self.failed_in_a_row = self.failed_in_a_row + 1 if isinstance(result, RequestFailed) else 0
                yield key, result
                if self.failed_in_a_row >= most_failed:
                    raise UserError(f"the last {most_failed} requests all failed ({result}); {self.advice()}")
        finally:
            self.closing.set()  # ends the pauses between attempts
            for _ in range(concurrency):
                tasks.put(None)


def _reason(response: httpx.Response) -> str:
    return response.text.strip().split("\n")[0][:200] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float | None:
    """Return the header Retry-After in seconds; None if it is missing or gives a date."""
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), LONGEST_PAUSE)
    except (KeyError, ValueError):
        return None


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
    if top_k > 0:
        common["top_k"] = top_k
    if repetition_penalty != 1.0:
        common["repetition_penalty"] = repetition_penalty
    if not job.pair.is_single_model:
        common |= laws.request_settings(job.params)  # all of them: the server has defaults of its own

    def request(index: int) -> tuple[int, dict[str, Any]]:
        prompt: list[int] | str = prompt_ids[index]
        if settings.endpoint.send == "text":
            text = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            prompt = text.removeprefix(str(tokenizer.bos_token or ""))  # the server adds its own
        seed = int(fingerprint([job.seed, job.row_ids[index]])[:8], 16) >> 1  # 31 bits: any server takes it
        return index, common | {"model": model, "prompt": prompt, "seed": seed}

    def read(answer: dict[str, Any]) -> dict[str, Any]:
        choice = answer["choices"][0]
        text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}")
        n_tokens = (answer.get("usage") or {}).get("completion_tokens")
        return {
            "text": text,
            "finish_reason": choice.get("finish_reason") or "stop",
            "n_tokens": len(tokenizer(text).input_ids) if n_tokens is None else int(n_tokens),
            "stats": {"drafted": 0, "accepted": 0},
        }

    if not indices:
        return
    with Endpoints(settings.endpoint) as servers:
        model = servers.model()
        log.info(f"{job.label}: {len(indices)} rows to {model} at {', '.join(servers.urls)}")
        for index, result in servers.complete(map(request, indices), read):
            if isinstance(result, RequestFailed):
                yield {"index": index, "failed": str(result)}
            else:
                yield {"index": index, **result}
