"""A worker of FastChat's controller over the engine, so that FastChat's own web page and OpenAI server work
with pairs: each aligner is a model there, and so is the proposal alone.

    python -m fastchat.serve.controller
    python serve.py worker proposal=FOLDER aligner=FOLDER
    python serve.py fastchat openai_api_server         FastChat's servers, repaired for today's packages

Protocol: FastChat 0.2.36, serve/base_model_worker.py. It has no keys, so a worker listens on loopback unless
`worker.exposed` says that the network is trusted.
"""

import asyncio
import contextlib
import dataclasses
import json
import runpy
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ram.data import prompts
from ram.decoding import requests as decoding
from ram.decoding.par import PARParams
from ram.decoding.requests import EngineError, TooLong, UnknownAligner
from ram.errors import UserError, nearest
from ram.log import log
from ram.serving.guard import HUNG_UP, Guard
from ram.serving.loop import Busy, Done
from ram.serving.metrics import Metrics
from ram.serving.protocol import LAW_OF_ONE, ApiError
from ram.serving.registry import Models, Served
from ram.serving.responses import Gone, Running, answer_json, to_json, while_connected
from ram.settings.serving import Settings, is_loopback

HEART_BEAT = 45  # seconds; the controller forgets a worker after 90
RETRY = 2  # seconds between attempts to reach a controller
SERVERS = ("controller", "openai_api_server", "gradio_web_server", "gradio_web_server_multi")


# ---- registering -------------------------------------------------------------------------------------------


def check_exposure(settings: Settings) -> None:
    """Raises UserError for a worker that others would reach, unless the settings say that they may."""
    if not is_loopback(settings.config.host) and not settings.config.worker.exposed:
        raise UserError(
            f"host={settings.config.host} is reached from elsewhere, and FastChat's protocol knows no keys: "
            "set worker.exposed=true where all who reach it may use it"
        )


@contextlib.contextmanager
def registered(models: Models, url: str) -> Iterator[Guard]:
    """The worker's application; while the context lasts, the controller knows of it once it listens."""
    stop = threading.Event()
    address = models.settings.config.worker.address or url
    thread = threading.Thread(target=_keep_registered, args=(models, address, stop), daemon=True)
    thread.start()
    try:
        yield create_worker(models)
    finally:
        stop.set()
        thread.join(RETRY)


def _keep_registered(models: Models, address: str, stop: threading.Event) -> None:
    controller = models.settings.config.worker.controller.rstrip("/")
    known = told = False
    wait = 0.2  # until the worker listens itself
    with httpx.Client(timeout=5) as client:
        while not stop.wait(wait):
            try:
                if known:
                    body = {"worker_name": address, "queue_length": queue_length(models)}
                    known = bool(client.post(f"{controller}/receive_heart_beat", json=body).json()["exist"])
                if not known:
                    body = {"worker_name": address, "check_heart_beat": True, "multimodal": False}
                    body["worker_status"] = status(models)
                    client.post(f"{controller}/register_worker", json=body).raise_for_status()
                    log.info(f"registered at {controller} as {address}")
                known, told, wait = True, False, HEART_BEAT
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                if not told:
                    log.warning(f"no controller at {controller} ({type(error).__name__}); trying on")
                told, wait = True, RETRY


def status(models: Models) -> dict[str, Any]:
    return {"model_names": list(models.served), "speed": 1, "queue_length": queue_length(models)}


def queue_length(models: Models) -> int:
    figures = models.engine.figures()
    return figures["waiting"] + figures["rows"]


# ---- the worker's endpoints --------------------------------------------------------------------------------


def failure(error: Exception) -> dict[str, Any]:
    """What FastChat shows of a request that failed."""
    from fastchat.constants import ErrorCode

    code = ErrorCode.INTERNAL_ERROR
    for kind, found in (
        (Busy, ErrorCode.ENGINE_OVERLOADED),
        (UnknownAligner, ErrorCode.INVALID_MODEL),
        (TooLong, ErrorCode.CONTEXT_OVERFLOW),
        ((EngineError, ValueError, OverflowError), ErrorCode.PARAM_OUT_OF_RANGE),
    ):
        if isinstance(error, kind):
            code = found
            break
    return {"text": str(error), "error_code": int(code)}


def to_request(models: Models, params: dict[str, Any], served: Served) -> tuple[list[decoding.Request], str]:
    """FastChat's request as the engine takes it, and what is shown before its answer (the prompt, with
    `echo`). Raises EngineError, ValueError, TypeError or OverflowError for one that cannot be answered.
    """
    prompt = params.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("prompt: expected a text")
    given = {key: params[key] for key in PARParams.field_names() if params.get(key) is not None}
    if served.aligner is None:
        given |= {f"base_{key}": given.pop(key) for key in LAW_OF_ONE if key in given}
    stop = params.get("stop") or []
    stop = [each for each in ([stop] if isinstance(stop, str) else stop) if each]
    if not all(isinstance(each, str) for each in stop):
        raise ValueError("stop: expected texts")
    ends = params.get("stop_token_ids") or []
    if not (isinstance(ends, list) and all(type(each) is int for each in ends)):
        raise ValueError("stop_token_ids: expected a list of token ids")
    wanted = params.get("max_new_tokens")
    wanted = models.usual if wanted is None else int(wanted)
    room = models.max_length - len(models.encode_text(prompt, served.add_bos))
    new = min(wanted, max(room, models.usual))  # FastChat asks for more than there is
    ids = models.encode_cut(prompt, new, served.add_bos)
    seed = params.get("seed", models.settings.config.seed)
    seed = secrets.randbits(32) if seed is None else int(seed)
    requests = models.requests(served, [ids], models.law(given), new, seed, stop, stop_token_ids=ends)
    return requests, prompt if params.get("echo", True) else ""


