"""Files on disk: validated row reading, atomic replacement, fingerprints, locks."""

import contextlib
import csv
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ram.errors import UserError
from ram.log import log

HOST = socket.gethostname()
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without locks


class BadRows:
    """A collection of unusable rows; raises at the first one unless `on_bad_row` is "skip"."""

    def __init__(self, on_bad_row: str = "error") -> None:
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row={on_bad_row!r}: expected 'error' or 'skip'")
        self.skip = on_bad_row == "skip"
        self.rows: list[dict[str, str]] = []
        self._seen: set[tuple[str, str]] = set()

    def add(self, where: str, reason: str) -> None:
        """Record one bad row, or raise UserError if bad rows are not skipped.

        Args:
            where: File and line (or row index) for the message.
            reason: Why the row cannot be used.
        """
        if not self.skip:
            raise UserError(f"{where}: {reason}; fix the row, or set on_bad_row=skip to leave such rows out")
        # The training and the held-out split may read the same file; count its rows once.
        if (where, reason) not in self._seen:
            self._seen.add((where, reason))
            self.rows.append({"where": where, "reason": reason})

    def report(self, path: Path) -> None:
        """Write the skipped rows to `path` and log their number; do nothing if there are none."""
        if self.rows:
            write_jsonl(path, self.rows)
            log.warning(f"skipped {len(self.rows)} bad rows, listed in {path}")


def open_text(path: Path) -> IO[str]:
    """Open a plain or gzipped UTF-8 file for reading; a byte order mark is dropped."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def read_rows(
    path: str | Path, required: Sequence[str] | dict[str, type] = (), bad: BadRows | None = None
) -> list[tuple[int, dict]]:
    """Read the records of a .json list or .jsonl file, either of them optionally gzipped.

    Args:
        path: The file.
        required: Fields that every record must have: a sequence of text fields, or field -> type.
        bad: Collects the rows that cannot be used. By default the first one raises.

    Returns:
        (0-based index in the file, record) for each usable row. Skipped rows keep their index, so the
        ids of the other rows do not change.

    Raises:
        UserError: If the file is missing, malformed, truncated or has no usable record, or if a row is
            bad and `bad` does not skip it. The message names the file and the line.
    """
    path = Path(path)
    bad = bad or BadRows()
    types: dict[str, type] = required if isinstance(required, dict) else dict.fromkeys(required, str)
    if not path.is_file():
        raise UserError(f"no such file: {path}; {how_to_get(path)}")
    usable = []
    for index, row, where in _parse(path, bad):
        reason = _defect(row, types)
        if reason:
            bad.add(where, reason)
        else:
            usable.append((index, row))
    if not usable:
        raise UserError(
            f"{path}: no usable record; expected at least one with {', '.join(required) or 'fields'}"
        )
    return usable


def _parse(path: Path, bad: BadRows) -> list[tuple[int, Any, str]]:
    """Parse a file into (0-based index, value, place for messages)."""
    rows: list[tuple[int, Any, str]] = []
    try:
        with open_text(path) as file:
            if ".jsonl" not in path.suffixes:
                data = json.load(file)
                if not isinstance(data, list):
                    raise UserError(f"{path}: expected a JSON list of records, got a {type(data).__name__}")
                return [(index, row, f"{path}, row {index}") for index, row in enumerate(data)]
            for line_number, line in enumerate(file, start=1):
                where = f"{path}, line {line_number}"
                if not line.strip():
                    continue
                try:
                    rows.append((line_number - 1, json.loads(line), where))
                except json.JSONDecodeError as error:
                    bad.add(where, f"not valid JSON ({error.msg} at column {error.colno})")
    except json.JSONDecodeError as error:
        message = f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file truncated?"
        raise UserError(message) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file truncated?") from None
    return rows


def _defect(row: Any, types: dict[str, type]) -> str | None:
    """Return why a row cannot be used, or None if it can."""
    if not isinstance(row, dict):
        return f"expected a record (a JSON object), got a {type(row).__name__}"
    for name, kind in types.items():
        if not isinstance(row.get(name), kind):
            expected = "text" if kind is str else f"a {kind.__name__}"
            return f"field {name!r} is missing or not {expected} (fields: {', '.join(row) or 'none'})"
    for name, kind in types.items():
        if kind is str and not _is_unicode(row[name]):
            return f"field {name!r} has an unpaired surrogate, which is not valid Unicode text"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def count_lines(path: Path) -> int:
    with open_text(path) as file:
        return sum(1 for _ in file)


def how_to_get(path: Path) -> str:
    """Return the advice for a missing data file: the command that creates it."""
    if "_sampling_" in path.name:
        return "the sample stage writes it: run train.py with stages=[sample] first"
    return "create the data files with `bash bin/prepare_data.sh`, or check data_dir"


@contextlib.contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Put `path` into an OSError that names no file, such as that of a full disk.

    safetensors turns such an OSError into an exception of its own; it becomes an OSError again.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replace a file or folder as a whole: yield a temporary path and rename it over `path` at the end.

    If the block raises, `path` keeps its old content. A folder cannot be renamed over another one, so
    the old folder is renamed first; if the process is killed between the two renames, the next call
    for the same path restores it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path)
    # Host and process id are part of the names: two writers of one path must not share them.
    prefix = f".{path.name}.{HOST}.{os.getpid()}"
    partial = path.with_name(f"{prefix}.partial")
    old = path.with_name(f"{prefix}.old")
    try:
        with path_in_errors(path):
            yield partial
            if partial.is_dir() and os.path.lexists(path):
                os.rename(path, old)
            os.replace(partial, path)
    finally:
        _clean_up(path)


def _clean_up(path: Path) -> None:
    """Remove the leftovers of this process and of dead ones beside `path`.

    If `path` itself is missing, an old folder is restored instead of removed.
    """
    leftover = re.compile(re.escape(f".{path.name}.{HOST}.") + r"(\d+)\.(partial|old)")
    for sibling in path.parent.iterdir():
        match = leftover.fullmatch(sibling.name)
        if match is None or _is_another_process(int(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(path):
            os.rename(sibling, path)
        else:
            _remove(sibling)


def _is_another_process(pid: int) -> bool:
    """Return whether `pid` is a live process other than this one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, but belongs to another user
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, why: str, quiet: bool = False) -> None:
    """Rename a file or folder to NAME.old, replacing an earlier one, and log why."""
    old = path.with_name(f"{path.name}.old")
    _remove(old)
    os.rename(path, old)
    if not quiet:
        log.info(f"{path}: {why}; kept as {old.name} and created again")


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Keep a second run from writing the same files.

    The first process of a run holds a lock on `path`. The system releases it when that process ends, however
    it ends, so a lock is never stale. On a file system without locks nothing is checked.

    Raises:
        UserError: If another run holds the lock.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{path}: another run is writing it; wait for it, or stop it first") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.debug(f"{path}: not locked ({error})")
    try:
        yield
    finally:
        # Removed before the release, so that a run that has already opened the file does not take its lock.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Write one line per row; columns are the keys of all rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises UserError if it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(before: dict, now: dict) -> str:
    """List the keys whose values differ, as `key: old -> new, ...`."""
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {short(before.get(key))} -> {short(now.get(key))}" for key in changed)


def short(value: Any) -> str:
    """Format a value for a message; a long one, such as a fingerprint, is cut to 12 characters."""
    text = str(value)
    return f"{text[:12]}…" if len(text) > 60 else text


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
