"""The server's endpoints: OpenAI's models, chat completions and completions, aligners that come and go,
health, metrics and the page.
"""

import asyncio
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastapi
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ram.decoding.requests import EngineError, TooLong, UnknownAligner
from ram.errors import UserError
from ram.serving import protocol
from ram.serving.guard import HUNG_UP, Guard
from ram.serving.loop import Busy, Closed
from ram.serving.metrics import CONTENT_TYPE, Metrics
from ram.serving.protocol import AlignerRequest, ApiError, ChatRequest, Common, CompletionRequest
from ram.serving.registry import Models, Served
from ram.serving.responses import Answer, EventStream, Gone, Running, answer_json, too_slow, while_connected

PAGE = Path(__file__).resolve().parent / "page"
PAGE_FILES = {"/": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
FAILURES = {"4XX": {"model": protocol.ErrorBody}, "5XX": {"model": protocol.ErrorBody}}
RETRY_AFTER = 1  # seconds


class JsonRequest(Request):
    async def json(self) -> Any:
        """The body, by a parser that bounds nesting and takes neither NaN nor halves of characters."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            reason = f"the body is no valid JSON: {str(error)[:200]}"
            raise fastapi.HTTPException(400, reason) from None


class JsonRoute(APIRoute):
    def get_route_handler(self):
        handle = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return parsed


def create_app(models: Models):
    """The whole ASGI application around some models."""
    settings, metrics = models.settings, Metrics()
    app = FastAPI(
        title="Residual alignment: one proposal, many aligners",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    _handle_failures(app)
    _add_reading(app, models, metrics)
    _add_answering(app, models)
    if settings.admin_key is not None:
        _add_admin(app, models)
    _describe_keys(app, settings)
    app.state.models, app.state.metrics = models, metrics
    return Guard(app, settings, metrics)


# ---- failures ----------------------------------------------------------------------------------------------


def of_engine(error: EngineError, param: str) -> ApiError:
    """The answer to what the engine did not take."""
    text = str(error)
    if isinstance(error, Busy):
        return ApiError(429, text, "busy", retry_after=RETRY_AFTER)
    if isinstance(error, Closed):
        return ApiError(503, text, "shutting_down", retry_after=RETRY_AFTER)
    if isinstance(error, UnknownAligner):
        return ApiError(404, text, "model_not_found", "model")
    if isinstance(error, TooLong):
        return ApiError(400, text, "context_length_exceeded", param)
    key = text.partition("=")[0]  # as PARParams begins: top_p=2: expected ...
    return ApiError(400, text, "invalid_value", key if key.isidentifier() else param)


def _handle_failures(app: FastAPI) -> None:
    def told(error: ApiError, headers: dict[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        return answer_json(error.body(), error.status, headers)

    async def refused(request: Request, error: ApiError) -> Response:
        return told(error)

    async def by_engine(request: Request, error: EngineError) -> Response:
        return told(of_engine(error, "messages" if "chat" in request.url.path else "prompt"))

    async def by_http(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_body"}
        failure = ApiError(error.status_code, str(error.detail), codes.get(error.status_code, "refused"))
        return told(failure, error.headers)

    async def by_shape(request: Request, error: RequestValidationError) -> Response:
        kind = request.scope["route"].body_field
        known = kind.field_info.annotation.model_fields if kind is not None else ()
        return told(protocol.explain(error.errors(), list(known)))

    async def unforeseen(request: Request, error: Exception) -> Response:
        return told(ApiError(500, "the server failed; its log says why", "internal"))

    for kind, handler in (
        (ApiError, refused),
        (EngineError, by_engine),
        (HTTPException, by_http),
        (RequestValidationError, by_shape),
        (Exception, unforeseen),
    ):
        app.add_exception_handler(kind, handler)


def _describe_keys(app: FastAPI, settings) -> None:
    """Puts into the OpenAPI document which requests need which key."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "adminKey": {"type": "http", "scheme": "bearer"},
        }
        for path, methods in document["paths"].items():
            wanted = "adminKey" if path.startswith("/admin/") else "key" if settings.key else None
            if wanted and path != "/health":
                for operation in methods.values():
                    operation["security"] = [{wanted: []}]
        return document

    app.openapi = described


# ---- reading -----------------------------------------------------------------------------------------------


