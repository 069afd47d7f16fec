"""Files that say what they were made from, so that a changed setting never reuses an old result.

FILE.meta.json holds the inputs of FILE and the hashes of what was written.
"""

import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ram.errors import UserError
from ram.log import log
from ram.storage.files import differences, file_sha256, read_json, replacing, set_aside, write_json


def marker(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def read_marker(path: Path) -> dict[str, Any]:
    """What a marked file says of itself; raises UserError where its marker is none."""
    meta = read_json(marker(path))
    if not isinstance(meta, dict) or not isinstance(meta.get("made_from"), dict | str):
        raise UserError(
            f"{marker(path)}: no record of what {path.name} was made from; overwrite=true remakes both"
        )
    return meta


def finished(path: Path, made_from: dict[str, Any] | str, overwrite: bool, what: str) -> bool:
    """Whether `path` is complete and made from these inputs; one made from others is set aside.

    Raises UserError where it is no longer what was written.
    """
    if not path.is_file() or overwrite:
        return False
    if not marker(path).is_file():
        log.info(f"{what}: {path} was not made here and is used as it is (overwrite=true makes it anew)")
        return True
    if changed := difference(path, made_from):
        for other in (path, *beside(path), marker(path)):  # the marker last: without it a file is the user's
            if other.is_file():
                set_aside(other, f"made from other inputs ({changed})", quiet=other != path)
        return False
    check_whole(path, what)
    log.info(f"{what}: done before, {path}")
    return True


def check(path: Path, made_from: dict[str, Any] | str, what: str) -> None:
    """`verify`, for a file that is only read and may have been brought from elsewhere."""
    if marker(path).is_file():
        verify(path, made_from, what)
    elif path.is_file():
        log.info(f"{what}: {path} was not made here and is used as it is")


def verify(path: Path, made_from: dict[str, Any] | str, what: str) -> None:
    """Raises UserError where a marked file was made from other inputs, or is no longer what was written."""
    if changed := difference(path, made_from):
        raise UserError(
            f"{what}: {path} was made from other inputs ({changed}); run the step that makes it again"
        )
    check_whole(path, what)


def difference(path: Path, made_from: dict[str, Any] | str) -> str:
    """Which of its inputs are others; empty where none is."""
    before = read_marker(path)["made_from"]
    if before == json.loads(json.dumps(made_from)):
        return ""
    if isinstance(before, str) or isinstance(made_from, str):
        return "settings, weights or rows"
    return differences(before, made_from)


def beside(path: Path) -> list[Path]:
    """The other files that are marked with this one."""
    return [path.with_name(name) for name in read_marker(path)["sha256"] if name != path.name]


def check_whole(path: Path, what: str) -> None:
    for name, digest in read_marker(path)["sha256"].items():
        file = path.with_name(name)
        if not file.is_file() or file_sha256(file) != digest:
            raise UserError(
                f"{what}: {file} was changed or cut short after it was written; set overwrite=true to "
                "remake it"
            )


def is_made_from(path: Path, inputs: str) -> bool:
    """Whether a marked file is there, whole, and made from these inputs."""
    if not (path.is_file() and marker(path).is_file()):
        return False
    try:
        verify(path, inputs, path.name)
    except UserError:
        return False
    return True


def write_marked(
    path: Path, rows: Sequence[dict[str, Any]], made_from: dict[str, Any] | str, *beside: Path
) -> None:
    """Writes rows as .json or .jsonl with a marker of what they, and the files `beside`, were made from.

    The marker comes first: a file without one counts as the user's own, so at no moment may ours be without.
    """
    with replacing(path) as aside:
        with open(aside, "w", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(list(rows), file, indent=1, ensure_ascii=False)
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        digests = {path.name: file_sha256(aside)} | {other.name: file_sha256(other) for other in beside}
        write_json(marker(path), {"made_from": made_from, "rows": len(rows), "sha256": digests})


PROJECT = Path(__file__).resolve().parents[2]


@functools.cache
def commit(folder: Path = PROJECT) -> str:
    """The git commit of a checkout, with "+changes" where files differ from it or are new; empty where the
    folder is no checkout, or there is no git.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder:  # a copy inside somebody else's checkout
            return ""
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
