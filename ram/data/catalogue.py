"""The catalogue of data sets: names, local files, hub repositories, and reading raw rows."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ram.data import forms, prompts
from ram.data.chat import ChatTemplate, Unrenderable
from ram.data.tokenization import Example
from ram.errors import UserError, nearest
from ram.log import log
from ram.storage.files import BadRows, count_lines, read_rows, usable
from ram.storage.json_text import dumps

# A user's own file as the name of a data set, with the suffixes that may follow it.
OWN_FILE = re.compile(r"(?P<path>(?P<stem>.+)\.jsonl?(?:\.gz)?)(?:_(?P<proposal>.+))?")
VARIANTS = ("aligner_warmup", "aligner_common")
CUT = "sampling_finish_reason"  # field of a sampled row: "length" if the sample was cut at the length limit


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of a loader."""

    part: str  # "train" or "test": the folder under data_dir, or the hub's split
    proposal: str | None  # name of the proposal whose samples become the second answer
    data_dir: Path
    cache_dir: str | None  # the hub client's cache
    bad: BadRows
    chat: ChatTemplate | None = None  # the model's own template; None renders by template `ram`

    def render(self, turns: Sequence[tuple[bool, str]], system: str | None = None) -> str:
        """Return the prompt of a dialogue, see `prompts.render_dialogue`."""
        if self.chat is None:
            return prompts.render_dialogue(turns, system=system)
        return self.chat.render(turns, system)

    def stored_dialogue(self, text: str) -> str:
        """Return the prompt of a dialogue that is stored in template `ram`."""
        if self.chat is None:
            return text
        system, turns = prompts.parse_dialogue(text)
        return self.render(turns, system)


@dataclass(frozen=True)
class Source:
    """The catalogue entry of one data set."""

    load: Callable[[LoadRequest], list[Example]]
    file: str | None = None  # under data_dir/train; sampled variants are named after it
    sampled: bool = True  # whether `NAME_PROPOSAL` exists
    on_hub: bool = False  # whether the hub is used if there are no local files
    test_folder: str | None = None  # under data_dir/{train,test}; None: held-out prompts are split off
    pattern: str = "*.jsonl*"  # file names in test_folder
    correction: str = prompts.CORRECTION  # text after which the Aligner baseline writes its correction

    def has_test_split(self, data_dir: Path) -> bool:
        """Return whether the set has its own test split: local test files, or the hub's if none are local.

        A set with local training files but no local test files has none.
        """
        if self.test_folder is None:
            return False
        train_files = local_files(data_dir / "train" / self.test_folder, self.pattern)
        test_files = local_files(data_dir / "test" / self.test_folder, self.pattern)
        return bool(test_files) or not train_files


def sampled_name(file_name: str, proposal: str | None) -> str:
    """Return `x_sampling_{proposal}.json` for `x.json`, or the name unchanged without a proposal."""
    if not proposal:
        return file_name
    stem, suffix = file_name.split(".", 1)
    return f"{stem}_sampling_{proposal}.{suffix}"


def parse_name(name: str, datasets: Mapping[str, Source]) -> tuple[str, str | None, str | None]:
    """Split a data set's name into (base, proposal, variant); raises UserError if it is unknown.

    Examples: `uc_llama8b_aligner_warmup` -> ("uc", "llama8b", "aligner_warmup"), and for a user's own file
    `my/data.jsonl_llama8b` -> ("my/data.jsonl", "llama8b", None).
    """
    rest = name
    variant = None
    for candidate in VARIANTS:
        if name.endswith(f"_{candidate}"):
            rest = name.removesuffix(f"_{candidate}")
            variant = candidate
    if own := OWN_FILE.fullmatch(rest):
        return own["path"], own["proposal"], variant
    base, _, proposal = rest.partition("_")
    source = datasets.get(base)
    if source is None or rest.endswith("_"):
        variants = "each also as NAME_PROPOSAL and NAME[_PROPOSAL]_aligner_warmup or _aligner_common"
        raise UserError(
            f"unknown data set {name!r}: {nearest(base, datasets)}; {variants}; or the path of a .json or "
            ".jsonl file"
        )
    if proposal and not source.sampled:
        raise UserError(f"data set {name!r}: {base!r} has no sampled variant; drop '_{proposal}'")
    return base, proposal or None, variant


def source_of(base: str, datasets: Mapping[str, Source]) -> Source:
    """Return the catalogue entry of a data set's base name, or of a user's own file."""
    if base in datasets:
        return datasets[base]
    path = Path(base)
    return Source(functools.partial(_load_own_file, path), path.name.removesuffix(".gz"))


def short_name(base: str) -> str:
    """Return how run names spell a data set's base name: a file's name without its ending."""
    own = OWN_FILE.fullmatch(base)
    return Path(own["stem"]).name[:40] if own else base


