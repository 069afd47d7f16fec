"""Create the training and test files in data_dir, from the hub or from local copies of its files.

    python -m ram.data.prepare                                              all four data sets, from the hub
    python -m ram.data.prepare hh --from helpful-base/test.jsonl.gz         local copies of one data set

_data/README.md describes every file. Existing files are kept unless --overwrite is given.
"""

import argparse
import csv
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ram import environment

if __name__ == "__main__":
    environment.check()
    # Ctrl-C during the imports, which take seconds, ends without a traceback
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

from ram.data.prompts import split_dialogue
from ram.errors import UserError, pick, run_entry_point
from ram.log import log, progress, setup_logging
from ram.storage import files
from ram.storage.files import BadRows

Row = dict[str, str]


class Skip(Exception):
    """An unusable row; its message is the reason, and rows are counted by reason."""


# ---- conversions: a row of a source -> a row of a file -----------------------------------------------------


def first_round(row: dict[str, Any]) -> Row:
    """Convert an UltraChat dialogue to its first question and answer, or keep an instruction pair."""
    if isinstance(row.get("data"), list):
        return _pair(row["data"])
    if isinstance(row.get("messages"), list):
        turns = [turn for turn in row["messages"] if isinstance(turn, dict) and turn.get("role") != "system"]
        if [turn.get("role") for turn in turns[:2]] != ["user", "assistant"]:
            raise Skip("does not begin with a user turn and an assistant turn")
        return _pair([turn.get("content") for turn in turns])
    instruction, output = _fields(row, "instruction", "output")
    context = row.get("input")
    if isinstance(context, str) and context.strip():
        instruction = f"{instruction}\n{context}"
    return _pair([instruction, output])


def summary(row: dict[str, Any]) -> Row:
    """Convert a TL;DR post with its human summary; the hub's repositories use three sets of field names."""
    if "label" in row:
        names = ("prompt", "label")
    elif "completion" in row:
        names = ("prompt", "completion")
    else:
        names = ("instruction", "output")
    post, text = _fields(row, *names)
    # The rendered prompt ends in "Assistant: ", so a completion's own leading space would be a second one.
    return _pair([post, text.removeprefix(" ")])


def comparison(row: dict[str, Any]) -> Row:
    """Keep two whole dialogues of Anthropic HH unchanged."""
    better, worse = _fields(row, "chosen", "rejected")
    if not split_dialogue(better) or not split_dialogue(worse):
        raise Skip("no '\\n\\nAssistant:' in a dialogue")
    return {"chosen": better, "rejected": worse}


def chosen(row: dict[str, Any]) -> Row:
    """Convert a comparison to a test row: the dialogue as prompt, the chosen last answer as reference."""
    pair = comparison(row)
    better = split_dialogue(pair["chosen"])
    worse = split_dialogue(pair["rejected"])
    assert better is not None and worse is not None, "checked by comparison()"
    if better[0] != worse[0]:
        raise Skip("chosen and rejected prompts differ")
    return _pair(better)


def alpaca(row: dict[str, Any]) -> Row:
    """Keep one of AlpacaEval's rows, even with an empty answer: AlpacaEval finds questions by position."""
    names = ("dataset", "instruction", "output", "generator")
    return dict(zip(names, _fields(row, *names), strict=True))


def gamed(row: dict[str, Any]) -> Row:
    """Keep the columns of AlpacaEval's df_gamed.csv that its length control reads."""
    names = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    if not all(name in row for name in names):
        raise Skip(f"not the expected fields (found: {', '.join(map(str, row)) or 'none'})")
    return {name: "" if row[name] is None else str(row[name]) for name in names}


def _fields(row: dict[str, Any], *names: str) -> list[str]:
    """Return text fields by name; raises Skip if one is missing."""
    if not all(isinstance(row.get(name), str) for name in names):
        raise Skip(f"not the expected fields (found: {', '.join(map(str, row)) or 'none'})")
    return [row[name] for name in names]


