"""Records of the inputs of files, so that a changed setting never reuses an old result.

A `Manifest` answers whether outputs are whole and made from given inputs. Each kind of output keeps its own
format on disk:

    FILE.meta.json   answers, samples, judgements, token-level figures   (this module)
    done.json        a finished training run                             (ram/models/run_folder.py)
    state.json       a training state to resume from                     (ram/training/resume.py)
    world.json       the toy data set                                    (ram/data/toy_world.py)
    report.json      an evaluation's report                              (ram/evaluation/report/gather.py)
"""

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ram.errors import UserError
from ram.log import log
from ram.storage.files import differences, file_sha256, replacing, set_aside
from ram.storage.json_text import dumps, loads
from ram.storage.records import read_record, write_record

Inputs = dict[str, Any] | str  # settings and fingerprints by name, or one fingerprint of all of them


@dataclass(frozen=True)
class Manifest:
    """The inputs that some files were made from, and the digest of each file by name."""

    made_from: Inputs
    files: dict[str, str]

    def changes(self, made_from: Inputs, earlier: Inputs | None = None) -> str:
        """Return the inputs that differ as `key: old -> new`, empty if none does.

        Args:
            made_from: the present inputs.
            earlier: what an earlier version would have recorded for them, which counts as equal.
        """
        recorded, now = loads(dumps(self.made_from)), loads(dumps(made_from))
        if recorded == now:
            return ""
        if earlier is not None and recorded == loads(dumps(earlier)):
            log.info("made by an earlier version, which identified the same inputs in another way: accepted")
            return ""
        if isinstance(self.made_from, str) or isinstance(made_from, str):
            return "settings, weights or rows"
        return differences(self.made_from, made_from)

    def damaged(self, digest: Callable[[str], str | None], names: Iterable[str] | None = None) -> list[str]:
        """Return the files that are missing or have another digest.

        Args:
            digest: returns the present digest of a file by its name, None if it is missing.
            names: the files to check, all by default.
        """
        return [name for name in (self.files if names is None else names) if digest(name) != self.files[name]]


def completed(
    settings: dict[str, Any], current: dict[str, Any], introduced: dict[str, Any]
) -> dict[str, Any]:
    """Return recorded settings with the keys that are younger than the record.

    Args:
        settings: as recorded, by dotted key.
        current: the settings to compare with; only their keys are added.
        introduced: younger keys, with the values that results had before the keys existed.
    """
    return {key: value for key, value in introduced.items() if key in current} | settings


def read_manifest(path: Path, made_from: str, files: str, remedy: str) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest in a record, and the whole record.

    Args:
        path: a JSON file.
        made_from: the record's key for the inputs.
        files: the record's key for the digests.
        remedy: what a user can do about a damaged record.

    Raises:
        UserError: if the file cannot be read or lacks a key.
    """
    record = read_record(path, {made_from: dict | str, files: dict}, remedy)
    return Manifest(record[made_from], record[files]), record


# ---- digests -----------------------------------------------------------------------------------------------

DIGESTS = ".digests.json"
LARGE = 1 << 26  # bytes; smaller files are read at each check


def digests_in(folder: Path, digest: Callable[[Path], str] = file_sha256) -> Callable[[str], str | None]:
    """Return a function for `Manifest.damaged` that reads files by their names in a folder."""
    return lambda name: digest(folder / name) if (folder / name).is_file() else None


def cached_sha256(path: Path) -> str:
    """Return a file's sha256; a large file is not read again until its size, time or inode changes.

    Digests of large files are kept in `.digests.json` beside them, if the folder can be written.
    """
    status = path.stat()
    if status.st_size < LARGE:
        return file_sha256(path)
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    cache = path.with_name(DIGESTS)
    known: dict[str, Any] = {}
    if cache.is_file():
        with contextlib.suppress(UserError):  # damaged: made again
            known = read_record(cache, {}, "")
    kept = known.get(path.name)
    if isinstance(kept, dict) and kept == key | {"sha256": kept.get("sha256")}:
        return str(kept["sha256"])
    digest = file_sha256(path)
    with contextlib.suppress(OSError):
        write_record(cache, known | {path.name: key | {"sha256": digest}})
    return digest


# ---- marked files ------------------------------------------------------------------------------------------


def marker(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def read_marker(path: Path) -> Manifest:
    """Return the manifest of a marked file and of the files that are marked with it."""
    return read_manifest(marker(path), "made_from", "sha256", "overwrite=true remakes both files")[0]


def finished(
    path: Path, made_from: Inputs, overwrite: bool, label: str, earlier: Inputs | None = None
) -> bool:
    """Return whether `path` is complete and made from these inputs.

    A file that was made from other inputs is set aside. One without a marker is the user's own and counts as
    finished.

    Args:
        path: the file.
        made_from: everything that decides its contents.
        overwrite: make it again in any case.
        label: what is being made, for the log.
        earlier: see `Manifest.changes`.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.is_file() or overwrite:
        return False
    if not marker(path).is_file():
        log.info(f"{label}: {path} was not made here and is used as it is (overwrite=true makes it anew)")
        return True
    manifest = read_marker(path)
    if changed := manifest.changes(made_from, earlier):
        names = [path.name, *(name for name in manifest.files if name != path.name)]
        # The marker is last: a file without one would count as the user's own after a kill.
        for other in (*map(path.with_name, names), marker(path)):
            if other.is_file():
                set_aside(other, f"made from other inputs ({changed})", quiet=other != path)
        return False
    check_whole(path, manifest, label)
    log.info(f"{label}: done before, {path}")
    return True