def _add_reading(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.get("/health", responses={200: {"model": protocol.Health}, "5XX": {"model": protocol.Health}})
    async def health() -> Response:
        """Whether the engine's thread lives."""
        alive = models.engine.alive
        return answer_json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """The server's figures in Prometheus' text format."""
        text = metrics.text(models.engine.figures())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models", responses={200: {"model": protocol.ModelList}, **FAILURES})
    async def list_models() -> Response:
        """The proposal alone, and each pair of it and an aligner by the aligner's name."""
        return answer_json({"object": "list", "data": [described(each) for each in models.served.values()]})

    @app.get("/v1/models/{name}", responses={200: {"model": protocol.Model}, **FAILURES})
    async def one_model(name: str) -> Response:
        return answer_json(described(models.find(name)))

    def page_file(name: str):
        path = PAGE / name
        text, kind = path.read_text(encoding="utf-8"), KINDS[path.suffix]

        async def page() -> Response:
            return Response(text, headers=PAGE_HEADERS, media_type=kind)

        return page

    for path, name in PAGE_FILES.items():
        app.add_api_route(path, page_file(name), methods=["GET", "HEAD"], include_in_schema=False)


def described(served: Served) -> dict[str, Any]:
    made = {"id": served.name, "object": "model", "created": served.created, "owned_by": "ram"}
    return made | {"pair": served.aligner is not None}


# ---- answering ---------------------------------------------------------------------------------------------


def dialogue(request: ChatRequest) -> tuple[list[tuple[bool, str]], str | None]:
    """The turns (whether the user speaks, text) and the system message; raises ApiError for messages that
    ask for nothing.
    """
    turns = list(request.messages)
    first = next((i for i, each in enumerate(turns) if each.role in ("user", "assistant")), len(turns))
    system = "\n\n".join(each.text() for each in turns[:first]) if first else None
    if any(each.role in ("system", "developer") for each in turns[first:]):
        raise ApiError(
            400, "messages: a system message stands before all others", "invalid_value", "messages"
        )
    if first == len(turns) or turns[-1].role != "user":
        raise ApiError(400, "messages: the last one must be the user's", "invalid_value", "messages")
    return [(each.role == "user", each.text()) for each in turns[first:]], system


def prompts_of(request: CompletionRequest) -> list[str] | list[list[int]]:
    prompt = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _add_answering(app: FastAPI, models: Models) -> None:
    limits, streamed = models.settings.config.limits, {"text/event-stream": {}}

    async def answer(
        request: Request,
        body: Common,
        served: Served,
        ids: Sequence[Sequence[int]],
        new_tokens: int | None,
        stop: Sequence[str],
        logprobs: int | None,
    ) -> Response:
        n, seed = body.n or 1, body.seed
        if len(ids) * n > limits.choices:
            text = f"{len(ids) * n} answers in one request: expected at most {limits.choices}"
            raise ApiError(400, text, "too_many_choices", "n")
        if seed is None:
            seed = models.settings.config.seed
        if seed is None:
            seed = secrets.randbits(32)
        law = models.law(body.law(alone=served.aligner is None))
        requests = models.requests(served, ids, law, new_tokens, seed, stop, n, logprobs)
        chat = isinstance(body, ChatRequest)
        told = Answer(chat, served, seed, n, logprobs is not None, models.tokenizer)
        running = Running(models.engine, requests, bool(body.stream))
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(running, told.chunks(running, usage), limits.seconds)
        with running:
            try:
                async with asyncio.timeout(limits.seconds):
                    return answer_json(await while_connected(request.receive, told.whole(running)))
            except TimeoutError:
                raise too_slow(limits.seconds) from None
            except Gone:
                return Response(status_code=HUNG_UP)

    def check_common(body: Common) -> Served:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: only with stream=true", "invalid_value", "stream_options")
        return models.find(body.model)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": protocol.ChatAnswer, "content": streamed}, **FAILURES},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answers to a dialogue, in the template that the models were trained with; its oldest turns are
        left out where it is too long.
        """
        served = check_common(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs=true", "invalid_value", "top_logprobs")
        wanted = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(wanted) > 1:
            text = "max_tokens and max_completion_tokens say different things: give one"
            raise ApiError(400, text, "invalid_value", "max_completion_tokens")
        (turns, system), new = dialogue(body), models.new_tokens(max(wanted, default=None))
        ids = await asyncio.to_thread(models.encode_dialogue, turns, system, new, served.add_bos)
        stop = [*models.template_stops, *body.stops()]
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return await answer(request, body, served, [ids], new, stop, logprobs)

    @app.post(
        "/v1/completions",
        responses={200: {"model": protocol.CompletionAnswer, "content": streamed}, **FAILURES},
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """What comes after each prompt: texts, or token ids, which are taken as they are."""
        served, prompts = check_common(body), prompts_of(body)
        if len(prompts) > limits.choices:
            text = f"{len(prompts)} prompts in one request: expected at most {limits.choices}"
            raise ApiError(400, text, "too_many_choices", "prompt")
        if isinstance(prompts[0], str):
            encode = [asyncio.to_thread(models.encode_text, each, served.add_bos) for each in prompts]
            prompts = await asyncio.gather(*encode)
        stop = models.template_stops if body.stop is None else body.stops()
        return await answer(request, body, served, prompts, body.max_tokens, stop, body.logprobs)


# ---- aligners that come and go -----------------------------------------------------------------------------


def _add_admin(app: FastAPI, models: Models) -> None:
    changing = asyncio.Lock()

    @app.post("/admin/aligners", responses={200: {"model": protocol.Model}, **FAILURES})
    async def add_aligner(body: AlignerRequest) -> Response:
        """Loads an aligner, or another one under a name that is taken; requests go on meanwhile."""
        if changing.locked():
            raise ApiError(409, "another aligner is being loaded", "busy", retry_after=RETRY_AFTER)
        async with changing:
            try:
                return answer_json(
                    described(await asyncio.to_thread(models.add_aligner, body.name, body.path))
                )
            except (UserError, OSError, MemoryError) as error:
                text = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
                raise ApiError(400, text, "not_loaded", "path") from None

    @app.delete("/admin/aligners/{name}", responses={200: {"model": protocol.Deleted}, **FAILURES})
    async def remove_aligner(name: str) -> Response:
        """Serves an aligner no longer; what it is answering it finishes."""
        async with changing:
            models.remove_aligner(name)
        return answer_json({"id": name, "object": "model", "deleted": True})
