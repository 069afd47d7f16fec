"""Small JSON files with their own digest, so that a changed or cut one is not taken for a whole one."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from ram.errors import UserError
from ram.storage.files import fingerprint, read_json, write_text
from ram.storage.json_text import dumps, loads

DIGEST = "digest"  # key of a record's own digest; records of earlier versions have none
Form = Mapping[str, type | UnionType]  # required keys and their types


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as JSON stores it, with its digest."""
    stored = loads(dumps(record))
    return stored | {DIGEST: fingerprint(stored)}


def is_sealed(record: dict[str, Any], form: Form | None = None) -> bool:
    """Return whether a record is as it was sealed; an earlier version's, without a digest, counts as whole.

    A digest under another key, not one of `form`, means that the key itself was damaged.
    """
    if DIGEST in record:
        rest = {key: value for key, value in record.items() if key != DIGEST}
        return record[DIGEST] == fingerprint(rest)
    last = next(reversed(record), "")  # `sealed` puts the digest last
    return last in (form or ()) or not re.fullmatch("[0-9a-f]{64}", str(record.get(last)))


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    write_text(path, dumps(sealed(record), indent=2) + "\n")


def read_record(path: str | Path, form: Form, remedy: str) -> dict[str, Any]:
    """Return the content of a JSON file without its digest.

    Args:
        path: a file that `write_record` wrote, or one of an earlier version.
        form: keys that it must have, and their types.
        remedy: what a user can do about a damaged file.

    Raises:
        UserError: if the file is missing, not JSON, of another form, or not as it was written.
    """
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    wrong = [key for key in form if not isinstance(record, dict) or not is_of(record.get(key), form[key])]
    if wrong:
        keys = " and ".join(form) or "keys"
        raise UserError(
            f"{path}: expected a record with {keys}, {wrong[0]} is missing or of another type; {remedy}"
        )
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a record (a JSON object), got a {type(record).__name__}; {remedy}")
    if not is_sealed(record, form):
        raise UserError(f"{path}: was changed or cut short after it was written; {remedy}")
    return {key: value for key, value in record.items() if key != DIGEST}


def is_of(value: Any, kind: type | UnionType) -> bool:
    """Return whether a value has a type; true and false are no numbers, NaN and infinities neither."""
    if isinstance(value, bool):
        return bool in (kind, *get_args(kind))
    return isinstance(value, kind) and not (isinstance(value, float) and not math.isfinite(value))
