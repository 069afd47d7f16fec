"""Bounds that every request passes, through whichever door it comes: HTTP, FastChat's worker, the chat.

parsed JSON -> check_lists (before its items are looked at) -> check_law, check_answers -> the engine
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

from ram.decoding.par import KL_DIRECTIONS, KL_FALLBACKS, SAMPLE_MODES, PARParams
from ram.decoding.requests import BadRequest, TooLong
from ram.settings.serving import LimitSettings

STOPS = 16  # stop strings, and stop tokens
STOP_CHARACTERS = 256
TOP_LOGPROBS = 20
ITEMS = 128  # of any other list or object in a request
TOKEN_CHARACTERS = 16  # a text has at least one token per this many characters, or it is refused

Temperature = Annotated[float, Field(ge=0, le=100)]
# Bounds of the keys of the next-token distribution, without `base_`. A key that is not listed has the type
# that PARParams declares; PARParams itself checks the range of every key.
BOUNDS: dict[str, Any] = {
    "sample_mode": Literal[tuple(SAMPLE_MODES)],
    "temperature": Temperature,
    "top_p": Annotated[float, Field(gt=0, le=1)],
    "top_k": Annotated[int, Field(ge=-1, le=1 << 31)],
    "repetition_penalty": Annotated[float, Field(ge=0.1, le=10)],
    "div_threshold": Annotated[float, Field(ge=0)],
    "kl_fallback": Literal[tuple(KL_FALLBACKS)],
    "kl_direction": Literal[KL_DIRECTIONS],
    "expert_temperature": Temperature,
    "n_candidates": Annotated[int, Field(ge=1, le=64)],
    "mixture_weight": Annotated[float, Field(ge=0, le=1)],
}
DECLARED = get_type_hints(PARParams)
LAW_FIELDS: dict[str, Any] = {
    key: (BOUNDS.get(key.removeprefix("base_"), DECLARED[key]) | None, None)
    for key in PARParams.field_names()
}
# Types are not converted; NaN and infinite numbers are refused.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
LawKeys = create_model("LawKeys", __config__=STRICT, **LAW_FIELDS)


def check_lists(body: Any, limits: LimitSettings, max_length: int) -> None:
    """Raise BadRequest or TooLong if a list of a request has too many items to be looked at one by one."""
    if not isinstance(body, dict):
        return
    if len(body) > ITEMS:
        raise BadRequest(f"a request of {len(body)} keys: expected at most {ITEMS}")
    most = {"messages": limits.messages, "prompt": limits.choices, "stop": STOPS, "stop_token_ids": STOPS}
    for key, value in body.items():
        if not isinstance(value, list | dict):
            continue
        bound, of_each = most.get(key, ITEMS), ITEMS
        if key in ("prompt", "tokens"):
            of_each = max_length
            if value and not (isinstance(value, list) and isinstance(value[0], str | list)):
                bound = max_length  # the ids of one prompt
        if len(value) > bound:
            kind = TooLong if bound == max_length else BadRequest
            raise kind(f"{str(key)[:64]}={len(value)} items: expected at most {bound}")
        for item in value.values() if isinstance(value, dict) else value:
            inner = item.values() if isinstance(item, dict) else [item]
            if any(isinstance(part, list | dict) and len(part) > of_each for part in inner):
                raise BadRequest(f"{str(key)[:64]}=a list of lists: expected at most {of_each} items in each")


def check_text(text: str, room: int) -> None:
    """Raise TooLong if a text has too many characters for a number of tokens; nothing is tokenised."""
    if len(text) > TOKEN_CHARACTERS * room:
        raise TooLong(f"a text of {len(text)} characters, and room for {room} tokens: shorten it")


def check_law(keys: dict[str, Any]) -> None:
    """Raise BadRequest if a key of the next-token distribution is out of bounds."""
    try:
        LawKeys.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(f"{first['loc'][0]}={str(first['input'])[:64]}: {first['msg']}") from None


def check_answers(
    n_answers: int,
    stop: Sequence[str],
    stop_token_ids: Sequence[int],
    logprobs: int | None,
    seed: int,
    limits: LimitSettings,
) -> None:
    """Raise BadRequest if a request asks for too much."""
    if not 1 <= n_answers <= limits.choices:
        raise BadRequest(f"n={n_answers} answers in one request: expected at most {limits.choices}")
    if len(stop) > STOPS or max(map(len, stop), default=0) > STOP_CHARACTERS:
        raise BadRequest(f"stop={len(stop)} texts: expected at most {STOPS}, of {STOP_CHARACTERS} characters")
    if len(stop_token_ids) > STOPS or not all(0 <= token < 1 << 31 for token in stop_token_ids):
        raise BadRequest(f"stop_token_ids={len(stop_token_ids)} ids: expected at most {STOPS} token ids")
    if not 0 <= (logprobs or 0) <= TOP_LOGPROBS:
        raise BadRequest(f"logprobs={logprobs}: expected at most {TOP_LOGPROBS}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise BadRequest(f"seed={str(seed)[:64]}: expected 64 bits")