def _load_own_file(path: Path, request: LoadRequest) -> list[Example]:
    """Load a user's own file, or its sampled variant, in one of the forms of ram/data/forms.py.

    Raises:
        UserError: No row has one of the forms, or a row is unusable and `request.bad` does not skip it.
    """
    own_file = path
    if request.proposal:
        file_name = sampled_name(path.name.removesuffix(".gz"), request.proposal)
        path = request.data_dir / "train" / file_name
    rows = read_rows(path, ("sampling",) if request.proposal else (), request.bad)
    if request.proposal and own_file.is_file():
        _check_sampled(path, rows, own_file)
    if not any(forms.is_known(row) for _, row in rows):
        raise UserError(f"{path}: found the fields {', '.join(rows[0][1])}; expected {forms.ACCEPTED}")
    examples = []
    for index, row in rows:
        if forms.is_text(row) and not request.proposal:
            if not row["text"].strip():
                request.bad.add(f"{path}, record {index + 1}", "text is empty")
                continue
            # A part of a text has no question, and no end that should be learnt.
            examples.append(Example(index, "", row["text"], None, row, ("target",), row["text"]))
            continue
        try:
            dialogue = forms.read(row)
            prompt = request.render(dialogue.turns, dialogue.system)
        except (forms.Unusable, Unrenderable) as reason:
            request.bad.add(f"{path}, record {index + 1}", str(reason))
            continue
        negative = row["sampling"] if request.proposal else dialogue.rejected
        cut = ("negative",) if request.proposal and row.get(CUT) == "length" else ()
        examples.append(Example(index, prompt, dialogue.answer, negative, row, cut, dialogue.question))
    return examples


def _check_sampled(path: Path, rows: list[tuple[int, dict]], own_file: Path) -> None:
    """Raise UserError if sampled rows are not from a user's file; files are named without their folders."""

    def key(row: dict) -> str:
        return dumps({name: value for name, value in row.items() if name not in ("sampling", CUT)})

    known = {key(row) for _, row in read_rows(own_file, (), BadRows("skip"))}
    others = sum(key(row) not in known for _, row in rows)
    if others:
        raise UserError(
            f"{path}: {others} of {len(rows)} rows are not in {own_file}, because it changed or another file "
            "has its name; run the sample stage of this file, or rename it"
        )


def local_file(name: str, data_dir: str | Path, datasets: Mapping[str, Source]) -> Path | None:
    """Return the training file of a data set, or None if its rows may come from other files or the hub."""
    base, proposal, _ = parse_name(name, datasets)
    source = source_of(base, datasets)
    if base not in datasets and not proposal:
        return Path(base)
    if source.on_hub and not proposal:
        return None
    assert source.file is not None, f"data set {base!r} is neither on the hub nor in a file"
    return Path(data_dir) / "train" / sampled_name(source.file, proposal)


def local_or_hub(
    request: LoadRequest,
    folder: str,
    pattern: str,
    hub_id: str,
    required: Sequence[str] | dict[str, type],
    hub_dir: str = "",
) -> list[tuple[int, dict]]:
    """Read rows from data_dir/{part}/{folder}/{pattern}, or from the hub if no such file exists.

    Args:
        request: The part to read and where the data is stored.
        folder: Folder of the local files.
        pattern: Glob pattern of their names.
        hub_id: Repository on the hub.
        required: Fields of every local row, as in `read_rows`.
        hub_dir: Folder in the repository.

    Returns:
        (row id, row): the id counts all rows of all files, bad ones included, so no id depends on
        another row.
    """
    paths = local_files(request.data_dir / request.part / folder, pattern)
    if not paths:
        types: dict[str, type] = required if isinstance(required, dict) else dict.fromkeys(required, str)
        return usable(enumerate(_hub_rows(hub_id, hub_dir, request, folder)), types, hub_id, request.bad)
    rows: list[tuple[int, dict]] = []
    first_id = 0
    for path in paths:
        rows += [(first_id + index, row) for index, row in read_rows(path, required, request.bad)]
        first_id += count_lines(path)
    return rows


def local_files(folder: Path, pattern: str) -> list[Path]:
    """Return matching .jsonl and .jsonl.gz files in order of their names.

    Hidden ones are partial writes of a killed run; others, such as X.jsonl.bak, are copies.

    Raises:
        UserError: If a file is there twice, plain and gzipped.
    """
    visible = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    paths = [path for path in visible if path.name.endswith((".jsonl", ".jsonl.gz"))]
    if len(paths) < len(visible):
        others = ", ".join(path.name for path in visible if path not in paths)
        log.warning(f"{folder}: not read, because only .jsonl and .jsonl.gz files are data: {others}")
    for path in paths:
        if path.with_name(f"{path.name}.gz") in paths:
            raise UserError(
                f"{path} is there twice, plain and as .gz: its rows would count double; remove one"
            )
    return paths


def _hub_rows(hub_id: str, hub_dir: str, request: LoadRequest, folder: str) -> list[dict]:
    import datasets

    local = request.data_dir / request.part / folder
    log.info(f"{hub_id}: no local files in {local}, loading from the hub")
    try:
        data = datasets.load_dataset(
            hub_id, data_dir=hub_dir or None, split=request.part, cache_dir=request.cache_dir
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"{hub_id} ({request.part}) cannot be loaded from the hub ({type(error).__name__}); put its "
            f".jsonl or .jsonl.gz files into {local} (for hh: `bash bin/prepare_data.sh hh --from FILE`)"
        ) from None
    return list(data)  # pyright: ignore[reportArgumentType, reportReturnType]


def hub_cache(local_dirs: Sequence[str]) -> str | None:
    """Return the first existing folder as the hub client's cache, or None for its default."""
    return next((str(path) for path in local_dirs if Path(path).is_dir()), None)
