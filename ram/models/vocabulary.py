"""What a vocabulary's ids may be: which can be drawn, which a model has rows for, which two tokenizers share.

`len(tokenizer)` is a count. A vocabulary may leave ids unused, so its highest id can be above that.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ram.errors import UserError
from ram.models.abilities import text_config
from ram.storage.files import fingerprint
from ram.storage.records import read_record

MOST_IDS = 1 << 24  # tokens of the largest vocabulary; sizes above it are taken for damage
MOST_LAYERS = 1 << 12
MOST_WIDTH = 1 << 24


class Vocabulary(NamedTuple):
    """The ids that can be drawn: those below `size`, without the `unused` ones, which name no token."""

    size: int
    unused: tuple[int, ...] = ()


def id_range(tokenizer: Any) -> int:
    """Return the highest token id + 1."""
    return _ids(tokenizer, len(tokenizer))[0]


@functools.lru_cache(maxsize=8)  # the count changes if tokens are added
def _ids(tokenizer: Any, count: int) -> tuple[int, tuple[int, ...]]:
    ids = set(tokenizer.get_vocab().values())
    size = max(ids, default=-1) + 1
    if size > MOST_IDS:
        raise UserError(
            f"a token has the id {size - 1:,}: expected ids below {MOST_IDS:,}; mend the tokenizer's files"
        )
    return size, tuple(sorted(set(range(size)) - ids)) if size > len(ids) else ()


def vocabulary(tokenizer: Any, *models: Any) -> Vocabulary:
    """Return the ids that all of these models can draw; a model may be None."""
    size, unused = _ids(tokenizer, len(tokenizer))
    rows = [text_config(model.config).vocab_size for model in models if model is not None]
    size = min([size, *rows])
    return Vocabulary(size, tuple(token for token in unused if token < size))


def check_ids(ids: Iterable[int], rows: int | None, name: str, use: str) -> None:
    """Raise UserError if token ids that are in use are beyond a model's rows.

    Args:
        rows: vocabulary rows of the model; None if its configuration does not say.
        name: the model, for the message.
        use: what the ids are, for the message.
    """
    highest = max(ids, default=-1)
    if rows is not None and highest >= rows:
        raise UserError(
            f"{name} has {rows} vocabulary rows, but {use} has the token id {highest}: they do not "
            "belong together"
        )


def rows_in(source: str | None) -> int | None:
    """Return the vocabulary rows that a folder's config.json names; None without such a file."""
    path = Path(source or "") / "config.json"
    if source is None or not path.is_file():
        return None
    config = read_config(path)
    inner = config.get("text_config")
    rows = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return rows if isinstance(rows, int) else None


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        UserError: If it is no JSON object, or names a size that no model has.
    """
    config = read_record(path, {}, "download or copy the model again")
    for part in (config, config.get("text_config")):
        for key, value in part.items() if isinstance(part, dict) else ():
            most = MOST_LAYERS if re.search(r"layers?$|num_blocks$", key) else MOST_WIDTH
            sized = re.search(
                r"layers?$|_size$|_dim$|_heads$|experts$|num_blocks$|d_model|n_embd|n_head", key
            )
            if sized and isinstance(value, int) and value > most:
                raise UserError(f"{path}: {key}={value:,} is no size of a model: expected at most {most:,}")
    return config


# ---- two tokenizers ----------------------------------------------------------------------------------------


def shared_fingerprint(tokenizer: Any, size: int) -> str:
    """Return a hash that is equal if two tokenizers give the same ids below `size`; their EOS may differ."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocab = {token: index for token, index in tokenizer.get_vocab().items() if index < size}
        return fingerprint([type(tokenizer).__name__, vocab])
    content = json.loads(backend.to_str())
    # Texts are encoded without added tokens, padding and cuts.
    for key in ("padding", "truncation", "post_processor"):
        content.pop(key, None)
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if token["id"] < size]
    vocab = content["model"].get("vocab")
    if isinstance(vocab, dict):
        content["model"]["vocab"] = {token: index for token, index in vocab.items() if index < size}
    elif isinstance(vocab, list):
        content["model"]["vocab"] = vocab[:size]
    return fingerprint(content)
