"""Requests, answers and errors of OpenAI's protocol, as this server accepts and sends them.

A request is checked completely before anything else happens. A key of the protocol that this server does not
support is accepted only with a value that has no effect (presence_penalty 0, an empty list of tools).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ram.decoding.par import PARParams
from ram.decoding.requests import of_proposal
from ram.errors import nearest
from ram.serving.bounds import STOP_CHARACTERS, STOPS, STRICT, TOP_LOGPROBS, LawKeys

Count = Annotated[int, Field(ge=1, le=1 << 31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)] | Annotated[dict[str, Any], Field(max_length=0)] | None
Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
TopLogprobs = Annotated[int, Field(ge=0, le=TOP_LOGPROBS)]
Token = Annotated[int, Field(ge=0, le=1 << 31)]


class ApiError(Exception):
    """An HTTP error in OpenAI's shape.

    Args:
        status: HTTP status code.
        message: One line for the user.
        code: Short name of the error, for programs.
        param: Key of the request at fault.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """A part of a request: types are not converted; unknown keys, NaN and infinite numbers are refused."""

    model_config = STRICT


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # OpenAI's padding against eavesdroppers; nothing is padded here


class TextFormat(Strict):
    type: Literal["text"]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a dialogue. The last block holds keys that clients copy from the server's own answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # ignored

    refusal: None = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None

    def text(self) -> str:
        """The content, its parts joined."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Common(LawKeys):
    """The keys of both kinds of request, beside those of PARParams, which are this server's own."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=STOPS)] | None = None

    # These keys of the protocol change nothing here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing = None

    def stops(self) -> list[str]:
        """The stop strings, as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def law(self, alone: bool) -> dict[str, Any]:
        """The keys of PARParams that the request sets.

        Args:
            alone: The proposal answers alone. `temperature`, `top_p`, `top_k` and `repetition_penalty` then
                set the proposal's distribution, unless the request has their `base_` forms too.
        """
        values = {key: getattr(self, key) for key in PARParams.field_names()}
        values = {key: value for key, value in values.items() if value is not None}
        return of_proposal(values) if alone else values


class ChatRequest(Common):
    max_tokens: Count | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: TextFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    web_search_options: Nothing = None
    moderation: Nothing = None
    return_token_ids: bool | None = None  # as vLLM has it
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CompletionRequest(Common):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class TokenizeRequest(Strict):
    """vLLM's request; `add_generation_prompt` and `continue_final_message` follow from the last message."""

    model: Annotated[str, Field(max_length=256)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: Annotated[str, Field(max_length=256)] | None = None
    tokens: list[Token]


class InfluenceRequest(LawKeys):
    """The ids of a prompt and of a pair's answer, as `return_token_ids` of a chat request gives them."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: Annotated[list[Token], Field(min_length=1)]
    tokens: Annotated[list[Token], Field(min_length=1)]


class AlignerRequest(Strict):
    name: str
    path: Annotated[str, Field(min_length=1, max_length=4096)]


def dialogue(messages: Sequence[Message]) -> tuple[list[tuple[bool, str]], str | None]:
    """Split messages into the turns of a dialogue and its system message.

    Returns:
        The turns, each as (whether it is the user's, text), and the system message or None.

    Raises:
        ApiError: If no message is the user's, or a system message follows other messages.
    """
    turns = list(messages)
    first = next((i for i, turn in enumerate(turns) if turn.role in ("user", "assistant")), len(turns))
    system = "\n\n".join(turn.text() for turn in turns[:first]) if first else None
    if any(turn.role in ("system", "developer") for turn in turns[first:]):
        text = "messages: system messages must come before all others"
        raise ApiError(400, text, "invalid_value", "messages")
    if not any(turn.role == "user" for turn in turns):
        raise ApiError(400, "messages: expected at least one of the user", "invalid_value", "messages")
    return [(turn.role == "user", turn.text()) for turn in turns[first:]], system


# Messages for keys of the protocol that are accepted only with a value that has no effect.
UNSUPPORTED = {
    "presence_penalty": "expected 0 (this server has repetition_penalty)",
    "frequency_penalty": "expected 0 (this server has repetition_penalty)",
    "logit_bias": "not supported: expected it empty",
    "response_format": 'expected {"type": "text"}',
    "tools": "no tools are supported: leave it out",
    "functions": "no tools are supported: leave it out",
    "function_call": "no tools are supported: leave it out",
    "modalities": 'expected ["text"]',
    "audio": "not supported: leave it out",
    "prediction": "not supported: leave it out",
    "web_search_options": "not supported: leave it out",
    "tool_choice": "no tools are supported: leave it out",
    "store": "nothing is stored: leave it out",
    "best_of": "expected 1",
    "suffix": "not supported: leave it out",
}


def explain(errors: Sequence[Any], known: list[str]) -> ApiError:
    """Turn pydantic's errors about a request's body into one HTTP error.

    Args:
        errors: Pydantic's list; the first error is reported.
        known: Names of all keys, for a hint about an unknown one.
    """
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
    # For alternatives (a text or a list of texts ...) pydantic reports one error each: name every text once.
    texts = dict.fromkeys(_message(other) for other in errors if key in other["loc"])
    inner = {name for kind in (Message, TextPart, StreamOptions, TextFormat) for name in kind.model_fields}
    path = ".".join(str(part) for part in place if isinstance(part, int) or part in inner or part == key)
    return ApiError(400, f"{path[:128]}: {'; or '.join(texts)[:500]}", "invalid_value", key)


def _message(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {str(error['loc'][-1])[:64]!r}"
    return error["msg"]


def _without_key(error: dict[str, Any]) -> str:
    if error["type"] == "json_invalid":
        reason = str(error.get("ctx", {}).get("error", "it cannot be read"))[:200]
        return f"the body is not valid JSON: {reason}"
    return "expected a JSON object in the body, with Content-Type: application/json"


# ---- answers, as the OpenAPI document describes them -------------------------------------------------------


class Output(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class Problem(Output):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Output):
    error: Problem


class Model(Output):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    pair: bool
    defaults: dict[str, str | float | int | bool | None]


class ModelList(Output):
    object: Literal["list"]
    data: list[Model]


class Usage(Output):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ShownToken(Output):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ShownToken):
    top_logprobs: list[ShownToken]
    text_offset: int  # this server's own key: where the token's text begins, in characters


class ChatLogprobs(Output):
    content: list[ChatToken]
    refusal: None


class CompletionLogprobs(Output):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class BaseChoice(Output):
    index: int
    finish_reason: Literal["stop", "length"]
    stats: dict[str, float]


class AnswerMessage(Output):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseChoice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    token_ids: list[int] = []


class CompletionChoice(BaseChoice):
    text: str
    logprobs: CompletionLogprobs | None


class BaseAnswer(Output):
    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int
    usage: Usage


class ChatAnswer(BaseAnswer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] = []


class CompletionAnswer(BaseAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenList(Output):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Influence(Output):
    tokens: list[str]
    influence: list[float | Literal["outside"] | None]
    kl: list[float | None]
    candidates: list[list[list[str | float | None]]]


class TokenText(Output):
    prompt: str


class Health(Output):
    status: Literal["ok", "failed"]


class Deleted(Output):
    id: str
    object: Literal["model"]
    deleted: bool


FAILURES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