def _pair(turns: Sequence[Any]) -> Row:
    if len(turns) < 2 or not all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
        raise Skip("no question or no answer")
    return {"instruction": turns[0], "output": turns[1]}


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Draw at most `count` rows, those with the smallest hashes of seed and content; keep their order.

    The choice depends neither on the order of the rows nor on the version of a random generator.
    """
    ranked = sorted(range(len(rows)), key=lambda index: files.fingerprint([seed, rows[index]]))
    return [rows[index] for index in sorted(ranked[:count])]


# ---- sources and target files ------------------------------------------------------------------------------

SOURCES = {  # name -> repository on the hub, accepted fields of its rows
    # The original release; HuggingFaceH4/ultrachat_200k is a filtered selection of it.
    "uc": ("openbmb/UltraChat", "data (a list of turns), or messages, or instruction and output"),
    "summ": ("CarperAI/openai_summarize_tldr", "prompt and label or completion, or instruction and output"),
    "hh": ("Anthropic/hh-rlhf", "chosen and rejected"),
    "alpaca": (
        "tatsu-lab/alpaca_eval",
        "dataset, instruction, output and generator, or the columns of df_gamed.csv",
    ),
}
HH_SUBSETS = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
TEST_ROWS = 300


@dataclass(frozen=True)
class Target:
    """One file to create in data_dir, and the source of its rows."""

    name: str  # a key of SOURCES
    part: str  # the part of that data set which one --from file holds
    source: str  # file, or pattern of files, in the repository
    file: str  # relative to data_dir
    convert: Callable[[dict[str, Any]], Row]
    generator: str | None = None  # author of the references; if set, TEST_ROWS rows are drawn
    limit: int | None = None  # number of rows to read


TARGETS = (
    Target("uc", "", "train_[01].jsonl", "train/ultrachat_round_one.json", first_round, limit=120_000),
    Target("summ", "train", "data/train-*.parquet", "train/openai_summarize_tldr.jsonl", summary),
    Target(
        "summ", "test", "data/test-*.parquet", "test/openai_summarize_tldr_test_300.json", summary, "human"
    ),
    *(
        Target("hh", f"{name}/{part}", f"{name}/{part}.jsonl.gz", f"{part}/hh/{name}.jsonl", comparison)
        for part in ("train", "test")
        for name in HH_SUBSETS
    ),
    *(
        Target("hh", part, f"{part}.jsonl.gz", f"test/hh_{task}_test_chosen_300.json", chosen, "chosen")
        for task, part in (("helpful", "helpful-base/test"), ("harmless", "harmless-base/test"))
    ),
    # The answers in this file are by gpt4_1106_preview.
    Target("alpaca", "", "alpaca_eval_gpt4_baseline.json", "test/alpaca_eval_gpt4_baseline.json", alpaca),
    Target("alpaca", "gamed", "df_gamed.csv", "test/alpaca_eval_length_control.csv", gamed),
)


# ---- reading and writing -----------------------------------------------------------------------------------


def hub_rows(target: Target, missing: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Stream the rows of a target from the hub.

    Args:
        target: The file to create.
        missing: Source files of this and the remaining targets, for the advice if the hub is unreachable.

    Raises:
        UserError: If the source cannot be read; says how to provide the missing files locally.
    """
    repository, _ = SOURCES[target.name]
    # Read file by file: alpaca_eval's repository has a loading script, which datasets >= 4 refuses. Streamed:
    # UltraChat has 9 GB, and its beginning is enough.
    builder = {".parquet": "parquet", ".csv": "csv"}.get(Path(target.source).suffix, "json")
    files = f"hf://datasets/{repository}/{target.source}"
    try:
        import datasets

        yield from datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"{repository} cannot be read from the hub ({type(error).__name__}); download the files from "
            f"https://huggingface.co/datasets/{repository}/tree/main on another machine, then run: "
            f"python -m ram.data.prepare {target.name} --from {' '.join(dict.fromkeys(missing))}"
        ) from None


