"""The catalogue of data sets: names, local files, hub repositories, and reading raw rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ram.data import prompts
from ram.data.tokenization import Example
from ram.errors import UserError, nearest
from ram.log import log
from ram.storage.files import BadRows, count_lines, read_rows, usable

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

    Example: `uc_llama8b_aligner_warmup` -> ("uc", "llama8b", "aligner_warmup").
    """
    rest = name
    variant = None
    for candidate in VARIANTS:
        if name.endswith(f"_{candidate}"):
            rest = name.removesuffix(f"_{candidate}")
            variant = candidate
    base, _, proposal = rest.partition("_")
    source = datasets.get(base)
    if source is None or rest.endswith("_"):
        forms = "each also as NAME_PROPOSAL and NAME[_PROPOSAL]_aligner_warmup or _aligner_common"
        raise UserError(f"unknown data set {name!r}: {nearest(base, datasets)}; {forms}")
    if proposal and not source.sampled:
        raise UserError(f"data set {name!r}: {base!r} has no sampled variant; drop '_{proposal}'")
    return base, proposal or None, variant


def local_file(name: str, data_dir: str | Path, datasets: Mapping[str, Source]) -> Path | None:
    """Return the training file of a data set, or None if its rows may come from other files or the hub."""
    base, proposal, _ = parse_name(name, datasets)
    source = datasets[base]
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
