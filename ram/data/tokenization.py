"""Tokenization of examples: identical token ids in training and decoding, cached on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ram.data import prompts
from ram.data.chat import ChatPrompt
from ram.data.text import spelling
from ram.errors import UserError
from ram.log import log, progress
from ram.storage.files import fingerprint, replacing
from ram.storage.records import DIGEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # increase it if the ids of an unchanged text change, so that no stale cache is read
CHUNK = 1000  # examples per tokenizer call
_noted: list[str] = []  # the prompt by which `_note_space` was noticed


@dataclass(frozen=True)
class Example:
    """One prompt with the answer to learn and, optionally, a second answer."""

    row: int  # 0-based index of the record in its input file
    prompt: str
    target: str
    negative: str | None = None  # the proposal's sample, or the rejected answer
    record: dict | None = None  # the input row; the sample stage writes it back with a `sampling` field
    unfinished: tuple[str, ...] = ()  # the answers that were cut at a length limit: "target", "negative"
    question: str | None = None  # the prompt without template, if not `instruction` of the record or `prompt`


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without added tokens.

    A special token spelt out in a text is encoded as ordinary text, except in the parts of a prompt that are
    its template's own.
    """
    if not texts:
        return []
    if any(isinstance(text, prompts.Prompt) for text in texts):
        return [_encode_marked(tokenizer, text) for text in texts]
    encoding = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    return encoding["input_ids"]  # pyright: ignore[reportReturnType]


def _encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a prompt, its template's marks as special tokens, the texts between them as usual."""
    if isinstance(text, ChatPrompt) and len(text.own) == 1:
        # No user wrote a mark: the ids are those of `apply_chat_template` with every tokenizer.
        _, end = text.own[0]
        rendered = tokenizer(str(text[:end]), add_special_tokens=False, split_special_tokens=False)
        added = encode(tokenizer, [str(text[end:])])[0] if end < len(text) else []
        return [*rendered["input_ids"], *added]  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]
    marks = {mark: token for token, mark in spelling(tokenizer).marks.items() if mark}
    pattern = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or r"(?!)")
    ids, end = [], 0
    for start, stop in getattr(text, "own", ()):
        for mark in pattern.finditer(text, start, stop):
            plain = encode(tokenizer, [str(text[end : mark.start()])])[0] if mark.start() > end else []
            ids += [*plain, marks[mark[0]]]
            end = mark.end()
    return ids + (encode(tokenizer, [str(text[end:])])[0] if end < len(text) else [])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_prompt_length: int, add_bos: bool = False
) -> tuple[list[list[int]], int]:
    """Encode prompts, in the same way for training and decoding.

    Args:
        tokenizer: The tokenizer of the model.
        texts: Rendered prompts.
        max_prompt_length: Limit in tokens, BOS included; longer prompts are cut by `prompts.shorten`.
        add_bos: Begin each prompt with the BOS token.

    Returns:
        The ids of each prompt, and the number of prompts that were cut.

    Raises:
        UserError: If `add_bos` is set and the tokenizer has no BOS token.
    """
    budget = max_prompt_length - int(add_bos)

    def count_tokens(text: str) -> int:
        return len(encode(tokenizer, [text])[0])

    ids = encode(tokenizer, texts)
    long = [index for index, prompt_ids in enumerate(ids) if len(prompt_ids) > budget]
    shortened = [_shorten(texts[index], budget, count_tokens) for index in long]
    for index, prompt_ids in zip(long, encode(tokenizer, shortened), strict=True):
        ids[index] = prompt_ids
    if add_bos:
        bos = tokenizer.bos_token_id
        if not isinstance(bos, int):
            raise UserError("add_bos=true, but the tokenizer has no BOS token; set add_bos=false")
        ids = [begin(text, prompt_ids, bos) for text, prompt_ids in zip(texts, ids, strict=True)]
    if texts and ids[0]:
        _note_space(tokenizer, texts[0], ids[0][-1])
    return ids, len(long)


