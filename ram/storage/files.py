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
from ram.storage.json_text import BadJSON, dumps, elements, finite, is_unicode, loads

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
    rows = []
    for index, row, where in _parse(path, bad):
        if reason := _defect(row, types):
            bad.add(where, reason)
        else:
            rows.append((index, row))
    if not rows:
        raise UserError(
            f"{path}: no usable record; expected at least one with {', '.join(required) or 'fields'}"
        )
    return rows


def usable(
    rows: Iterable[tuple[int, Any]], types: dict[str, type], name: str, bad: BadRows
) -> list[tuple[int, dict]]:
    """Return the rows of another source than a file that have the fields `types`; `bad` gets the others.

    Args:
        rows: (0-based index, row).
        types: field -> type.
        name: of the source, for messages.
        bad: collects the rows that cannot be used.
    """
    kept = []
    for index, row in rows:
        reason = _defect(row, types)
        if not reason and not all(is_unicode(row[key]) for key, kind in types.items() if kind is str):
            reason = "a text has an unpaired surrogate, which is not valid Unicode"
        if reason:
            bad.add(f"{name}, row {index}", reason)
        else:
            kept.append((index, row))
    return kept


def _parse(path: Path, bad: BadRows) -> list[tuple[int, Any, str]]:
    """Parse a file into (0-based index, value, place for messages)."""
    try:
        with open_text(path) as file:
            if ".jsonl" in path.suffixes:
                places = ((index, line, f"{path}, line {index + 1}") for index, line in enumerate(file))
                return _parse_each(places, bad)
            text = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file truncated?") from None
    try:
        data = loads(text)
    except BadJSON as error:
        if not error.line:  # some rows are beyond the bounds: find out which
            texts = enumerate(elements(text))
            return _parse_each(((index, row, f"{path}, row {index}") for index, row in texts), bad)
        lines = text.split("\n")
        if error.line > 1 and _is_object(lines[0]):  # JSON Lines under another name
            return _parse_each(
                ((index, line, f"{path}, line {index + 1}") for index, line in enumerate(lines)), bad
            )
        raise UserError(f"{path}, line {error.line}: {error}; is the file truncated?") from None
    if not isinstance(data, list):
        raise UserError(f"{path}: expected a JSON list of records, got a {type(data).__name__}")
    return [(index, row, f"{path}, row {index}") for index, row in enumerate(data)]


def _parse_each(places: Iterable[tuple[int, str, str]], bad: BadRows) -> list[tuple[int, Any, str]]:
    """Parse rows one by one, given as (index, text, place); an empty text is no row."""
    rows: list[tuple[int, Any, str]] = []
    for index, text, where in places:
        if not text.strip():
            continue
        try:
            rows.append((index, loads(text), where))
        except BadJSON as error:
            column = f" at column {error.column})" if error.column else ""
            bad.add(where, f"{str(error).removesuffix(')')}{column}" if column else str(error))
    return rows


def _is_object(line: str) -> bool:
    try:
        return isinstance(loads(line), dict)
    except BadJSON:
        return False


def _defect(row: Any, types: dict[str, type]) -> str | None:
    """Return why a row cannot be used, or None if it can."""
    if not isinstance(row, dict):
        return f"expected a record (a JSON object), got a {type(row).__name__}"
    for name, kind in types.items():
        value = row.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = "text" if kind is str else f"a {kind.__name__}"
            return f"field {name!r} is missing or not {expected} (fields: {', '.join(row) or 'none'})"
    return None


def count_lines(path: Path) -> int:
    with open_text(path) as file:
        return sum(1 for _ in file)


def how_to_get(path: Path) -> str:
    """Return the advice for a missing data file: the command that creates it."""
    if "_sampling_" in path.name:
        return "the sample stage writes it: run train.py with stages=[sample] first"
    if not {"train", "test"} & {path.parent.name, path.parent.parent.name}:  # a user's own file
        return "check its path"
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
def only_run(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep a second run from writing the same files.

    The first process of a run holds a lock on `path`. The system releases it when that process ends, however
    it ends, so a lock is never stale. On a file system without locks nothing is checked.

    Args:
        path: The file to write.
        wait: Wait for the other run instead of refusing this one.

    Raises:
        UserError: If another run holds the lock, unless `wait` is set.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        with contextlib.suppress(Timeout) if wait else contextlib.nullcontext():
            lock.acquire(timeout=0)
        if not lock.is_locked:
            log.info(f"waiting for another run that writes {path}")
            lock.acquire(poll_interval=1)
    except Timeout:
        raise UserError(f"{path}: another run is writing it; wait for it, or stop it first") from None
    except OSError as error:
        # A folder that cannot be written needs no lock: finished work is read, other work fails by itself.
        if error.errno not in (*NO_LOCKS, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        log.debug(f"{path}: not locked ({error})")
    try:
        yield
    finally:
        # Removed before the release, so that a run that has already opened the file does not take its lock.
        with contextlib.suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, dumps(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(dumps(row) + "\n" for row in rows)


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Write one line per row; columns are the keys of all rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises UserError if it is missing, malformed or beyond the bounds of `loads`."""
    try:
        return loads(Path(path).read_bytes())
    except BadJSON as error:
        raise UserError(f"{path}{f', line {error.line}' if error.line else ''}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(before: dict, now: dict) -> str:
    """List the keys whose values differ, as `key: old -> new, ...`."""
    before, now = finite(before), finite(now)  # as they are stored
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {short(before.get(key))} -> {short(now.get(key))}" for key in changed)


def short(value: Any) -> str:
    """Format a value for a message; a long one, such as a fingerprint, is cut to 12 characters."""
    text = str(value)
    return f"{text[:12]}…" if len(text) > 60 else text


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
