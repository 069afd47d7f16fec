"""What a model may do. Training, decoding and the server ask here before they use a path of computation.

A path is a way to compute log-probabilities: packed, padded, with a cache. It is right if it gives what whole
forwards of each row alone give. A model's declared properties decide where they can; otherwise a check does:
the path runs on a small random model of the same kind (`ram.models.small`), in float32, over ragged rows. The
result is stored by the digest of everything that it depends on.

    model -> declared properties -> stored result, or check of a small model -> None, or why the path is wrong
"""

import functools
import inspect
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ram.errors import UserError
from ram.log import log
from ram.models.llama import LLAMA_KIN, STEADY_ROPE
from ram.models.small import IDS, NoSmallModel, small_config, small_model
from ram.storage.files import fingerprint, read_json, write_json

TOLERANCE = 2e-3  # nats; float32 rounds to less, and a token that is seen in error gives more
# Tokens of the prompts and of two answers to each.
SIZES = {"prompt": (13, 40, 25), "target": (30, 9, 41), "negative": (17, 33, 5)}
WHOLE, ALONE = "whole forwards", "training row by row"  # the slowest paths


class Truth(NamedTuple):
    """The rows of a check, and what whole forwards of each alone give.

    Args:
        rows: token ids; rows 2 i and 2 i + 1 begin with the same prompt.
        logprobs: by row (T, V), of the token after each position.
    """

    rows: list[list[int]]
    logprobs: list[torch.Tensor]


Probe = Callable[[Any, Truth], float]  # runs a path; the largest difference from the truth, in nats
_known: "weakref.WeakKeyDictionary[Any, dict[tuple, str | None]]" = weakref.WeakKeyDictionary()
_told: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


# ---- declared properties -----------------------------------------------------------------------------------


def text_config(config: Any) -> Any:
    """Return the part of a model's configuration that describes its language model."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def attention_of(model: Any) -> str:
    return getattr(model.config, "_attn_implementation", None) or "eager"


def is_own_family(model: Any) -> bool:
    """Return whether a model needs no check: Llama's kin, whose paths tests compare with exact references."""
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    module = type(model).__module__
    own = f"transformers.models.{name}.modeling_{name}"
    return name in LLAMA_KIN and rope in STEADY_ROPE and module == own


def window(config: Any, longest: int) -> int | None:
    """Return the tokens over which attention reaches, if that is fewer than `longest`."""
    config = text_config(config)
    kinds = getattr(config, "layer_types", None)
    sizes = []
    if kinds is None or "sliding_attention" in kinds:
        sizes.append(getattr(config, "sliding_window", None))
    sizes.append(getattr(config, "attention_chunk_size", None))
    return min((size for size in sizes if isinstance(size, int) and 0 < size < longest), default=None)


def max_positions(config: Any) -> int | None:
    """Return the tokens of a model's longest context, or None if its configuration sets none.

    LongRoPE's factors change where a text becomes longer than the original context. Beyond it the law of a
    token would depend on the tokens after it, so it counts as the longest.

    Args:
        config: a configuration, or the content of a config.json.
    """
    if isinstance(config, dict):
        inner = config.get("text_config")
        get = (inner if isinstance(inner, dict) else config).get
    else:
        get = vars(text_config(config)).get
        config = text_config(config)
    rope = get("rope_parameters") or get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    limits = [get("max_position_embeddings", getattr(config, "max_position_embeddings", get("n_positions")))]
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        key = "original_max_position_embeddings"
        limits.append(rope.get(key) or get(key))
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def traits(model: Any) -> str:
    """Describe what a configuration declares that a fast path may not keep; empty if it declares nothing."""
    config = text_config(model.config)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    rope = getattr(config, "rope_parameters", None) or {}
    found = [f"layers of the kinds {', '.join(map(str, kinds))}"] if kinds else []
    found += ["a state"] if getattr(model, "_is_stateful", False) else []
    found += ["a window"] if not kinds and getattr(config, "sliding_window", None) else []
    found += [f"{rope['rope_type']} positions"] if rope.get("rope_type", "default") not in STEADY_ROPE else []
    found += ["an encoder"] if getattr(model.config, "is_encoder_decoder", False) else []
    found += ["eager attention"] if attention_of(model) == "eager" else []
    return ", ".join(found)


# ---- the check ---------------------------------------------------------------------------------------------


def objection(model: Any, path: str, probe: Probe, longest: int) -> str | None:
    """Return why a path is wrong for a model, or None if it is right.

    Args:
        path: name of the path, for the message.
        probe: runs the path on a small model.
        longest: tokens of the longest row; a window that is not shorter plays no part.
    """
    if is_own_family(model) and window(model.config, longest) is None:
        return None
    key = (path, attention_of(model), longest)
    results = _known.setdefault(model, {})
    if key not in results:
        results[key] = _stored(model, path, probe, longest)
    return results[key]


def whole_objection(model: Any, longest: int) -> str | None:
    """Return why not even whole forwards give a model's law, or None if they do."""
    return objection(model, WHOLE, _causal_difference, longest)


def check_decodable(model: Any, longest: int) -> None:
    """Raises UserError if no way to decode a model is right."""
    if hasattr(model, "base_model") and (reason := whole_objection(model, longest)):
        raise UserError(
            f"{type(model).__name__} cannot decode: {reason}; expected a causal language model, as with "
            "is_decoder=true in its config.json"
        )


