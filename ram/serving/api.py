"""The server's endpoints: OpenAI's protocol, aligners, health, metrics and the page."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import fastapi
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ram.answers import influence
from ram.data.text import text_of
from ram.decoding.requests import EngineError, ScoringFailed, TokenLogprobs, TooLong, UnknownAligner
from ram.errors import UserError
from ram.serving import bounds, protocol
from ram.serving.guard import HUNG_UP, Guard
from ram.serving.loop import Busy, Closed, EngineThread
from ram.serving.metrics import CONTENT_TYPE, Metrics, TimedEngine
from ram.serving.protocol import (
    AlignerRequest,
    ApiError,
    ChatRequest,
    Common,
    CompletionRequest,
)
from ram.serving.registry import Models, Served
from ram.serving.responses import (
    Answer,
    Echo,
    EventStream,
    Gone,
    Running,
    answer_json,
    too_slow,
    while_connected,
)
from ram.serving.tokens import add_tokens
from ram.settings.serving import Settings

PAGE = Path(__file__).resolve().parent / "page"
PAGE_FILES = {"/": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
RETRY_AFTER = 1  # seconds


def json_route(models: Models) -> type[APIRoute]:
    """Make a kind of route whose requests are parsed by pydantic's JSON parser, and whose lists are bounded.

    That parser bounds nesting and rejects NaN and unpaired surrogates.
    """

    class JsonRequest(Request):
        refused: EngineError | None = None

        async def json(self) -> Any:
            try:
                body = from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                reason = f"the body is not valid JSON: {str(error)[:200]}"
                raise fastapi.HTTPException(400, reason) from None
            try:
                bounds.check_lists(body, models.settings.config.limits, models.max_length)
            except EngineError as error:
                self.refused = error
                raise fastapi.HTTPException(400, str(error)) from None  # no other passes through FastAPI
            return body

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                parsed = JsonRequest(request.scope, request.receive)
                try:
                    return await handle(parsed)
                except fastapi.HTTPException:
                    if parsed.refused is not None:
                        raise parsed.refused from None
                    raise

            return handle_json

    return JsonRoute


def create_app(models: Models) -> Guard:
    """Make the whole ASGI application around a proposal and its aligners."""
    settings, metrics = models.settings, Metrics()
    metrics.watch(models.engine)
    app = FastAPI(
        title="Residual alignment: one proposal, many aligners",
        version="1",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.router.route_class = json_route(models)
    _handle_failures(app)
    _add_reading(app, models, metrics)
    _add_answering(app, models, metrics)
    add_tokens(app, models)
    if settings.admin_key is not None:
        _add_admin(app, models)
    _describe_keys(app, settings)
    app.state.models, app.state.metrics = models, metrics
    return Guard(app, settings, metrics)


# ---- failures ----------------------------------------------------------------------------------------------


def engine_failure(error: EngineError, param: str) -> ApiError:
    """Turn the engine's refusal of a request into an HTTP error; `param` is the key that holds the prompt."""
    text = str(error)
    if isinstance(error, Busy):
        return ApiError(429, text, "busy", retry_after=RETRY_AFTER)
    if isinstance(error, Closed):
        return ApiError(503, text, "shutting_down", retry_after=RETRY_AFTER)
    if isinstance(error, UnknownAligner):
        return ApiError(404, text, "model_not_found", "model")
    if isinstance(error, ScoringFailed):
        return ApiError(500, text, "engine_error")
    if isinstance(error, TooLong):
        return ApiError(400, text, "context_length_exceeded", param)
    key = text.partition("=")[0]  # PARParams' messages begin with the key: top_p=2: expected ...
    return ApiError(400, text, "invalid_value", key if key.isidentifier() else param)


