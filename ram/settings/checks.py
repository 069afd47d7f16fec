"""Check plain values against types, without converting any, and refuse a wrong one in a single line.

A section of a configuration is a `Section` or a dataclass. A dataclass may check itself: it raises ValueError
with a text that begins with the key, as PARParams does.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from ram.errors import UserError
from ram.settings import compose
from ram.settings.aliases import hint

T = TypeVar("T")


# ---- types of keys -----------------------------------------------------------------------------------------


def interval(text: str) -> AfterValidator:
    """Return a validator that accepts the numbers of an interval, e.g. "[1, inf)"."""
    low, high = map(float, text[1:-1].split(", "))

    def check(value: float) -> float:
        above = value > low or (value == low and text[0] == "[")
        below = value < high or (value == high and text[-1] == "]")
        if not (above and below):
            raise PydanticCustomError("interval", "expected a number in {interval}", {"interval": text})
        return value

    return AfterValidator(check)


def _check_folder_name(value: str) -> str:
    if value and (Path(value).name != value or value in (".", "..")):
        raise PydanticCustomError("folder_name", "expected a name that a folder can have, without '/'")
    return value


Count = Annotated[int, interval("[1, inf)")]
CountOrZero = Annotated[int, interval("[0, inf)")]
Length = Annotated[int, interval("[2, inf)")]  # tokens of prompt + answer
Positive = Annotated[float, interval("(0, inf)")]
NotNegative = Annotated[float, interval("[0, inf)")]
FolderName = Annotated[str, AfterValidator(_check_folder_name)]
Dtype = Literal["auto", "float32", "bfloat16"]

# ---- sections ----------------------------------------------------------------------------------------------


def _validate_unchanged(cls: type, value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validate a value and keep it as it is: pydantic would turn 1 into 1.0, and run names would change."""
    validated = validate(value)
    return validated if isinstance(validated, BaseModel) else value


class Section(BaseModel):
    """Keys of a configuration with their types. Values are immutable; unknown keys are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=()
    )
    _unchanged = field_validator("*", mode="wrap")(_validate_unchanged)


@functools.cache
def _validator(kind: type) -> type:
    """Return a class that checks the keys of a dataclass when it is created."""
    members = {"_unchanged": field_validator("*", mode="wrap")(_validate_unchanged)}
    config = ConfigDict(strict=True, extra="forbid")
    return pydantic.dataclasses.dataclass(type(kind.__name__, (kind,), members), config=config, frozen=True)


def check(kind: type[T], values: Any, prefix: str = "", source: str = "config") -> T:
    """Return a section made from plain values.

    Args:
        kind: a Section, or a dataclass.
        values: its keys and values, a section below it as a dict or as an object.
        prefix: what precedes a key in messages, e.g. "sampling.".
        source: the file of config/ that has the defaults.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type or is out of range.
    """
    if not isinstance(values, dict):
        raise UserError(_expected_keys(kind, prefix, values))
    try:
        if issubclass(kind, BaseModel):
            return kind(**values)
        _validator(kind)(**values)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        raise UserError(_explain(kind, details, values, prefix, source)) from None
    return kind(**values)


def keys_of(kind: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a section and of the sections below it."""
    for name, below in _types(kind).items():
        if isinstance(below, type) and _is_section(below):
            yield from keys_of(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nested(section: Any) -> Any:
    """Return a section as nested dicts of its composed values, without keys that nothing has set."""
    if not _is_section(type(section)):
        return section
    unset = set()
    if isinstance(section, BaseModel):
        unset = vars(section).keys() - section.model_fields_set
    return {key: nested(value) for key, value in vars(section).items() if key not in unset}


def _is_section(kind: type) -> bool:
    return issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)


def _types(kind: type) -> dict[str, Any]:
    """Return key -> type of a section's keys."""
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return typing.get_type_hints(kind)


# ---- refusals ----------------------------------------------------------------------------------------------

TYPES = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "string": "str",
    "list": "list",
    "dict": "keys below it",
}


def _explain(kind: type, details: ErrorDetails, values: dict[str, Any], prefix: str, source: str) -> str:
    """Return pydantic's first error as one line: got, expected, remedy."""
    error, value, context = details["type"], details["input"], details.get("ctx", {})
    steps = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]]
    key = prefix + "".join(steps).removeprefix(".")
    if error == "missing":
        group, name = prefix.removesuffix("."), values.get("name")
        if name is None:
            return f"{key} is not set: give {key}=VALUE"
        return (
            f"{key} is not set, but {group}.name={name} needs it: choose a {group} by {group}={name}, which "
            f"reads config/{group}/{name}.yaml"
        )
    if error in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {key!r}: {hint(key, keys_of(kind, prefix)) or f'see config/{source}.yaml'}"
    if error == "value_error":  # a dataclass that checks itself; its message begins with the key
        return f"{prefix}{context['error']}"
    if error.startswith(("model", "dataclass")):
        below = functools.reduce(lambda section, part: _types(section)[str(part)], details["loc"], kind)
        return _expected_keys(below, f"{key}.", value)
    if error in ("interval", "folder_name"):
        return f"{key}={shown(value)}: {details['msg']}"
    if error == "finite_number":
        return f"{key}={value}: expected a finite number"
    if error == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"{key}={shown(value)}: expected one of {choices}"
    expected = TYPES.get(error.split("_")[0])
    if expected is None:
        return f"{key}={shown(value)}: {details['msg']}"
    default = compose.leaves(compose.defaults(source)).get(key)
    if expected == "list":
        example = f", e.g. {key}=[{value}]"
    else:
        example = "" if default is None else f", e.g. {key}={shown(default)}"
    return f"{key}={shown(value)}: expected {expected}{example}"


def _expected_keys(kind: type, prefix: str, value: Any) -> str:
    first = next(keys_of(kind, prefix))
    return f"{prefix.removesuffix('.')}={shown(value)}: expected keys below it, e.g. {first}"


def shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
