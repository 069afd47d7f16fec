"""Random damage to files: flipped bits, truncation, and values of JSON that no program wrote."""

import json
import random
from pathlib import Path
from typing import Any


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in place by one kind at random; return its name. The file always changes."""
    kinds = [flip, flip, cut, overwrite]
    if path.suffix in (".json", ".jsonl") or ".part" in path.name:
        kinds += [swap, swap]
    before = path.read_bytes()
    while path.read_bytes() == before:
        kind = rng.choice(kinds)
        kind(path, rng)
    return kind.__name__


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit to three."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Keep only the beginning."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(max(len(data), 1))] if data else b"{")


def overwrite(path: Path, rng: random.Random) -> None:
    """Replace a block, as a bad disk does, or everything."""
    data = path.read_bytes()
    start, size = rng.randrange(max(len(data), 1)), rng.choice((1, 16, 512))
    path.write_bytes(data[:start] + rng.choice((b"\0", b"\xff", b"[")) * size + data[start + size :])


HUGE, DEEP, HALF = "9" * 5000, "[" * 3000 + "]" * 3000, '"\\ud83d"'
VALUES = [
    HUGE,
    DEEP,
    HALF,
    "1e999",
    "NaN",
    "null",
    "true",
    "-1",
    "[]",
    "{}",
    '"x"',
    "3.5",
    "[[[1]]]",
    '"${x}"',
]


def swap(path: Path, rng: random.Random) -> None:
    """Replace one value of a JSON text, or of one line, by one of another type or of an absurd size."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines() if path.suffix != ".json" else [text]
    if not lines:
        return
    index = rng.randrange(len(lines))
    try:
        value = json.loads(lines[index])
    except ValueError:
        return
    places = list(_places(value))
    if not places:
        return
    container, key = rng.choice(places)
    container[key] = "@here@"
    new = rng.choice(VALUES)
    lines[index] = json.dumps(value, ensure_ascii=False).replace('"@here@"', new, 1)
    path.write_bytes("\n".join([*lines, ""]).encode())


def _places(value: Any):
    """Yield (container, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)
