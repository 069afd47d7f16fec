"""JSON with bounds: values that are read break no later code; strict readers can read ours."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

DEEPEST = 100  # nested lists and objects
LONGEST = 300  # digits of an integer; a float holds 308
_PIECES = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)  # texts, brackets, commas
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadJSON(ValueError):
    """Text that is not JSON or is beyond the bounds; its message is the reason.

    Attributes:
        line, column: where, from 1; 0 if that is not known.
    """

    def __init__(self, reason: str, line: int = 0, column: int = 0) -> None:
        super().__init__(reason)
        self.line, self.column = line, column


def loads(text: str | bytes) -> Any:
    """Return a JSON value.

    Raises:
        BadJSON: if the text is not UTF-8 or not JSON, nests deeper than DEEPEST, or has an integer of more
            than LONGEST digits or half of a surrogate pair, which no UTF-8 file can hold.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise BadJSON(f"not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadJSON(f"not valid JSON ({error.msg})", error.lineno, error.colno) from None
    except RecursionError:
        raise BadJSON(f"nested deeper than {DEEPEST} levels") from None
    # A text with few brackets cannot be deep, one without such an escape has no surrogate.
    if text.count("[") + text.count("{") > DEEPEST and is_deep(value):
        raise BadJSON(f"nested deeper than {DEEPEST} levels")
    if _SURROGATE.search(text) and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise BadJSON("a text has an unpaired surrogate, which is not valid Unicode")
    return value


def dumps(value: Any, **options: Any) -> str:
    """Return a value as JSON; NaN and infinities, which JSON does not have, become null."""
    options = {"ensure_ascii": False} | options
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Return a JSON-like value with None for each NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def elements(text: str) -> Iterator[str]:
    """Yield the text of each element of a JSON list, however deep it nests."""
    depth = start = 0
    for piece in _PIECES.finditer(text):
        depth += (piece[0] in "[{") - (piece[0] in "]}")
        if depth == 1 and piece[0] == "[" and not start:
            start = piece.end()
        elif (depth == 1 and piece[0] == ",") or not depth:
            yield text[start : piece.start()]
            start = piece.end()


def is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Return whether a value nests deeper than `levels`."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(item, levels - 1) for item in inner)


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(digits: str) -> int:
    if len(digits) > LONGEST:
        raise BadJSON(f"an integer of {len(digits):,} digits; at most {LONGEST} are read")
    return int(digits)
