"""The door of a pair's server: refuse requests that its form cannot keep, and report the pair under /ram.

`vllm serve --middleware ram.vllm.middleware.PairGuard` puts it around vLLM's own application.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ram.decoding.par import PARParams
from ram.vllm import laws

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

GENERATING = ("/v1/completions", "/v1/chat/completions")
HARMLESS = ("/tokenize", "/detokenize")
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}  # vLLM's own defaults
# vllm 0.32, utils/cpu_triton_utils.py: `_expand_kernel_impl` fills a converted copy of its result, so the
# CPU build has uninitialised temperatures and limits at drafted positions.
DRAFTS_ON_A_CPU = "temperature: with drafts vLLM's CPU build keeps only 0 (argmax); start without drafts"
# Keys that a pair keeps in neither form unless they are empty, with the reason.
EMPTIES = "it can remove every token of the proposal's nucleus"
FOREIGN = "it is not part of a pair's distribution"
REFUSED = {
    "min_tokens": EMPTIES,
    "allowed_token_ids": EMPTIES,
    "bad_words": EMPTIES,
    "logit_bias": EMPTIES,
    "structured_outputs": EMPTIES,
    "thinking_token_budget": EMPTIES,
    "min_p": FOREIGN,
    "presence_penalty": FOREIGN,
    "frequency_penalty": FOREIGN,
    "use_beam_search": FOREIGN,
    "watermarking": FOREIGN,
    "prompt_logprobs": "vLLM computes them without the sampling settings",
}


def refusal(body: Mapping[str, Any], params: PARParams, defaults: Mapping[str, Any]) -> str | None:
    """Return why a pair with `params` cannot keep a request, None if it can.

    Args:
        body: the request.
        defaults: the server's sampling settings for keys that a request leaves out.
    """
    for key, reason in REFUSED.items():
        if body.get(key) or (body.get(key) is None and defaults.get(key)):
            return f"{key}: {reason}"
    kind = body.get("response_format") or {"type": "text"}
    if not isinstance(kind, Mapping) or kind.get("type") != "text":
        return f"response_format: {EMPTIES}"
    if body.get("tools") and body.get("tool_choice") != "none":
        return f"tools: a call is held to a grammar, and {EMPTIES}"
    if body.get("echo") and body.get("logprobs"):
        return f"echo with logprobs: {REFUSED['prompt_logprobs']}"
    given = NEUTRAL | dict(defaults) | {key: value for key, value in body.items() if value is not None}
    try:
        values = {key: float(given[key]) for key in NEUTRAL}
    except (TypeError, ValueError):
        return None  # vLLM refuses it and says what it expects
    return _unkept(values, params)


def _unkept(values: dict[str, float], params: PARParams) -> str | None:
    if laws.form_of(params) == laws.CLOSED:
        for key, wanted in laws.request_settings(params).items():
            value = max(values[key], 0.0) if key == "top_k" else values[key]  # -1 means no limit, as 0 does
            if value != wanted:
                return (
                    f"{key}={values[key]:g}: this server's distribution is finished before vLLM samples from "
                    f"it; leave {key} out or give {wanted:g}"
                )
        return None
    temperature = values["temperature"]
    if 0 < temperature < laws.LEAST_TEMPERATURE:
        return f"temperature={temperature:g}: give 0 (argmax) or at least {laws.LEAST_TEMPERATURE}"
    if temperature > 0 and values["top_k"] > 0 and values["top_p"] < 1:
        return (
            f"top_k={values['top_k']:g} with top_p={values['top_p']:g}: vLLM applies them in the other "
            "order; give top_k=-1 or top_p=1"
        )
    return None


def describe(model_config: Any) -> dict[str, Any]:
    """Return the answer of /ram: the pair, its form and settings, and the digests of both models' files."""
    pair = laws.PairSettings.parse(model_config.hf_config.ram)
    return {
        "proposal": "/".join(Path(model_config.model).parts[-2:]),
        "aligner": "/".join(Path(pair.aligner).parts[-2:]),
        "digests": pair.digests,
        "form": laws.form_of(pair.params),
        "settings": laws.fixed_settings(pair.params),
        "defaults": NEUTRAL | model_config.get_diff_sampling_param(),
        "dtype": str(model_config.dtype).removeprefix("torch."),
    }


class PairGuard:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/ram":
            return await answer(send, 200, describe(model_config_of(scope)))
        if scope["method"] != "POST" or path in HARMLESS:
            return await self.app(scope, receive, send)
        if path not in GENERATING:
            return await refuse(send, f"{path}: a pair answers {' and '.join(GENERATING)}")
        content = await read_body(receive)
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if isinstance(body, dict):
            config = model_config_of(scope)
            params = laws.PairSettings.parse(config.hf_config.ram).params
            defaults = config.get_diff_sampling_param()
            reason = refusal(body, params, defaults)
            if reason is None and drafts_on_a_cpu(scope) and temperature_of(body, defaults) != 0:
                reason = DRAFTS_ON_A_CPU
            if reason is not None:
                return await refuse(send, reason)
        return await self.app(scope, replayed(content, receive), send)


def drafts_on_a_cpu(scope: Message) -> bool:
    """Return whether the server drafts and runs in vLLM's CPU build."""
    config = scope["app"].state.vllm_config
    return config.speculative_config is not None and config.device_config.device_type == "cpu"


def temperature_of(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Return a request's temperature, the server's if it sets none."""
    value = body.get("temperature")
    return defaults.get("temperature", NEUTRAL["temperature"]) if value is None else value


def model_config_of(scope: Message) -> Any:
    """Return vLLM's ModelConfig of the application that a request is for."""
    return scope["app"].state.vllm_config.model_config


async def read_body(receive: Receive) -> bytes:
    """Return a request's whole body; what arrived of it if the client has gone."""
    content, more = b"", True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)
    return content


def replayed(content: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body once, then what the connection gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": content, "more_body": False}

    return again


async def refuse(send: Send, reason: str) -> None:
    """Answer 400 in the form of OpenAI's errors."""
    error = {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    await answer(send, 400, {"error": error})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    """Send a JSON answer."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