def local_rows(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Read the rows of local .json, .jsonl, .jsonl.gz, .csv or .parquet files in order."""
    for path in paths:
        if path.suffix == ".csv":
            try:
                with files.open_text(path) as file:
                    yield from csv.DictReader(file)
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as CSV ({error})") from None
        elif path.suffix == ".parquet":
            import pyarrow.parquet  # installed with datasets; the hub stores TL;DR as parquet only

            try:
                yield from pyarrow.parquet.read_table(path).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None
        else:
            bad = BadRows("skip")
            rows = files.read_rows(path, bad=bad)
            for row in bad.rows:  # malformed rows, unlike rows without an answer, mean a damaged copy
                if row["reason"].startswith(("not valid JSON", "expected a record")):
                    raise UserError(f"{row['where']}: {row['reason']}; is the file truncated?")
                log.warning(f"left out {row['where']}: {row['reason']}")
            yield from (row for _, row in rows)


def part_of(name: str, path: Path, split: str | None) -> str:
    """Determine which part of a data set a local file holds, from its name, its folder and --split."""
    if not path.is_file():
        raise UserError(f"--from {path}: no such file; looked for {path.absolute()}")
    if not split:
        in_name = re.search(r"(?<![a-z])(train|test)", path.name.lower())  # not the end of "latest"
        split = in_name[1] if in_name else None
    if name == "summ":
        return split or "train"
    if name == "alpaca":
        return "gamed" if path.suffix == ".csv" else ""
    if name != "hh":
        return ""
    subset = next((s for s in HH_SUBSETS if s in path.name or s == path.parent.name), None)
    if not split and path.parent.name in ("train", "test"):
        split = path.parent.name
    if not subset or not split:
        raise UserError(
            f"--from {path}: cannot tell which part of hh it holds; name it SUBSET.SPLIT.jsonl.gz or "
            f"SUBSET/SPLIT.jsonl.gz (SUBSET is one of {', '.join(HH_SUBSETS)}; SPLIT is train or test)"
        )
    return f"{subset}/{split}"


def write(target: Target, rows: Iterable[dict[str, Any]], path: Path, seed: int) -> None:
    """Write a target's file; log its number of rows, its checksum, and the skipped rows by reason."""
    usable: list[Row] = []
    skipped: Counter[str] = Counter()
    read = 0
    constants = {}
    if target.generator:
        constants = {"generator": target.generator, "dataset": f"{target.name}/{target.part}"}
    for row in progress(islice(rows, target.limit), total=target.limit, desc=target.file):
        read += 1
        try:
            converted = target.convert(row) | constants
            "".join(converted.values()).encode()
        except Skip as reason:
            skipped[str(reason)] += 1
        except UnicodeEncodeError:  # an unpaired surrogate: allowed in JSON, but not in UTF-8
            skipped["text that is not valid Unicode"] += 1
        else:
            usable.append(converted)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    if not usable:
        expected = SOURCES[target.name][1]
        raise UserError(f"{path}: none of {read:,} rows can be used ({reasons}); expected {expected}")
    kept = draw(usable, TEST_ROWS, seed) if target.generator else usable
    if path.suffix == ".jsonl":
        files.write_jsonl(path, kept)
    elif path.suffix == ".csv":
        files.write_csv(path, kept)
    else:
        files.write_json(path, kept)
    notes = [f"{path}: {len(kept):,} rows", f"sha256 {files.file_sha256(path)[:16]}"]
    if target.generator and len(usable) < TEST_ROWS:
        notes.append(f"all usable rows, fewer than {TEST_ROWS}")
    elif target.generator:
        notes.append(f"drawn from {len(usable):,} with seed {seed}")
    if target.limit and read < target.limit:
        notes.append(f"the source has fewer than {target.limit:,}")
    if skipped:
        notes.append(f"skipped {skipped.total():,} of {read:,}: {reasons}")
    log.info(", ".join(notes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the data sets named on the command line, from the hub or from local files of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(SOURCES)}; default: all")
    add(
        "--from",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        dest="files",
        help="convert these files instead",
    )
    add("--split", choices=("train", "test"), help="split of the --from files, if not in their names")
    add("--data-dir", type=Path, default=Path("_data"), help="output folder (default: _data)")
    add("--seed", type=int, default=0, help="seed of the 300-row test samples (default: 0)")
    add("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args(arguments)
    for name in args.names:
        pick(SOURCES, name, "data set")
    if args.files and len(args.names) != 1:
        raise UserError(f"--from converts files of one data set: name it first, one of {', '.join(SOURCES)}")
    if args.split and not (args.files and args.names[0] in ("summ", "hh")):
        raise UserError(f"--split {args.split} applies only to --from files of summ or hh; leave it out")

    local: dict[str, list[Path]] = {}
    for path in args.files:
        local.setdefault(part_of(args.names[0], path, args.split), []).append(path)
    todo = []
    for target in TARGETS:
        if target.name not in (args.names or SOURCES) or (args.files and target.part not in local):
            continue
        if (args.data_dir / target.file).exists() and not args.overwrite:
            log.info(f"{args.data_dir / target.file}: exists, kept (--overwrite replaces it)")
        else:
            todo.append(target)
    for index, target in enumerate(todo):
        missing = [later.source for later in todo[index:] if later.name == target.name]
        rows = local_rows(local[target.part]) if args.files else hub_rows(target, missing)
        write(target, rows, args.data_dir / target.file, args.seed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)  # pyright: ignore[reportPossiblyUnboundVariable]
    setup_logging()
    run_entry_point(main)
