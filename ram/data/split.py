"""Split one file of prompts with answers into train.jsonl, heldout.jsonl, test.jsonl and text.jsonl.

    python -m ram.data.split FILE out=FOLDER prompt=prompt answer=label heldout=100 test=345 cut=1000

The first three have rows {instruction, output}; equal prompts stay in one file. text.jsonl has rows {text}
for language modelling: the training rows without their answers, and the rows of the files that
`text=[FILE,FILE]` lists. The other split, of a training set that has no test set, is `heldout_prompts`.
"""

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ram.errors import UserError, pick, run_entry_point
from ram.log import log, setup_logging
from ram.storage.files import read_rows, write_jsonl

TEXTS = {  # field with a row's text, or the first part of it -> its further parts
    "text": (),
    "chosen": (),
    "prompt": ("completion", "output", "label"),
    "instruction": ("input", "completion", "output"),
    "messages": (),
}
SHORT = 40  # characters; a longer prompt inside another text is no chance
DEFAULTS = {
    "out": "",
    "prompt": "instruction",
    "answer": "output",
    "train": "0",  # rows; 0: the rest
    "heldout": "100",
    "test": "300",
    "cut": "0",  # characters that a prompt keeps, whole words; 0: all
    "end": "",  # what follows a prompt's kept part
    "text": "",
    "seed": "0",
}


def cut_text(text: str, size: int) -> str:
    """Return a text's first `size` characters, or fewer so that no word is cut."""
    if size <= 0 or len(text) <= size:
        return text
    kept = text[:size]
    return kept[: kept.rindex(" ")].rstrip() if " " in kept else kept


def pieces(text: str, size: int) -> Iterator[str]:
    """Yield a text in parts of at most `size` characters, cut between words if there are any."""
    while text := text.strip():
        piece = cut_text(text, size or len(text))
        yield piece
        text = text[len(piece) :]


def split(
    rows: Sequence[tuple[str, str]], sizes: dict[str, int], seed: int
) -> dict[str, list[dict[str, str]]]:
    """Deal (prompt, answer) rows to the files, in an order that depends on the seed alone.

    Args:
        rows: the rows; those with one prompt go to one file, so that a file may exceed its size by a few.
        sizes: rows of "test", "heldout" and "train"; 0 takes the rest.
        seed: of the order.

    Raises:
        UserError: there are too few rows.
    """
    groups: dict[str, list[str]] = {}
    for prompt, answer in rows:
        groups.setdefault(prompt, []).append(answer)
    prompts = sorted(groups)
    random.Random(seed).shuffle(prompts)
    waiting = iter(prompts)
    files: dict[str, list[dict[str, str]]] = {}
    for name in ("test", "heldout", "train"):
        files[name] = []
        while not sizes[name] or len(files[name]) < sizes[name]:
            if (prompt := next(waiting, None)) is None:
                break
            files[name] += [{"instruction": prompt, "output": answer} for answer in groups[prompt]]
        if not files[name] or len(files[name]) < sizes[name]:
            raise UserError(
                f"{len(rows)} rows are too few: {len(files[name])} of {sizes[name] or 1} for {name}; "
                "lower train, heldout or test"
            )
    return files


def heldout_prompts(all_prompts: Iterable[str], fraction: float) -> set[str]:
    """Select a fraction of the distinct prompts, those with the smallest hashes.

    If the fraction is above 0, at least one prompt is held out and at least one is left for training.
    """
    if fraction <= 0:
        return set()
    ranked = sorted({(hashlib.sha256(prompt.encode()).digest(), prompt) for prompt in all_prompts})
    count = min(len(ranked) - 1, max(1, round(fraction * len(ranked))))
    return {prompt for _, prompt in ranked[:count]}


def texts_of(row: dict[str, Any]) -> list[str]:
    """Return the text of a row, in any known form, for language modelling; nothing if it has none."""
    for name, rest in TEXTS.items():
        parts = [_content(row.get(key)) for key in (name, *rest)]
        if parts[0]:
            return ["\n\n".join(part for part in parts if part)]
    return []


def _content(value: Any) -> str:
    """Return a field's text, or that of its turns."""
    if isinstance(value, list):
        return "\n\n".join(str(turn.get("content", "")) for turn in value if isinstance(turn, dict))
    return value.strip() if isinstance(value, str) else ""


def _holds(text: str, prompts: Iterable[str]) -> bool:
    """Return whether a text has one of these prompts in it; a short prompt must be its beginning."""
    return any(text.startswith(prompt) or (len(prompt) > SHORT and prompt in text) for prompt in prompts)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    values = dict(DEFAULTS)
    sources = [argument for argument in arguments if "=" not in argument]
    for key, _, value in (argument.partition("=") for argument in arguments if "=" in argument):
        pick(DEFAULTS, key, "key")
        values[key] = value
    if len(sources) != 1 or not values["out"]:
        raise UserError("expected: python -m ram.data.split FILE out=FOLDER [prompt=FIELD answer=FIELD ...]")
    try:
        sizes = {name: int(values[name]) for name in ("train", "heldout", "test")}
        cut, seed = int(values["cut"]), int(values["seed"])
    except ValueError as error:
        raise UserError(f"{error}: train, heldout, test, cut and seed are whole numbers") from None
    prompt, answer, out = values["prompt"], values["answer"], Path(values["out"])
    end = values["end"]
    rows = [
        (cut_text(row[prompt].strip().removesuffix(end.strip()).rstrip(), cut) + end, row[answer].strip())
        for _, row in read_rows(sources[0], (prompt, answer))
    ]
    files: dict[str, list[dict[str, str]]] = split([row for row in rows if all(row)], sizes, seed)
    # Without the answers: a model that has read those of its training rows seems better there than it is.
    texts = [row["instruction"].removesuffix(end) for row in files["train"]]
    held = {row["instruction"].removesuffix(end) for name in ("test", "heldout") for row in files[name]}
    for other in filter(None, values["text"].strip("[]").split(",")):
        found = [text for _, row in read_rows(other.strip()) for text in texts_of(row)]
        kept = [text for text in found if not _holds(text, held)]
        texts += kept
        if left_out := len(found) - len(kept):
            log.info(f"{other.strip()}: {left_out} texts with a prompt of test or heldout left out")
    files["text"] = [{"text": piece} for text in texts for piece in pieces(text, cut)]
    random.Random(seed).shuffle(files["text"])
    for name, lines in files.items():
        write_jsonl(out / f"{name}.jsonl", lines)
    log.info(
        f"wrote    {out}: " + ", ".join(f"{len(lines):,} rows of {name}" for name, lines in files.items())
    )


if __name__ == "__main__":
    setup_logging()
    run_entry_point(lambda: main(sys.argv[1:]))
