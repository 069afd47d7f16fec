"""Makes the training and test files below data_dir, from the hub or from local copies of its files.

    python -m ram.data.prepare                                              all four data sets, from the hub
    python -m ram.data.prepare hh --from helpful-base/test.jsonl.gz         local copies of one data set

_data/README.md describes every file. A file that is there already is kept unless --overwrite is given.
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

if __name__ == "__main__":  # Ctrl-C during the seconds that the imports take needs no traceback
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

from ram.data.prompts import split_dialogue
from ram.errors import UserError, pick, run_entry_point
from ram.log import log, progress, setup_logging
from ram.storage import files
from ram.storage.files import BadRows

Row = dict[str, str]


class Skip(Exception):
    """A row that cannot be used; its message is the reason, by which such rows are counted."""


# ---- conversions: one row of a source -> one row of a file -------------------------------------------------


def first_round(row: dict) -> Row:
    """The first question and answer of an UltraChat dialogue, or an instruction with its answer."""
    if isinstance(row.get("data"), list):
        return _pair(row["data"])
    if isinstance(row.get("messages"), list):
        turns = [turn for turn in row["messages"] if isinstance(turn, dict) and turn.get("role") != "system"]
        if [turn.get("role") for turn in turns[:2]] != ["user", "assistant"]:
            raise Skip("does not begin with a user's turn and an assistant's")
        return _pair([turn.get("content") for turn in turns])
    instruction, output = _fields(row, "instruction", "output")
    extra = row.get("input")
    has_extra = isinstance(extra, str) and extra.strip()
    return _pair([f"{instruction}\n{extra}" if has_extra else instruction, output])


def summary(row: dict) -> Row:
    """A TL;DR post with its human summary."""
    names = [pair for pair in (("prompt", "label"), ("prompt", "completion")) if pair[1] in row]
    post, text = _fields(row, *(names or [("instruction", "output")])[0])
    # The prompt will end in "Assistant: ": a completion's own leading space would be a second one.
    return _pair([post, text.removeprefix(" ")])


def comparison(row: dict) -> Row:
    """Two whole dialogues of Anthropic HH, kept as they are."""
    better, worse = _fields(row, "chosen", "rejected")
    if not split_dialogue(better) or not split_dialogue(worse):
        raise Skip("no '\\n\\nAssistant:' in a dialogue")
    return {"chosen": better, "rejected": worse}


def chosen(row: dict) -> Row:
    """A comparison as a test row: the dialogue up to the last answer, and the chosen one as the reference."""
    (prompt, answer), (other, _) = (split_dialogue(text) for text in comparison(row).values())
    if prompt != other:
        raise Skip("chosen and rejected prompts differ")
    return _pair([prompt, answer])


def alpaca(row: dict) -> Row:
    """One of AlpacaEval's own rows, an empty answer included: AlpacaEval looks questions up by position."""
    names = ("dataset", "instruction", "output", "generator")
    return dict(zip(names, _fields(row, *names), strict=True))


def gamed(row: dict) -> Row:
    """One row of AlpacaEval's df_gamed.csv without the columns that its length control does not read."""
    names = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    if not all(name in row for name in names):
        raise Skip(f"not the expected fields (found: {', '.join(map(str, row)) or 'none'})")
    return {name: "" if row[name] is None else str(row[name]) for name in names}


def _fields(row: dict, *names: str) -> list[str]:
    if not all(isinstance(row.get(name), str) for name in names):
        raise Skip(f"not the expected fields (found: {', '.join(map(str, row)) or 'none'})")
    return [row[name] for name in names]


def _pair(turns: Sequence) -> Row:
    if len(turns) < 2 or not all(isinstance(turn, str) and turn.strip() for turn in turns[:2]):
        raise Skip("no question or no answer")
    return {"instruction": turns[0], "output": turns[1]}


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows, in their order: the lowest by a hash of seed and content.

    So the choice depends neither on the order of the rows nor on a random generator's version.
    """
    ranked = sorted(range(len(rows)), key=lambda index: files.fingerprint([seed, rows[index]]))
    return [rows[index] for index in sorted(ranked[:count])]


# ---- what is made of what ----------------------------------------------------------------------------------

SOURCES = {  # name -> repository on the hub, fields that its rows (or a local copy's) may have
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
    """One file below data_dir, and where its rows come from."""

    name: str  # a key of SOURCES
    part: str  # of that data set: what one --from file holds
    source: str  # file, or pattern of files, in the repository
    file: str
    convert: Callable[[dict], Row]
    generator: str | None = None  # who wrote a test file's references; set: TEST_ROWS of the rows are drawn
    limit: int | None = None  # rows that are read


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
    # The answers in this file are gpt4_1106_preview's.
    Target("alpaca", "", "alpaca_eval_gpt4_baseline.json", "test/alpaca_eval_gpt4_baseline.json", alpaca),
    Target("alpaca", "gamed", "df_gamed.csv", "test/alpaca_eval_length_control.csv", gamed),
)


# ---- reading and writing -----------------------------------------------------------------------------------


def hub_rows(target: Target, missing: Iterable[str]) -> Iterator[dict]:
    """Rows of a target's source; where it cannot be had, an error that says how to bring what is missing."""
    repository, _ = SOURCES[target.name]
    # By file, because alpaca_eval's repository has a loading script, which datasets >= 4 refuses. Streaming,
    # because UltraChat has 9 GB and the beginning is enough.
    builder = {".parquet": "parquet", ".csv": "csv"}.get(Path(target.source).suffix, "json")
    files = f"hf://datasets/{repository}/{target.source}"
    try:
        import datasets

        yield from datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"{repository} cannot be read from the hub ({type(error).__name__}); fetch the files from "
            f"https://huggingface.co/datasets/{repository}/tree/main where it can be reached, then: "
            f"python -m ram.data.prepare {target.name} --from {' '.join(dict.fromkeys(missing))}"
        ) from None