def fall_back(model: Any, path: str, instead: str, reason: str) -> None:
    """Say once for a model that a slower path is used."""
    line = f"{type(model).__name__}: {path} is not used ({reason}); using {instead}"
    if line not in _told.setdefault(model, set()):
        _told[model].add(line)
        log.info(line)


def _stored(model: Any, path: str, probe: Probe, longest: int) -> str | None:
    """Return the stored result of a check, or make the check and store its result."""
    import transformers

    kind, attention = type(model), attention_of(model)
    try:
        config = small_config(model.config, longest)
    except Exception as error:  # families check their own sizes, with errors of many types
        return _unknown(model, error, path)
    facts = [config.to_json_string(), f"{kind.__module__}.{kind.__qualname__}", attention, path]
    facts += [transformers.__version__, torch.__version__, _code()]
    key = fingerprint(facts)
    file = _store() / f"{key[:32]}.json"
    try:
        stored = read_json(file)
        if stored["sum"] == fingerprint([key, stored["reason"]]):
            return stored["reason"]
    except (OSError, UserError, TypeError, KeyError):
        pass  # not stored yet, or damaged
    reason = _checked(model, config, attention, path, probe)
    if reason is not None and (declared := traits(model)):
        reason += f"; it declares {declared}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"reason": reason, "sum": fingerprint([key, reason])})
    except OSError:
        pass  # the check is made again next time
    return reason


def use_store(folder: Path) -> None:
    """Store results in another folder, and forget those in memory."""
    os.environ["RAM_ABILITIES"] = str(folder)
    _known.clear()


def _store() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("RAM_ABILITIES") or home / "ram" / "abilities")


@functools.cache
def _code() -> str:
    """Digest of the code whose results are stored."""
    room = Path(__file__).resolve().parents[1]
    files = [
        file for name in ("models", "decoding", "training") for file in sorted((room / name).glob("*.py"))
    ]
    return fingerprint([file.read_text(encoding="utf-8") for file in files])


def _checked(model: Any, config: Any, attention: str, path: str, probe: Probe) -> str | None:
    try:
        small, truth = _truth(type(model), config.to_json_string(), attention, _Config(config))
    except Exception as error:
        return _unknown(model, error, path)
    try:
        with torch.no_grad():
            difference = probe(small, truth)
    except Exception as error:  # a path that a model was not made for raises errors of any type
        return f"it fails ({_line(error)})"
    if difference <= TOLERANCE:
        return None
    if path == WHOLE:
        return f"a token's law depends on later tokens, by up to {difference:.2g} nats"
    return f"it differs from whole forwards by {difference:.2g} nats"


def _unknown(model: Any, error: Exception, path: str) -> str | None:
    """A model that no small one can stand for takes the slowest path, if that runs at all."""
    if path not in (WHOLE, ALONE):
        return f"no small model of this configuration can check it ({_line(error)})"
    try:
        with torch.no_grad():
            whole_logits(model, [*IDS[:4]])
    except Exception as own:
        return f"its forward pass fails ({_line(own)})"
    return None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, NoSmallModel) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:120]}"


class _Config(NamedTuple):
    """A configuration that is not part of a cache's key."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=1)  # the paths of a model are checked one after the other
def _truth(kind: Any, digest: str, attention: str, config: _Config) -> tuple[Any, Truth]:
    model = small_model(kind, config.value, attention)
    rows = example_rows()
    with torch.no_grad():
        return model, Truth(rows, [whole_logprobs(model, row) for row in rows])


def example_rows() -> list[list[int]]:
    """The rows of a check: each prompt with its two answers."""
    rng, rows = np.random.default_rng(0), []
    for sizes in zip(*SIZES.values(), strict=True):
        prompt, *answers = (rng.integers(IDS.start, IDS.stop, size=size).tolist() for size in sizes)
        rows += [prompt + answer for answer in answers]
    return rows


def whole_logits(model: Any, ids: Sequence[int], last: int = 0) -> torch.Tensor:
    """Logits (T, V) of one row from a forward without padding and cache; last: only so many, 0 for all."""
    tokens = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=tokens, use_cache=False, **keep(model, last)).logits[0]
    return logits[-last:]


def whole_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    return whole_logits(model, ids).log_softmax(dim=-1)


def keep(model: Any, last: int) -> dict[str, int]:
    """Return the argument that limits a forward's logits, for models that know it; others give all."""
    return {"logits_to_keep": last} if "logits_to_keep" in _parameters(type(model)) else {}


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepts(model: Any, name: str) -> bool:
    """Return whether a model's forward has an argument of this name."""
    return name in _parameters(type(model))


def distance(logprobs: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference of two sets of log-probabilities; infinite if one is not a number."""
    value = (logprobs - truth).abs().max().item() if logprobs.shape == truth.shape else float("inf")
    return value if value == value else float("inf")


def _causal_difference(model: Any, truth: Truth) -> float:
    """How far the law after a prefix is from that in the whole row, where tokens to come must not count."""
    worst = 0.0
    for row, logprobs in zip(truth.rows[:3], truth.logprobs, strict=False):
        for size in (1, 12, len(row) // 2, len(row) - 1):
            own = whole_logits(model, row[:size], 1).log_softmax(dim=-1)
            worst = max(worst, distance(own[0], logprobs[size - 1]))
    return worst