def _shorten(text: str, max_tokens: int, count_tokens: Callable[[str], int]) -> str:
    if isinstance(text, ChatPrompt):
        return text.shortened(max_tokens, count_tokens)
    return prompts.shorten(text, max_tokens, count_tokens)


def begin(text: str, ids: list[int], bos: int) -> list[int]:
    """Return a prompt's ids with BOS in front, once if a chat template has written it already."""
    return ids if isinstance(text, ChatPrompt) and ids[:1] == [bos] else [bos, *ids]


def _note_space(tokenizer: PreTrainedTokenizerBase, prompt: str, last: int) -> None:
    """Log once per process that prompts end in a space which the tokenizer keeps as a token of its own."""
    if _noted or not prompt.endswith(" ") or spelling(tokenizer).data(last) != b" ":
        return
    _noted.append(prompt)
    log.info(
        "prompts end in a space that is a token of its own, after which a pre-trained model predicts worse; "
        "template=chat, if the model has one, avoids it (docs/data.md)"
    )


@dataclass
class TokenizedDataset:
    """Token ids of all examples in flat arrays, one per part.

    Parts are "prompt", "target" and, if the examples have a second answer, "negative". Example i has
    `ids[part][offsets[part][i] : offsets[part][i + 1]]`.
    """

    ids: dict[str, np.ndarray]  # int32, (tokens,)
    offsets: dict[str, np.ndarray]  # int64, (examples + 1,)
    counts: dict[str, int]  # numbers of examples, tokens, and texts that were cut
    key: str = ""  # content hash of texts, tokenizer and lengths; empty if the ids were not cached
    earlier_key: str = ""  # what earlier versions took for the key, if that was something else

    def __len__(self) -> int:
        return len(self.offsets["prompt"]) - 1

    def part(self, name: str, index: int) -> np.ndarray:
        """Return the ids of one part of one example."""
        return self.ids[name][self.offsets[name][index] : self.offsets[name][index + 1]]

    def without_identical_pairs(self) -> TokenizedDataset:
        """Leave out examples whose two answers have the same ids: they state no preference."""
        kept = [
            index
            for index in range(len(self))
            if not np.array_equal(self.part("target", index), self.part("negative", index))
        ]
        if len(kept) == len(self):
            return self
        ids, offsets = {}, {}
        for name in self.ids:
            rows = [self.part(name, index) for index in kept]
            ids[name] = np.concatenate(rows) if rows else self.ids[name][:0]
            offsets[name] = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        counts = self.counts | {"examples": len(kept), "tokens": sum(map(len, ids.values()))}
        key = self.key and fingerprint([self.key, "without identical pairs"])
        return TokenizedDataset(ids, offsets, counts, key)


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    add_bos: bool = False,
) -> TokenizedDataset:
    """Encode prompts and answers separately, so that training sees the prompt ids that decoding sees.

    An answer ends in EOS if both fit into `max_length` minus the prompt. A longer answer is cut and gets no
    EOS, nor does an unfinished one, so that no model learns to stop in mid-sentence.

    Args:
        examples: All with a second answer, or none.
        tokenizer: The tokenizer of the model.
        max_length: Limit of prompt and answer together, in tokens.
        max_prompt_length: Limit of the prompt; see `encode_prompts`.
        add_bos: Begin each prompt with the BOS token.
    """
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int), "a tokenizer without EOS is refused when it is loaded"
    counts: Counter[str] = Counter(examples=len(examples))
    answers = ["target"]
    if examples and examples[0].negative is not None:
        answers.append("negative")
    parts: dict[str, list[list[int]]] = {name: [] for name in ("prompt", *answers)}
    for start in progress(range(0, len(examples), CHUNK), desc="tokenise", unit="k examples"):
        chunk = examples[start : start + CHUNK]
        texts = [example.prompt for example in chunk]
        prompt_ids, cut = encode_prompts(tokenizer, texts, max_prompt_length, add_bos)
        parts["prompt"] += prompt_ids
        counts["prompts_cut"] += cut
        for name in answers:
            answer_ids = encode(tokenizer, [getattr(example, name) for example in chunk])
            for example, prompt, answer in zip(chunk, prompt_ids, answer_ids, strict=True):
                room = max_length - len(prompt)
                ids = answer[:room] if name in example.unfinished else end(answer, room, eos)
                counts[f"{name}s_cut"] += len(ids) <= len(answer) and name not in example.unfinished
                parts[name].append(ids)
    counts["tokens"] = sum(len(ids) for rows in parts.values() for ids in rows)
    flat_ids = {}
    offsets = {}
    for name, rows in parts.items():
        flat_ids[name] = np.array([token for ids in rows for token in ids], dtype=np.int32)
        offsets[name] = np.cumsum([0] + [len(ids) for ids in rows], dtype=np.int64)
    return TokenizedDataset(flat_ids, offsets, dict(counts))