def local_rows(paths: Sequence[Path]) -> Iterator[dict]:
    """Rows of local .json, .jsonl, .jsonl.gz, .csv or .parquet files, one file after the other."""
    for path in paths:
        if path.suffix == ".csv":
            try:
                with files.open_text(path) as file:
                    yield from csv.DictReader(file)
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as CSV ({error})") from None
        elif path.suffix == ".parquet":
            import pyarrow.parquet  # comes with datasets; the hub has TL;DR in no other format

            try:
                yield from pyarrow.parquet.read_table(path).to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: cannot be read as parquet ({type(error).__name__})") from None
        else:
            bad = BadRows("skip")
            rows = files.read_rows(path, bad=bad)
            if bad.rows:  # unlike a row without an answer, a sign that the copy is damaged
                raise UserError(f"{bad.rows[0]['where']}: {bad.rows[0]['reason']}; is the file cut short?")
            yield from (row for _, row in rows)


def part_of(name: str, path: Path, split: str | None) -> str:
    """Which part of a data set a local file holds, by its name, its folder and --split."""
    if not path.is_file():
        raise UserError(f"--from {path}: no such file; looked for {path.absolute()}")
    in_name = re.search(r"(?<![a-z])(train|test)", path.name.lower())  # "latest" is no test
    split = split or (in_name and in_name[1])
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
            f"SUBSET/SPLIT.jsonl.gz, where SUBSET is one of {', '.join(HH_SUBSETS)} and SPLIT train or test"
        )
    return f"{subset}/{split}"


def write(target: Target, rows: Iterable[dict], path: Path, seed: int) -> None:
    """Writes a target's file, and says its rows, its checksum and what was left out for which reason."""
    made, skipped, read = [], Counter(), 0
    constants = {"generator": target.generator, "dataset": f"{target.name}/{target.part}"}
    for row in progress(islice(rows, target.limit), total=target.limit, desc=target.file):
        read += 1
        try:
            made.append(target.convert(row) | (constants if target.generator else {}))
            "".join(made[-1].values()).encode()
        except Skip as reason:
            skipped[str(reason)] += 1
        except UnicodeEncodeError:  # half a surrogate pair: JSON can hold it, UTF-8 cannot
            made.pop()
            skipped["text that is not valid Unicode"] += 1
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    if not made:
        expected = SOURCES[target.name][1]
        raise UserError(f"{path}: none of {read:,} rows can be used ({reasons}); expected {expected}")
    kept = draw(made, TEST_ROWS, seed) if target.generator else made
    writers = {".jsonl": files.write_jsonl, ".csv": files.write_csv}
    writers.get(path.suffix, files.write_json)(path, kept)
    notes = [f"{path}: {len(kept):,} rows", f"sha256 {files.file_sha256(path)[:16]}"]
    if target.generator:
        few = f"all that can be used, fewer than {TEST_ROWS}"
        notes.append(few if len(made) < TEST_ROWS else f"drawn from {len(made):,} by seed {seed}")
    if target.limit and read < target.limit:
        notes.append(f"the source has fewer than {target.limit:,}")
    if skipped:
        notes.append(f"skipped {skipped.total():,} of {read:,}: {reasons}")
    log.info(", ".join(notes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepares the data sets that the command line names, from the hub or from local files of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{', '.join(SOURCES)}; none = all")
    add(
        "--from", nargs="+", type=Path, default=[], metavar="FILE", dest="files", help="convert these instead"
    )
    add("--split", choices=("train", "test"), help="what the --from files hold, if their names do not say")
    add("--data-dir", type=Path, default=Path("_data"), help="where the files go (default: _data)")
    add("--seed", type=int, default=0, help="of the 300-row test samples (default: 0)")
    add("--overwrite", action="store_true", help="replace files that are there already")
    args = parser.parse_args(arguments)
    for name in args.names:
        pick(SOURCES, name, "data set")
    if args.files and len(args.names) != 1:
        raise UserError(f"--from converts files of one data set: name it first, one of {', '.join(SOURCES)}")
    if args.split and not (args.files and args.names[0] in ("summ", "hh")):
        raise UserError(f"--split {args.split} says what a --from file of summ or hh holds; leave it out")

    local: dict[str, list[Path]] = {}
    for path in args.files:
        local.setdefault(part_of(args.names[0], path, args.split), []).append(path)
    todo = []
    for target in TARGETS:
        if target.name not in (args.names or SOURCES) or (args.files and target.part not in local):
            continue
        if (args.data_dir / target.file).exists() and not args.overwrite:
            log.info(f"{args.data_dir / target.file}: is there already, kept (--overwrite replaces it)")
        else:
            todo.append(target)
    for index, target in enumerate(todo):
        missing = [later.source for later in todo[index:] if later.name == target.name]
        rows = local_rows(local[target.part]) if args.files else hub_rows(target, missing)
        write(target, rows, args.data_dir / target.file, args.seed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    setup_logging()
    run_entry_point(main)