def _handle_failures(app: FastAPI) -> None:
    """Answer every failure in OpenAI's shape."""

    def respond(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        return answer_json(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(EngineError)
    async def refused_by_engine(request: Request, error: EngineError) -> Response:
        return respond(engine_failure(error, "messages" if "chat" in request.url.path else "prompt"))

    @app.exception_handler(HTTPException)
    async def refused_by_framework(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_body"}
        failure = ApiError(error.status_code, str(error.detail), codes.get(error.status_code, "refused"))
        return respond(failure, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        body = request.scope["route"].body_field
        known = body.field_info.annotation.model_fields if body is not None else ()
        return respond(protocol.explain(error.errors(), list(known)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return respond(ApiError(500, "the server failed; its log says why", "internal"))


def _describe_keys(app: FastAPI, settings: Settings) -> None:
    """State in the OpenAPI document which requests need which key."""
    make_document = app.openapi

    def document_with_keys() -> dict[str, Any]:
        document = make_document()
        document.setdefault("components", {})["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "adminKey": {"type": "http", "scheme": "bearer"},
        }
        for path, methods in document["paths"].items():
            scheme = "adminKey" if path.startswith("/admin/") else "key" if settings.key else None
            if scheme and path != "/health":
                for operation in methods.values():
                    operation["security"] = [{scheme: []}]
        return document

    app.openapi = document_with_keys


# ---- reading -----------------------------------------------------------------------------------------------


def _add_reading(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.get("/health", responses={200: {"model": protocol.Health}, "5XX": {"model": protocol.Health}})
    async def health() -> Response:
        """Whether the engine's thread is alive."""
        alive = models.engine.alive
        return answer_json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """The server's metrics in Prometheus' text format."""
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models", responses={200: {"model": protocol.ModelList}, **protocol.FAILURES})
    async def list_models() -> Response:
        """The proposal alone, and each pair of it with an aligner, by the aligner's name."""
        data = [description(served, models) for served in models.served.values()]
        return answer_json({"object": "list", "data": data})

    @app.get("/v1/models/{name}", responses={200: {"model": protocol.Model}, **protocol.FAILURES})
    async def one_model(name: str) -> Response:
        return answer_json(description(models.find(name), models))

    def page_file(name: str) -> Callable[[], Awaitable[Response]]:
        path = PAGE / name
        kind = MEDIA_TYPES[path.suffix]
        shared = {".css": influence.STYLE, ".js": influence.SCRIPT}.get(path.suffix, "")
        text = shared + path.read_text(encoding="utf-8")

        async def page() -> Response:
            return Response(text, headers=PAGE_HEADERS, media_type=kind)

        return page

    for path, name in PAGE_FILES.items():
        app.add_api_route(path, page_file(name), methods=["GET", "HEAD"], include_in_schema=False)


def description(served: Served, models: Models) -> dict[str, Any]:
    """A model as the protocol lists it, with the settings of a request that gives none."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "ram",
        "pair": served.aligner is not None,
        "defaults": models.defaults(),
    }


# ---- answering ---------------------------------------------------------------------------------------------


def prompts_of(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a completion request, as texts or as token ids."""
    prompt = request.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    return cast(list[str] | list[list[int]], [prompt] if single else prompt)


class Plan(NamedTuple):
    """What a request asks for, once its prompts are token ids.

    Args:
        continued: whether the answers continue a text: a prompt, or a begun message.
        prompts: the texts to repeat before the answers; empty if they are not repeated.
        new_tokens: None gives the default.
        logprobs: most likely tokens to report with each token, or None.
    """

    ids: Sequence[Sequence[int]]
    new_tokens: int | None
    stop: Sequence[str]
    logprobs: int | None
    continued: bool
    prompts: Sequence[str] = ()


def _add_answering(app: FastAPI, models: Models, metrics: Metrics) -> None:
    limits, streamed = models.settings.config.limits, {"text/event-stream": {}}
    # `Running` uses nothing of the engine but the two methods that `TimedEngine` has.
    engine = cast(EngineThread, TimedEngine(models.engine, metrics))

    async def answer(request: Request, body: Common, served: Served, plan: Plan) -> Response:
        """Decode `body.n` answers to each prompt, and send them whole or as a stream."""
        n, seed, chat = body.n or 1, body.seed, isinstance(body, ChatRequest)
        if seed is None:
            seed = models.settings.config.seed
        if seed is None:
            seed = secrets.randbits(32)
        keys = body.law(alone=served.aligner is None)
        stop_ids = [*served.stop_ids, *(body.stop_token_ids or [])]
        requests = models.requests(
            served,
            plan.ids,
            models.law(keys),
            plan.new_tokens,
            seed,
            plan.stop,
            n,
            plan.logprobs,
            stop_ids if chat or body.stop_token_ids is None else body.stop_token_ids,
            continued=plan.continued,
            client=request.scope.get("ram.client", ""),
        )

        async def echoes() -> list[Echo]:
            if plan.logprobs is None:
                return [Echo(text, ids, None) for text, ids in zip(plan.prompts, plan.ids, strict=True)]
            law = models.scoring_law(keys)
            waiting: list[Future[list[TokenLogprobs]]] = []
            try:
                for first in requests[::n]:
                    scored = models.engine.score(replace(first, params=law))
                    waiting.append(scored)
                scores = await asyncio.gather(*map(asyncio.wrap_future, waiting))
            finally:
                for scored in waiting:  # what nobody waits for any more
                    scored.cancel()
            return [Echo(*prompt) for prompt in zip(plan.prompts, plan.ids, scores, strict=True)]

        async def run() -> tuple[Answer, Running]:
            lengths = [len(ids) for ids in plan.ids]
            reports = plan.logprobs is not None
            repeated = await echoes() if plan.prompts else []
            shown_ids = plan.ids[0] if isinstance(body, ChatRequest) and body.return_token_ids else None
            answers = Answer(
                chat, served, seed, n, reports, models.tokenizer, lengths, plan.continued, repeated, shown_ids
            )
            return answers, Running(engine, requests if plan.new_tokens != 0 else [], bool(body.stream))

        async def whole() -> Response:
            answers, running = await run()
            return await answers.whole(running)

        try:
            async with asyncio.timeout(limits.seconds):
                if not body.stream:
                    return await while_connected(request.receive, whole())
                answers, running = await while_connected(request.receive, run())
        except TimeoutError:
            raise too_slow(limits.seconds) from None
        except Gone:
            return Response(status_code=HUNG_UP)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(running, answers.chunks(running, usage), limits.seconds)

    def find_model(body: Common) -> Served:
        """The model that a request names, after a check of the keys that both kinds of request have."""
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: only with stream=true", "invalid_value", "stream_options")
        return models.find(body.model)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": protocol.ChatAnswer, "content": streamed}, **protocol.FAILURES},
    )
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a dialogue, in the template that the models were trained with.

        If it is too long, its oldest turns are dropped. A last message by the assistant is continued.
        """
        served = find_model(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs=true", "invalid_value", "top_logprobs")
        if len({body.max_tokens, body.max_completion_tokens} - {None}) > 1:
            text = "max_tokens and max_completion_tokens differ: give one"
            raise ApiError(400, text, "invalid_value", "max_completion_tokens")
        turns, system = protocol.dialogue(body.messages)
        new = models.new_tokens(body.max_completion_tokens or body.max_tokens)
        ids = await asyncio.to_thread(models.encode_dialogue, served, turns, system, new)
        stop = [*served.stops, *body.stops()]
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        begun = bool(turns) and not turns[-1][0]
        return await answer(request, body, served, Plan([ids], new, stop, logprobs, begun))

    @app.post(
        "/v1/completions",
        responses={200: {"model": protocol.CompletionAnswer, "content": streamed}, **protocol.FAILURES},
    )
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue each prompt: a text, or token ids, which are used unchanged.

        `echo` repeats the prompt, with the log-probabilities of its tokens if `logprobs` is set; `max_tokens`
        may then be 0.
        """
        served, prompts = find_model(body), prompts_of(body)
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(
                400, "max_tokens: expected at least 1, or echo=true", "invalid_value", "max_tokens"
            )
        ids = [
            await asyncio.to_thread(models.encode_text, prompt, served.add_bos)
            if isinstance(prompt, str)
            else prompt
            for prompt in prompts
        ]
        stop = served.stops if body.stop is None else body.stops()
        texts = [
            prompt if isinstance(prompt, str) else text_of(models.tokenizer, prompt)
            for prompt in (prompts if body.echo else ())
        ]
        plan = Plan(ids, body.max_tokens, stop, body.logprobs, True, texts)
        return await answer(request, body, served, plan)


# ---- adding and removing aligners --------------------------------------------------------------------------


def _add_admin(app: FastAPI, models: Models) -> None:
    changing = asyncio.Lock()

    @app.post("/admin/aligners", responses={200: {"model": protocol.Model}, **protocol.FAILURES})
    async def add_aligner(body: AlignerRequest) -> Response:
        """Load an aligner while requests continue; one with the same name is replaced."""
        if changing.locked():
            raise ApiError(409, "another aligner is being loaded", "busy", retry_after=RETRY_AFTER)
        async with changing:
            try:
                served = await asyncio.to_thread(models.add_aligner, body.name, body.path)
                return answer_json(description(served, models))
            except (UserError, OSError, MemoryError) as error:
                text = f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
                raise ApiError(400, text, "not_loaded", "path") from None

    @app.delete("/admin/aligners/{name}", responses={200: {"model": protocol.Deleted}, **protocol.FAILURES})
    async def remove_aligner(name: str) -> Response:
        """Remove an aligner; its running answers are finished."""
        async with changing:
            models.remove_aligner(name)
        return answer_json({"id": name, "object": "model", "deleted": True})
