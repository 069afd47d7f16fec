"""Answers from servers that speak OpenAI's completion protocol, many requests at once.

A request that fails in a way that may pass (no connection, overload, a broken answer) is sent again, to the
next server, after a pause that doubles; one that keeps failing is listed and the others go on.
"""

import itertools
import os
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import httpx

from ram.errors import UserError
from ram.log import log
from ram.storage.files import fingerprint

Read = Callable[[dict[str, Any]], Any]
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # status codes that another try may not meet
HOPELESS = {401, 403, 404, 405}  # that every other request will meet too
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds


class Failed(Exception):
    """A request that was given up."""


class Tally:
    """What was asked and answered, by the servers' own count of tokens (`usage`), and what it costs.

    prices: of a million input and a million output tokens, None where they are not known.
    """

    def __init__(self, prices: tuple[float | None, float | None] = (None, None)) -> None:
        self.prices, self.lock = prices, threading.Lock()
        self.sent = self.answered = self.uncounted = self.input_tokens = self.output_tokens = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Counts an answer, whatever it says: a malformed one is paid for too."""
        usage = answer.get("usage") or {}
        counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
        with self.lock:
            self.answered += 1
            if not all(isinstance(count, int) for count in counts):
                self.uncounted += 1
                return
            self.input_tokens += counts[0]
            self.output_tokens += counts[1]

    @property
    def price(self) -> float | None:
        """So far, in the prices' currency."""
        if None in self.prices:
            return None
        return (self.input_tokens * self.prices[0] + self.output_tokens * self.prices[1]) / 1e6

    def __str__(self) -> str:
        text = f"{self.answered:,} requests answered, {self.input_tokens:,} input tokens and "
        text += f"{self.output_tokens:,} output tokens"
        text += f" ({self.uncounted:,} answers without a count)" if self.uncounted else ""
        return text if self.price is None else f"{text}, price {self.price:.2f}"