def end(answer_ids: list[int], room: int, eos: int) -> list[int]:
    """Return an answer with EOS, or its first `room` tokens without EOS if both do not fit."""
    return [*answer_ids, eos] if len(answer_ids) < room else answer_ids[:room]


def tokenize_cached(
    examples: Sequence[Example], name: str, tokenizer: PreTrainedTokenizerBase, settings: Any
) -> TokenizedDataset:
    """Tokenise examples, or read the result from output_dir/cache if nothing that determines it changed.

    Args:
        examples: See `tokenize`.
        name: Readable part of the cache file's name.
        tokenizer: The tokenizer of the model.
        settings: Has output_dir, max_length, max_prompt_length and add_bos.
    """
    text = hashlib.sha256()
    for example in examples:
        text.update(repr((example.prompt, example.target, example.negative)).encode())
        text.update(repr(example.unfinished).encode() if example.unfinished else b"")
        if isinstance(example.prompt, ChatPrompt):  # its marks have other ids than the same text without
            text.update(repr(("chat", example.prompt.own)).encode())
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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash that is equal if two tokenizers give the same ids and have the same BOS and EOS."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # written in Python: its class and its ids
        facts = [type(tokenizer).__name__, tokenizer.get_vocab(), str(tokenizer.init_kwargs)]
        return fingerprint([*facts, tokenizer.bos_token_id, tokenizer.eos_token_id])
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # set by the last call, no property of the tokenizer
        backend.pop(state, None)
    return fingerprint([backend, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _write_cache(path: Path, data: TokenizedDataset) -> None:
    from safetensors.numpy import save_file

    metadata = {key: str(count) for key, count in data.counts.items()} | {DIGEST: _digest(data)}
    with replacing(path) as partial:
        save_file(_arrays(data), partial, metadata=metadata)


def _arrays(data: TokenizedDataset) -> dict[str, np.ndarray]:
    arrays = {f"ids.{name}": array for name, array in data.ids.items()}
    return arrays | {f"offsets.{name}": array for name, array in data.offsets.items()}


def _digest(data: TokenizedDataset) -> str:
    digest = hashlib.sha256(fingerprint(data.counts).encode())
    for name, array in sorted(_arrays(data).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_cache(path: Path) -> TokenizedDataset | None:
    """Read a cache file; None if it was changed or cut short, or is of a version that wrote no digest."""
    from safetensors import SafetensorError, safe_open

    ids: dict[str, np.ndarray] = {}
    offsets: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, name = key.split(".", 1)
                (ids if kind == "ids" else offsets)[name] = file.get_tensor(key)
            metadata = dict(file.metadata())
        digest = metadata.pop(DIGEST)
        data = TokenizedDataset(ids, offsets, {key: int(count) for key, count in metadata.items()})
        if digest == _digest(data):
            return data
    except (SafetensorError, ValueError, TypeError, KeyError):
        pass
    log.warning(f"{path} is damaged or of an earlier version; tokenising again")
    return None