async def growing(running: Running, shown: str) -> AsyncIterator[dict[str, Any]]:
    """FastChat's items: the whole text so far; the last one has the counts and how it ended."""
    common = {"error_code": 0, "logprobs": None}
    with running:
        async for _, event in running:
            if isinstance(event, Done):
                usage = {"prompt_tokens": event.n_prompt, "completion_tokens": event.n_completion}
                usage["total_tokens"] = event.n_prompt + event.n_completion
                yield common | {"text": shown, "finish_reason": event.finish_reason, "usage": usage}
            elif event.text:
                shown += event.text
                yield common | {"text": shown, "finish_reason": None}


class Items(Response):
    """Items as JSON texts that end with a zero byte, as long as the client stays."""

    def __init__(self, items: AsyncIterator[dict[str, Any]], seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.items, self.seconds = items, seconds

    async def __call__(self, scope, receive, send) -> None:
        async def sent() -> None:
            async for item in self.items:
                body = to_json(item).encode() + b"\0"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        with contextlib.suppress(Gone, OSError, TimeoutError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.timeout(self.seconds):
                await while_connected(receive, sent())


def create_worker(models: Models) -> Guard:
    """The worker as an ASGI application."""
    config = models.settings.config

    async def items(params: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            served = models.find(str(params.get("model")))
            requests, shown = await asyncio.to_thread(to_request, models, params, served)
            async for item in growing(Running(models.engine, requests, streamed=True), shown):
                yield item
        except (EngineError, ApiError, ValueError, TypeError, OverflowError) as error:
            yield failure(error)

    async def generate_stream(request: Request) -> Response:
        return Items(items(await read(request)), config.limits.seconds)

    async def generate(request: Request) -> Response:
        async def last() -> dict[str, Any]:
            async with asyncio.timeout(config.limits.seconds):
                return [item async for item in items(params)][-1]

        params = await read(request)
        try:
            return answer_json(await while_connected(request.receive, last()))
        except TimeoutError:
            return answer_json(failure(RuntimeError("the answer took too long")))
        except Gone:
            return Response(status_code=HUNG_UP)

    async def get_status(request: Request) -> Response:
        return answer_json(status(models))

    async def count_token(request: Request) -> Response:
        prompt = str((await read(request)).get("prompt", ""))
        ids = await asyncio.to_thread(models.encode_text, prompt, False)
        return answer_json({"count": len(ids), "error_code": 0})

    async def conversation(request: Request) -> Response:
        found = dataclasses.asdict(prompts.conversation_template(config.template))
        return answer_json({"conv": found | {"sep_style": int(found["sep_style"])}})

    async def details(request: Request) -> Response:
        return answer_json({"context_length": models.max_length})

    async def embeddings(request: Request) -> Response:
        return answer_json(failure(ValueError("this worker has no embeddings")))

    endpoints = {
        "worker_generate_stream": generate_stream,
        "worker_generate": generate,
        "worker_get_status": get_status,
        "worker_get_conv_template": conversation,
        "worker_get_embeddings": embeddings,
        "count_token": count_token,
        "model_details": details,
    }

    async def refused(request: Request, error: ApiError) -> Response:
        return answer_json(error.body(), error.status)

    routes = [Route(f"/{name}", handler, methods=["POST"]) for name, handler in endpoints.items()]
    open_to_all = dataclasses.replace(models.settings, key=None, admin_key=None)
    app = Starlette(routes=routes, exception_handlers={ApiError: refused})
    return Guard(app, open_to_all, Metrics())


async def read(request: Request) -> dict[str, Any]:
    try:
        found = from_json(await request.body(), allow_inf_nan=False)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, "expected a JSON object", "invalid_body")
    return found


# ---- FastChat's own servers --------------------------------------------------------------------------------


def run_fastchat(arguments: Sequence[str]) -> None:
    """Runs one of FastChat's servers in this process, with the arguments that it takes."""
    if not arguments or arguments[0] not in SERVERS:
        wanted = nearest(arguments[0] if arguments else "", SERVERS)
        raise UserError(f"fastchat {' '.join(arguments[:1])}: expected one of its servers. {wanted}")
    repair()
    name = f"fastchat.serve.{arguments[0]}"
    sys.argv = [name, *arguments[1:]]
    runpy.run_module(name, run_name="__main__")


def repair() -> None:
    """Gives FastChat's answers pydantic 1's `json`, which its server writes its streams with: with pydantic 2
    every stream is empty.
    """
    import fastchat.protocol.openai_api_protocol as answers
    import pydantic

    def as_json(self, ensure_ascii: bool = True, **chosen: Any) -> str:
        return json.dumps(self.model_dump(**chosen), ensure_ascii=ensure_ascii)

    for kind in vars(answers).values():
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            kind.json = as_json