class Endpoints:
    """One or many servers of the same model.

    settings: urls (each up to and including /v1), key_env, concurrency, retries, timeout in seconds. tally:
    counts all answers. Use as a context.
    """

    def __init__(self, settings, tally: Tally | None = None) -> None:
        self.settings, self.urls = settings, [url.rstrip("/") for url in settings.urls]
        self.tally = tally or Tally()
        key = os.environ.get(settings.key_env or "", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{settings.key_env} holds no key: expected printable ASCII characters")
        limits = httpx.Limits(max_connections=settings.concurrency)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(timeout=settings.timeout, limits=limits, headers=headers)
        self.next = itertools.count(random.randrange(len(self.urls)))
        self.failed_in_a_row, self.leaving = 0, threading.Event()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.client.close()

    def model(self) -> str:
        """The name that is asked for: the settings', or the first one that the servers list."""
        if self.settings.model:
            return self.settings.model
        try:
            return str(self.send("GET", "models")["data"][0]["id"])
        except (Failed, LookupError, TypeError) as error:
            raise UserError(f"{self.urls[0]}/models names no model ({error}); set the model's name") from None

    def send(self, method: str, path: str, body: dict | None = None, read: Read = dict) -> Any:
        """`read` of one answer's JSON; raises Failed where all tries fail, UserError where none can
        succeed.
        """
        pause = FIRST_PAUSE
        for tries in itertools.count(1):
            url, wait_for = f"{self.urls[next(self.next) % len(self.urls)]}/{path}", None
            try:
                answer = self.client.request(method, url, json=body)
                if answer.status_code in HOPELESS:
                    raise UserError(f"{url} answers {answer.status_code}: {_reason(answer)}; {self.advice()}")
                if answer.status_code == 200:
                    try:
                        found = answer.json()
                        if method == "POST":
                            self.tally.add(found)
                        return read(found)
                    except Exception as error:  # whatever `read` stumbles over
                        raise ValueError(f"an answer without what was asked for ({error!r})") from None
                reason = f"{answer.status_code}: {_reason(answer)}"
                if answer.status_code not in PASSING:
                    raise Failed(reason)
                wait_for = _seconds(answer.headers.get("Retry-After"))
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(f"{url!r} is no address ({error}); {self.advice()}") from None
            except (httpx.HTTPError, ValueError, RuntimeError) as error:  # the last: closed meanwhile
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            if tries > self.settings.retries:
                raise Failed(f"{reason} ({tries} tries)")
            if self.leaving.wait(wait_for if wait_for is not None else pause * random.uniform(0.5, 1.5)):
                raise Failed("stopped")
            pause = min(2 * pause, LONGEST_PAUSE)

    def advice(self) -> str:
        return f"check the urls and the key in the environment variable {self.settings.key_env}"

    def complete(
        self, requests: Iterable[tuple[Any, dict]], read: Read, path: str = "completions"
    ) -> Iterator[tuple[Any, Any]]:
        """(key, read(answer) or Failed) of every (key, body), as they come, `concurrency` at a time.

        read: takes an answer apart; an exception there counts as a failed try.
        """

        def one(key: Any, body: dict) -> tuple[Any, Any]:
            try:
                return key, self.send("POST", path, body, read)
            except (Failed, UserError) as error:
                return key, error

        def work() -> None:
            while (request := asked.get()) is not None:
                answered.put(one(*request))

        waiting, most = iter(requests), self.settings.concurrency
        asked, answered = queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(most):  # daemons: an executor's threads would be waited for after Ctrl-C
            threading.Thread(target=work, daemon=True).start()
        try:
            running = 0
            while True:
                for request in itertools.islice(waiting, most - running):
                    asked.put(request)
                    running += 1
                if not running:
                    return
                key, found = answered.get()
                running -= 1
                if isinstance(found, UserError):
                    raise found
                self.failed_in_a_row = self.failed_in_a_row + 1 if isinstance(found, Failed) else 0
                yield key, found
                if self.failed_in_a_row >= 2 * most:
                    raise UserError(f"the last {2 * most} requests all failed ({found}); {self.advice()}")
        finally:
            self.leaving.set()
            for _ in range(most):
                asked.put(None)


def _reason(answer: httpx.Response) -> str:
    return answer.text.strip().split("\n")[0][:200] or answer.reason_phrase


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is not worth reading."""
    try:
        return min(max(float(text), 0.0), LONGEST_PAUSE)
    except (TypeError, ValueError):
        return None


def answers(job, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Answers to some rows of a `jobs.Job` by the servers of its settings; of a row that keeps failing
    its index and the reason, `failed`.
    """
    settings, (tokenizer, ids) = job.settings, job.encoded
    role = "" if job.pair.aligner else "base_"
    law = {key: settings[f"{role}{key}"] for key in ("temperature", "top_p", "top_k", "repetition_penalty")}
    common = {"max_tokens": job.max_new_tokens, "temperature": law["temperature"], "top_p": law["top_p"]}
    # What not every server knows is sent only where it says something.
    common |= {"stop": job.stop} if job.stop else {}
    common |= {"top_k": law["top_k"]} if law["top_k"] > 0 else {}
    common |= {"repetition_penalty": law["repetition_penalty"]} if law["repetition_penalty"] != 1.0 else {}

    def request(row: int) -> tuple[int, dict[str, Any]]:
        prompt = ids[row]
        if settings.endpoint.send == "text":
            prompt = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
            prompt = prompt.removeprefix(tokenizer.bos_token or "")  # a server that is sent text adds its own
        seed = int(fingerprint([job.seed, job.row_ids[row]])[:8], 16) >> 1
        return row, common | {"model": model, "prompt": prompt, "seed": seed}

    def read(answer: dict[str, Any]) -> dict[str, Any]:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}")
        length = usage.get("completion_tokens")
        return {
            "text": text,
            "finish_reason": choice.get("finish_reason") or "stop",
            "n_tokens": len(tokenizer(text).input_ids) if length is None else int(length),
            "stats": {"drafted": 0, "accepted": 0},
        }

    if not rows:
        return
    with Endpoints(settings.endpoint) as servers:
        model = servers.model()
        log.info(f"{job.label}: {len(rows)} rows to {model} at {', '.join(servers.urls)}")
        for row, found in servers.complete(map(request, rows), read):
            yield {"index": row, **({"failed": str(found)} if isinstance(found, Failed) else found)}