def check(path: Path, made_from: Inputs, label: str, earlier: Inputs | None = None) -> None:
    """Verify a file that is only read. Without a marker it may have been brought from elsewhere."""
    if marker(path).is_file():
        verify(path, made_from, label, earlier)
    elif path.is_file():
        log.info(f"{label}: {path} was not made here and is used as it is")


def verify(path: Path, made_from: Inputs, label: str, earlier: Inputs | None = None) -> None:
    """Raise UserError if a marked file was made from other inputs or is damaged."""
    manifest = read_marker(path)
    if changed := manifest.changes(made_from, earlier):
        raise UserError(
            f"{label}: {path} was made from other inputs ({changed}); run the step that makes it again"
        )
    check_whole(path, manifest, label)


def check_whole(path: Path, manifest: Manifest, label: str) -> None:
    """Raise UserError if a file of the manifest is missing or not as it was written."""
    if damaged := manifest.damaged(digests_in(path.parent)):
        raise UserError(
            f"{label}: {path.with_name(damaged[0])} was changed or cut short after it was written; set "
            "overwrite=true to remake it"
        )


def is_made_from(path: Path, inputs: str, earlier: str | None = None) -> bool:
    """Return whether a marked file exists, is whole, and was made from these inputs."""
    if not (path.is_file() and marker(path).is_file()):
        return False
    try:
        verify(path, inputs, path.name, earlier)
    except UserError:
        return False
    return True


def write_marked(
    path: Path, rows: Sequence[dict[str, Any]], made_from: Inputs, *beside: Path, **facts: str
) -> None:
    """Write rows as .json or .jsonl, with a marker for this file and the finished files `beside` it.

    The marker is written first: a file without one counts as the user's own, so ours always has one.
    It keeps the `facts` for its readers; they do not decide whether the file is used again.
    """
    with replacing(path) as partial:
        with open(partial, "w", encoding="utf-8") as file:
            if path.suffix == ".json":
                file.write(dumps(list(rows), indent=1))
            else:
                file.writelines(dumps(row) + "\n" for row in rows)
        digests = {path.name: file_sha256(partial)} | {other.name: file_sha256(other) for other in beside}
        write_record(marker(path), {"made_from": made_from, "rows": len(rows), "sha256": digests} | facts)


# ---- the code ----------------------------------------------------------------------------------------------

PROJECT = Path(__file__).resolve().parents[2]


@functools.cache
def commit(folder: Path = PROJECT) -> str:
    """Return the git commit of a checkout, with "+changes" if files differ from it or are new.

    Empty if the folder is not a checkout or git is not installed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:  # a copy inside another project's checkout
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
