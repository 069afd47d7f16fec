"""A worker for FastChat's controller, so that FastChat's web page and OpenAI server work with pairs.

Each aligner is a model there, and so is the proposal alone.

    python -m fastchat.serve.controller
    python serve.py worker proposal=FOLDER aligner=FOLDER
    python serve.py fastchat openai_api_server         FastChat's servers, patched for current packages

Protocol: FastChat 0.2.36, serve/base_model_worker.py. It has no keys, so a worker listens only on loopback
unless `worker.exposed` is set.
"""

import asyncio
import contextlib
import dataclasses
import json
import runpy
import secrets
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

import httpx
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ram.data import prompts
from ram.decoding import requests as decoding
from ram.decoding.par import PARParams
from ram.decoding.requests import EngineError, TooLong, UnknownAligner, of_proposal
from ram.errors import UserError, nearest
from ram.log import log
from ram.serving import bounds
from ram.serving.guard import HUNG_UP, Guard
from ram.serving.loop import Busy, Done
from ram.serving.metrics import Metrics
from ram.serving.protocol import ApiError
from ram.serving.registry import Models, Served
from ram.serving.responses import (
    CLOSE_SECONDS,
    Gone,
    Running,
    answer_json,
    to_json,
    too_slow,
    while_connected,
)
from ram.settings.serving import PROPOSAL, Settings, is_loopback

HEART_BEAT = 45  # seconds; the controller forgets a worker after 90
RETRY = 2  # seconds between attempts to reach a controller
SERVERS = ("controller", "openai_api_server", "gradio_web_server", "gradio_web_server_multi")


# ---- registering -------------------------------------------------------------------------------------------


def check_exposure(settings: Settings) -> None:
    """Raise UserError if other machines could reach the worker and the settings do not allow it."""
    if not is_loopback(settings.config.host) and not settings.config.worker.exposed:
        raise UserError(
            f"host={settings.config.host} can be reached by other machines, and FastChat's protocol has no "
            "keys; set worker.exposed=true if every machine that can reach it may use it"
        )


@contextlib.contextmanager
def registered(models: Models, url: str) -> Iterator[Guard]:
    """Make the worker's application, and keep it registered at the controller until the context is left."""
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
    known = reported = False
    wait = 0.2  # seconds; the worker itself is not listening yet
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
                known, reported, wait = True, False, HEART_BEAT
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                if not reported:
                    log.warning(f"no controller at {controller} ({type(error).__name__}); retrying")
                reported, wait = True, RETRY


def status(models: Models) -> dict[str, Any]:
    """The worker's status, as the controller asks for it."""
    return {"model_names": list(models.served), "speed": 1, "queue_length": queue_length(models)}


def queue_length(models: Models) -> int:
    """Answers that are being decoded or wait."""
    figures = models.engine.figures()
    return figures["waiting"] + figures["rows"]


# ---- the worker's endpoints --------------------------------------------------------------------------------


def failure(error: Exception) -> dict[str, Any]:
    """FastChat's form of an error."""
    from fastchat.constants import ErrorCode

    code = ErrorCode.INTERNAL_ERROR
    for kind, kind_code in (
        (Busy, ErrorCode.ENGINE_OVERLOADED),
        (UnknownAligner, ErrorCode.INVALID_MODEL),
        (TooLong, ErrorCode.CONTEXT_OVERFLOW),
        ((EngineError, ValueError, OverflowError), ErrorCode.PARAM_OUT_OF_RANGE),
    ):
        if isinstance(error, kind):
            code = kind_code
            break
    return {"text": str(error), "error_code": int(code)}


def to_request(
    models: Models, params: dict[str, Any], served: Served, client: str
) -> tuple[list[decoding.Request], str]:
    """Turn a request of FastChat's protocol into requests for the engine.

    Returns:
        The requests, and the text that precedes the answer: the prompt if `echo` is set.

    Raises:
        EngineError, ValueError, TypeError, OverflowError: If the request cannot be answered.
    """
    prompt = params.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("prompt: expected a text")
    law = {key: params[key] for key in PARParams.field_names() if params.get(key) is not None}
    if served.aligner is None:
        law = of_proposal(law)
    stop = params.get("stop") or []
    stop = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
    if not all(isinstance(text, str) for text in stop):
        raise ValueError("stop: expected texts")
    stop_ids = params.get("stop_token_ids") or []
    if not (isinstance(stop_ids, list) and all(type(token) is int for token in stop_ids)):
        raise ValueError("stop_token_ids: expected a list of token ids")
    limit = params.get("max_new_tokens")
    limit = models.usual if limit is None else int(limit)
    ids = models.encode_rendered(prompt, min(limit, models.usual), served.add_bos)
    new = min(limit, models.max_length - len(ids))  # FastChat asks for more tokens than fit
    seed = params.get("seed", models.settings.config.seed)
    seed = secrets.randbits(32) if seed is None else int(seed)
    echo = bool(params.get("echo", True))
    requests = models.requests(
        served,
        [ids],
        models.law(law),
        new,
        seed,
        stop,
        stop_token_ids=stop_ids,
        continued=echo,
        client=client,
    )
    return requests, prompt if echo else ""


