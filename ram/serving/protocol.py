"""Requests and errors of OpenAI's protocol as the server takes and gives them.

A request is checked whole before anything else happens. What the protocol has and this server does not is
refused unless it says nothing (presence_penalty 0, an empty list of tools).
"""

from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from ram.decoding.par import KL_FALLBACKS, SAMPLE_MODES, PARParams
from ram.errors import nearest

Count = Annotated[int, Field(ge=1, le=1 << 31)]
Share = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=0.1, le=10)]
Limit = Annotated[int, Field(ge=-1, le=1 << 31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)] | Annotated[dict[str, Any], Field(max_length=0)] | None
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, le=1 << 31)]
LAW_OF_ONE = (
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
)  # of the aligner; base_...: of the proposal


class ApiError(Exception):
    """An answer other than what was asked for."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """JSON as it is: no number for a text, no key that is not known, no NaN, nothing infinite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against eavesdroppers; nothing is padded here


class TextFormat(Strict):
    type: Literal["text"]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """The last block is what clients send back of an answer's message, by their own classes."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # not shown to the models

    refusal: None = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


# Bounds of a request's keys of the next-token distribution, without `base_`. A key that is not listed has the
# type that PARParams declares; PARParams itself checks the range of every key.
BOUNDS: dict[str, Any] = {
    "sample_mode": Literal[tuple(SAMPLE_MODES)],
    "temperature": Temperature,
    "top_p": Share,
    "top_k": Limit,
    "repetition_penalty": Penalty,
    "div_threshold": Annotated[float, Field(ge=0)],
    "kl_fallback": Literal[tuple(KL_FALLBACKS)],
    "expert_temperature": Temperature,
    "n_candidates": Annotated[int, Field(ge=1, le=64)],
}
DECLARED = get_type_hints(PARParams)
LAW_FIELDS: dict[str, Any] = {
    key: (BOUNDS.get(key.removeprefix("base_"), DECLARED[key]) | None, None)
    for key in PARParams.field_names()
}
LawKeys = create_model("LawKeys", __base__=Strict, **LAW_FIELDS)


class Common(LawKeys):
    """What both kinds of request may say, beside the keys of PARParams, which are this server's own."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Count | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def law(self, alone: bool) -> dict[str, Any]:
        """The keys of PARParams that were given. alone: of the proposal, whose law `temperature`, `top_p`,
        `top_k` and `repetition_penalty` then mean, unless their `base_` forms are given too.
        """
        given = {key: getattr(self, key) for key in PARParams.field_names()}
        given = {key: value for key, value in given.items() if value is not None}
        if alone:
            for key in LAW_OF_ONE:
                if key in given:
                    given.setdefault(f"base_{key}", given.pop(key))
        return given


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(Common):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class AlignerRequest(Strict):
    name: str
    path: Annotated[str, Field(min_length=1, max_length=4096)]


# What is said of keys that the protocol has and this server knows only in the form that says nothing.
UNSUPPORTED = {
    "presence_penalty": "expected 0 (repetition_penalty is this server's)",
    "frequency_penalty": "expected 0 (repetition_penalty is this server's)",
    "logit_bias": "expected nothing in it",
    "response_format": 'expected {"type": "text"}',
    "tools": "no tools here: leave it out",
    "tool_choice": "no tools here: leave it out",
    "store": "nothing is stored here: leave it out",
    "best_of": "expected 1",
    "echo": "expected false: prompts are not repeated",
    "suffix": "no text after the answer here: leave it out",
}


def explain(errors: list[dict[str, Any]], known: list[str]) -> ApiError:
    """The first thing that is wrong with a request's body, by pydantic's list of errors; its keys by name."""
    error = errors[0]
    place = [part for part in error["loc"] if part != "body"]
    key = str(place[0]) if place and isinstance(place[0], str) else None
    if error["type"] == "json_invalid" or key is None:
        return ApiError(400, _without_key(error), "invalid_body")
    if error["type"] == "extra_forbidden" and len(place) == 1:
        return ApiError(400, f"unknown key {key[:64]!r}: {nearest(key[:64], known)}", "unknown_key", key[:64])
    if error["type"] == "missing" and len(place) == 1:
        return ApiError(400, f"{key} is missing", "missing_key", key)
    if key in UNSUPPORTED:
        return ApiError(400, f"{key}: {UNSUPPORTED[key]}", "unsupported", key)
    # Of alternatives (a text or a list of texts ...) pydantic names every one: their texts, each once.
    texts = dict.fromkeys(_said(each) for each in errors if key in each["loc"])
    inner = {name for kind in (Message, TextPart, StreamOptions, TextFormat) for name in kind.model_fields}
    where = ".".join(str(part) for part in place if isinstance(part, int) or part in inner or part == key)
    return ApiError(400, f"{where[:128]}: {'; or '.join(texts)[:500]}", "invalid_value", key)


def _said(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {str(error['loc'][-1])[:64]!r}"
    return error["msg"]


def _without_key(error: dict[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return (
            f"the body is no valid JSON: {str(error.get('ctx', {}).get('error', 'it cannot be read'))[:200]}"
        )
    return "expected a JSON object in the body, with Content-Type: application/json"


# ---- answers, as the OpenAPI document describes them -------------------------------------------------------


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(Said):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Said):
    error: Problem


class Model(Said):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    pair: bool


class ModelList(Said):
    object: Literal["list"]
    data: list[Model]


class Usage(Said):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ShownToken(Said):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ShownToken):
    top_logprobs: list[ShownToken]
    text_offset: int  # ours: how many characters of the text come before the token's own


class ChatLogprobs(Said):
    content: list[ChatToken]
    refusal: None


class CompletionLogprobs(Said):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class OfChoice(Said):
    index: int
    finish_reason: Literal["stop", "length"]
    stats: dict[str, float]


class AnswerMessage(Said):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(OfChoice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(OfChoice):
    text: str
    logprobs: CompletionLogprobs | None


class OfAnswer(Said):
    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int
    usage: Usage


class ChatAnswer(OfAnswer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionAnswer(OfAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Health(Said):
    status: Literal["ok", "failed"]


class Deleted(Said):
    id: str
    object: Literal["model"]
    deleted: bool
