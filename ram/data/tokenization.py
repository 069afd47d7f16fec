"""Examples become token ids: the same ids in training and in decoding, made once and kept on disk."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ram.data import prompts
from ram.errors import UserError
from ram.log import log, progress
from ram.storage.files import fingerprint, replacing

VERSION = 1  # raise it when the ids of the same text change, so that no stale cache is read


@dataclass(frozen=True)
class Example:
    """One prompt with the answer to learn and, where there is one, the other answer."""

    row: int  # 0-based index of the record in its input file
    prompt: str
    target: str
    negative: str | None = None  # the proposal's sample, or the rejected answer
    record: dict | None = None  # the input row, for writing it back with a `sampling`


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added; a special token's spelling inside a text is ordinary text."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids


def encode_prompts(
    tokenizer, texts: Sequence[str], max_prompt_length: int, add_bos: bool = False
) -> tuple[list[list[int]], int]:
    """Prompt ids as training and decoding both use them, and how many prompts were cut to the limit."""
    budget = max_prompt_length - int(add_bos)
    ids = encode(tokenizer, texts)
    long = [index for index, row in enumerate(ids) if len(row) > budget]
    shorter = [
        prompts.shorten(texts[i], budget, lambda text: len(encode(tokenizer, [text])[0])) for i in long
    ]
    for index, row in zip(long, encode(tokenizer, shorter), strict=True):
        ids[index] = row
    if add_bos:
        if tokenizer.bos_token_id is None:
            raise UserError("add_bos=true, but the tokenizer has no BOS token; set add_bos=false")
        ids = [[tokenizer.bos_token_id, *row] for row in ids]
    return ids, len(long)


@dataclass
class TokenizedDataset:
    """Token ids of all examples, flat: example i owns `ids[k][offsets[k][i]:offsets[k][i + 1]]` for k in the
    parts.

    Parts: "prompt", "target" and, where the examples have one, "negative". `counts` says what was cut.
    """

    ids: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    counts: dict[str, int]
    key: str = ""  # content hash of texts, tokenizer and lengths; set where the ids were cached

    def __len__(self) -> int:
        return len(self.offsets["prompt"]) - 1

    def part(self, name: str, index: int) -> np.ndarray:
        return self.ids[name][self.offsets[name][index] : self.offsets[name][index + 1]]


def tokenize(
    examples: Sequence[Example], tokenizer, max_length: int, max_prompt_length: int, add_bos: bool = False
) -> TokenizedDataset:
    """Ids of prompt and answers, encoded apart so that training sees the prompt exactly as decoding does.

    A prompt is cut as `prompts.shorten` does. An answer gets the EOS when both fit into what `max_length`
    leaves after the prompt; one that does not fit is cut and gets none, so that no model learns to stop in
    mid-sentence.
    """
    counts: Counter[str] = Counter(examples=len(examples))
    parts: dict[str, list[list[int]]] = {"prompt": [], "target": []}
    with_negative = bool(examples) and examples[0].negative is not None
    if with_negative:
        parts["negative"] = []
    for start in progress(range(0, len(examples), 1000), desc="tokenise", unit="k examples"):
        chunk = examples[start : start + 1000]
        prompt_ids, cut = encode_prompts(tokenizer, [e.prompt for e in chunk], max_prompt_length, add_bos)
        parts["prompt"] += prompt_ids
        counts["prompts_cut"] += cut
        for name in parts.keys() - {"prompt"}:
            for prompt_row, row in zip(
                prompt_ids, encode(tokenizer, [getattr(e, name) for e in chunk]), strict=True
            ):
                room = max_length - len(prompt_row)
                counts[f"{name}s_cut"] += len(row) + 1 > room
                parts[name].append([*row, tokenizer.eos_token_id] if len(row) + 1 <= room else row[:room])
    counts["tokens"] = sum(len(row) for rows in parts.values() for row in rows)
    return TokenizedDataset(
        {name: np.array([i for row in rows for i in row], dtype=np.int32) for name, rows in parts.items()},
        {name: np.cumsum([0] + [len(row) for row in rows], dtype=np.int64) for name, rows in parts.items()},
        dict(counts),
    )


def tokenize_cached(examples: Sequence[Example], name: str, tokenizer, settings) -> TokenizedDataset:
    """`tokenize`, read from output_dir/cache when text, tokenizer and lengths are those of an earlier run.

    settings: output_dir, max_length, max_prompt_length, add_bos. name: a readable part of the file's name.
    """
    text = hashlib.sha256()
    for example in examples:
        text.update(repr((example.prompt, example.target, example.negative)).encode())
    lengths = [settings.max_length, settings.max_prompt_length, settings.add_bos]
    key = fingerprint([VERSION, text.hexdigest(), tokenizer_fingerprint(tokenizer), lengths])
    path = Path(settings.output_dir) / "cache" / f"{name}.{key[:16]}.safetensors"
    data = _read_cache(path) if path.is_file() else None
    if data is None:
        data = tokenize(
            examples, tokenizer, settings.max_length, settings.max_prompt_length, settings.add_bos
        )
        _write_cache(path, data)
    data.key = key
    return data


def tokenizer_fingerprint(tokenizer) -> str:
    """Equal exactly where two tokenizers give the same ids for every text and begin and end alike."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        backend.pop(state, None)
    return fingerprint([backend, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _write_cache(path: Path, data: TokenizedDataset) -> None:
    from safetensors.numpy import save_file

    arrays = {f"ids.{k}": v for k, v in data.ids.items()} | {
        f"offsets.{k}": v for k, v in data.offsets.items()
    }
    with replacing(path) as aside:
        save_file(arrays, aside, metadata={key: str(count) for key, count in data.counts.items()})


def _read_cache(path: Path) -> TokenizedDataset | None:
    """None where the file is cut short or damaged: it will be made again."""
    from safetensors import SafetensorError, safe_open

    try:
        return _read_arrays(path, safe_open)
    except SafetensorError:
        log.warning(f"{path} is damaged: tokenising again")
        return None


def _read_arrays(path: Path, safe_open) -> TokenizedDataset:
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        counts = {key: int(count) for key, count in file.metadata().items()}
    split = {
        kind: {n.split(".", 1)[1]: a for n, a in arrays.items() if n.startswith(kind)}
        for kind in ("ids", "offsets")
    }
    return TokenizedDataset(split["ids"], split["offsets"], counts)