async def growing(running: Running, shown: str) -> AsyncIterator[dict[str, Any]]:
    """FastChat's items: each has the whole text so far; the last has the counts and the finish reason."""
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
    """A stream of JSON items, each followed by a zero byte, until the client disconnects.

    If it takes longer than `seconds`, the last item is an error.
    """

    def __init__(self, items: AsyncGenerator[dict[str, Any]], seconds: float) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.items, self.seconds = items, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_item(item: dict[str, Any]) -> None:
            body = to_json(item).encode() + b"\0"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def send_items() -> None:
            failed = None
            try:
                async with asyncio.timeout(self.seconds):
                    async for item in self.items:
                        await send_item(item)
            except TimeoutError:
                failed = failure(too_slow(self.seconds))
            async with asyncio.timeout(CLOSE_SECONDS):  # the client may have stopped reading
                if failed is not None:
                    await send_item(failed)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with contextlib.suppress(Gone, OSError, TimeoutError):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await while_connected(receive, send_items())
        finally:
            await self.items.aclose()  # ends its requests


def create_worker(models: Models) -> Guard:
    """Make the worker's ASGI application.

    Raises:
        UserError: The models have a template of their own; FastChat's controller renders by its own ones.
    """
    config = models.settings.config
    own = [name for name, served in models.served.items() if served.chat]
    if own:
        raise UserError(
            f"{own[0]} was trained with template=chat, which FastChat's protocol cannot render: serve it "
            "over HTTP (`serve.py` without `worker`), or give template=ram"
        )

    async def items(params: dict[str, Any], client: str) -> AsyncGenerator[dict[str, Any]]:
        try:
            served = models.find(str(params.get("model")))
            requests, shown = await asyncio.to_thread(to_request, models, params, served, client)
            async for item in growing(Running(models.engine, requests, streamed=True), shown):
                yield item
        except (EngineError, ApiError, ValueError, TypeError, OverflowError) as error:
            yield failure(error)

    async def generate_stream(request: Request) -> Response:
        return Items(items(await read(request, models), request.scope["ram.client"]), config.limits.seconds)

    async def generate(request: Request) -> Response:
        async def last() -> dict[str, Any]:
            async with asyncio.timeout(config.limits.seconds):
                return [item async for item in items(params, request.scope["ram.client"])][-1]

        params = await read(request, models)
        try:
            return answer_json(await while_connected(request.receive, last()))
        except TimeoutError:
            return answer_json(failure(RuntimeError("the answer took too long")))
        except Gone:
            return Response(status_code=HUNG_UP)

    async def get_status(request: Request) -> Response:
        return answer_json(status(models))

    async def count_token(request: Request) -> Response:
        prompt = str((await read(request, models)).get("prompt", ""))
        try:
            ids = await asyncio.to_thread(models.encode_text, prompt, False)
        except TooLong:  # FastChat only asks whether it fits
            return answer_json({"count": len(prompt) // bounds.TOKEN_CHARACTERS + 1, "error_code": 0})
        return answer_json({"count": len(ids), "error_code": 0})

    async def conversation(request: Request) -> Response:
        template = dataclasses.asdict(prompts.conversation_template(models.template))
        stop_ids = models.served[PROPOSAL].stop_ids
        changed = {"sep_style": int(template["sep_style"]), "stop_token_ids": stop_ids}
        return answer_json({"conv": template | changed})

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

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return answer_json(error.body(), error.status)

    routes = [Route(f"/{name}", handler, methods=["POST"]) for name, handler in endpoints.items()]
    open_to_all = dataclasses.replace(models.settings, key=None, admin_key=None)
    app = Starlette(routes=routes, exception_handlers={ApiError: refused})
    return Guard(app, open_to_all, Metrics())


async def read(request: Request, models: Models) -> dict[str, Any]:
    """Read the JSON object in a request's body; raise ApiError if it is not one."""
    try:
        body = from_json(await request.body(), allow_inf_nan=False)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "expected a JSON object", "invalid_body")
    try:
        bounds.check_lists(body, models.settings.config.limits, models.max_length)
    except EngineError as error:
        raise ApiError(400, str(error), "invalid_value") from None
    return body


# ---- FastChat's own servers --------------------------------------------------------------------------------


def run_fastchat(arguments: Sequence[str]) -> None:
    """Run one of FastChat's servers in this process, with its own arguments."""
    if not arguments or arguments[0] not in SERVERS:
        hint = nearest(arguments[0] if arguments else "", SERVERS)
        raise UserError(f"fastchat {' '.join(arguments[:1])}: expected one of its servers. {hint}")
    arguments = closed(arguments)
    patch_fastchat()
    name = f"fastchat.serve.{arguments[0]}"
    sys.argv = [name, *arguments[1:]]
    runpy.run_module(name, run_name="__main__")


def closed(arguments: Sequence[str]) -> list[str]:
    """Add the arguments that let a server of FastChat listen on loopback, and admit no other page's scripts.

    Arguments that the user gives stay.
    """
    given = {argument.partition("=")[0] for argument in arguments}
    defaults = {"--host": "127.0.0.1"}
    if arguments[0] == "openai_api_server":
        defaults["--allowed-origins"] = "[]"
    return [
        *arguments,
        *(part for key, value in defaults.items() if key not in given for part in (key, value)),
    ]


def patch_fastchat() -> None:
    """Give FastChat's answer classes the `json` method of pydantic 1.

    FastChat's server writes its streams with it; with pydantic 2 every stream is empty.
    """
    import fastchat.protocol.openai_api_protocol as answers
    import pydantic

    def to_json_text(self: pydantic.BaseModel, ensure_ascii: bool = True, **options: Any) -> str:
        return json.dumps(self.model_dump(**options), ensure_ascii=ensure_ascii)

    for kind in vars(answers).values():
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            kind.json = to_json_text  # type: ignore[method-assign]
