"""Where data sets are: their names, local files and hub ids, and how raw rows are read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ram.data import prompts
from ram.data.tokenization import Example
from ram.errors import UserError, nearest
from ram.log import log
from ram.storage.files import BadRows, count_lines, read_rows

VARIANTS = ("aligner_warmup", "aligner_common")


@dataclass(frozen=True)
class LoadRequest:
    """What a loader needs to know: which part and whose samples, and where data lies."""

    part: str  # "train" or "test": the folder under data_dir, or the hub's split
    proposal: str | None  # whose samples to use as the second answer
    data_dir: Path
    cache_dir: str | None
    bad: BadRows


@dataclass(frozen=True)
class Source:
    """One data set: its loader, its file, whether proposals may sample it, the folder of its own test
    split.
    """

    load: Callable[[LoadRequest], list[Example]]
    file: str | None = None  # under data_dir/train; what sampled variants are named after
    sampled: bool = True  # whether `NAME_PROPOSAL` exists
    on_hub: bool = False  # whether the hub serves what is not in local files
    test_folder: str | None = None  # under data_dir/{train,test}; None: held-out prompts are split off
    pattern: str = "*.jsonl*"  # of the local files there
    correction: str = prompts.CORRECTION  # what asks the Aligner baseline for a corrected answer

    def has_test_split(self, data_dir: Path) -> bool:
        """Whether the set brings its own test split: not if only its training part lies in local files."""
        if self.test_folder is None:
            return False
        train, test = (
            local_files(data_dir / part / self.test_folder, self.pattern) for part in ("train", "test")
        )
        return bool(test) or not train


def sampled_name(file_name: str, proposal: str | None) -> str:
    """`x.json` -> `x_sampling_{proposal}.json`; unchanged without a proposal."""
    stem, suffix = file_name.split(".", 1)
    return f"{stem}_sampling_{proposal}.{suffix}" if proposal else file_name


def parse_name(name: str, datasets: Mapping[str, Source]) -> tuple[str, str | None, str | None]:
    """`uc_llama8b_aligner_warmup` -> ("uc", "llama8b", "aligner_warmup"); raises UserError if unknown."""
    rest, variant = name, None
    for candidate in VARIANTS:
        if name.endswith(f"_{candidate}"):
            rest, variant = name.removesuffix(f"_{candidate}"), candidate
    base, _, proposal = rest.partition("_")
    source = datasets.get(base)
    if source is None or rest.endswith("_"):
        forms = "each also as NAME_PROPOSAL and NAME[_PROPOSAL]_aligner_warmup or _aligner_common"
        raise UserError(f"unknown data set {name!r}: {nearest(base, datasets)}; {forms}")
    if proposal and not source.sampled:
        raise UserError(f"data set {name!r}: {base!r} has no sampled variant; drop '_{proposal}'")
    return base, proposal or None, variant


def local_file(name: str, data_dir: str | Path, datasets: Mapping[str, Source]) -> Path | None:
    """The one training file of a data set's name; None for a set that may come in other files or from the
    hub.
    """
    base, proposal, _ = parse_name(name, datasets)
    if datasets[base].on_hub and not proposal:
        return None
    return Path(data_dir) / "train" / sampled_name(datasets[base].file, proposal)


def local_or_hub(
    request: LoadRequest,
    folder: str,
    pattern: str,
    hub_id: str,
    required: Sequence[str] | dict[str, type],
    hub_dir: str = "",
) -> list[tuple[int, dict]]:
    """Rows of data_dir/{part}/{folder}/{pattern} where such files lie, else of the hub's data set."""
    local = local_files(request.data_dir / request.part / folder, pattern)
    if not local:
        return list(enumerate(_hub_rows(hub_id, hub_dir, request, folder)))
    found: list[tuple[int, dict]] = []
    before = 0  # rows of the earlier files, the bad ones included: no row's id depends on another row
    for path in local:
        found += [(before + index, row) for index, row in read_rows(path, required, request.bad)]
        before += count_lines(path)
    return found


def local_files(folder: Path, pattern: str) -> list[Path]:
    """Matching files in order of their names; hidden ones are leftovers of a write that was cut, not data."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _hub_rows(hub_id: str, hub_dir: str, request: LoadRequest, folder: str) -> list[dict]:
    import datasets

    local = request.data_dir / request.part / folder
    log.info(f"{hub_id}: no local files in {local}, asking the hub")
    try:
        data = datasets.load_dataset(
            hub_id, data_dir=hub_dir or None, split=request.part, cache_dir=request.cache_dir
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"{hub_id} ({request.part}) cannot be loaded from the hub ({type(error).__name__}); put its "
            ".jsonl or "
            f".jsonl.gz files into {local} (hh: `bash bin/prepare_data.sh hh --from FILE` does it)"
        ) from None
    return list(data)


def hub_cache(local_dirs: Sequence[str]) -> str | None:
    """The first of the folders that exists, as the cache of what comes from the hub; None for its default."""
    return next((str(path) for path in local_dirs if Path(path).is_dir()), None)
