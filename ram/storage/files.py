"""Records on disk: rows read with the line of what is wrong, files replaced at once, fingerprints, locks."""

import contextlib
import csv
import errno
import fcntl
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
from typing import Any

from safetensors import SafetensorError

from ram.errors import UserError
from ram.log import log

HOST = socket.gethostname()


class BadRows:
    """Counts and keeps rows that cannot be used; raises at the first one unless told to skip them."""

    def __init__(self, on_bad_row: str = "error") -> None:
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row={on_bad_row!r}: expected 'error' or 'skip'")
        self.skip, self.rows, self._seen = on_bad_row == "skip", [], set()

    def add(self, where: str, reason: str) -> None:
        if not self.skip:
            raise UserError(f"{where}: {reason}; mend the row, or set on_bad_row=skip to leave such rows out")
        if (where, reason) not in self._seen:  # training and held-out part may come from one file, read twice
            self._seen.add((where, reason))
            self.rows.append({"where": where, "reason": reason})

    def report(self, path: Path) -> None:
        """Writes the list beside the run and says how many; nothing where there are none."""
        if self.rows:
            write_jsonl(path, self.rows)
            log.warning(f"skipped {len(self.rows)} bad rows, listed in {path}")


def open_text(path: Path):
    """A text file for reading, gzipped or not; the mark that some editors put before UTF-8 is dropped."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def read_rows(
    path: str | Path, required: Sequence[str] | dict[str, type] = (), bad: BadRows | None = None
) -> list[tuple[int, dict]]:
    """Records of a .json list or .jsonl file (either may be gzipped) with their 0-based index in the file.

    required: the fields a record must have, as text, or field -> type.
    Raises UserError with file and line for what is missing, malformed, cut short, lacks a required field or
    is empty. A row that `bad` skips keeps its index: the ids of the others do not move.
    """
    path, bad = Path(path), bad or BadRows()
    types = required if isinstance(required, dict) else dict.fromkeys(required, str)
    if not path.is_file():
        raise UserError(f"no such file: {path}; {how_to_get(path)}")
    rows: list[tuple[int, Any, str]] = []
    try:
        with open_text(path) as file:
            if ".jsonl" in path.suffixes:
                for line_number, line in enumerate(file, start=1):
                    where = f"{path}, line {line_number}"
                    if not line.strip():
                        continue
                    try:
                        rows.append((line_number - 1, json.loads(line), where))
                    except json.JSONDecodeError as error:
                        bad.add(where, f"not valid JSON ({error.msg} at column {error.colno})")
            else:
                data = json.load(file)
                if not isinstance(data, list):
                    raise UserError(f"{path}: expected a JSON list of records, found a {type(data).__name__}")
                rows = [(index, row, f"{path}, row {index}") for index, row in enumerate(data)]
    except json.JSONDecodeError as error:
        message = f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file cut short?"
        raise UserError(message) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is the file cut short?") from None

    good = []
    for index, row, where in rows:
        missing = [
            k for k, kind in types.items() if not isinstance(row, dict) or not isinstance(row.get(k), kind)
        ]
        if not isinstance(row, dict):
            bad.add(where, f"expected a record (fields in braces), found a {type(row).__name__}")
        elif missing:
            wanted = "text" if types[missing[0]] is str else f"a {types[missing[0]].__name__}"
            found = ", ".join(row) or "none"
            bad.add(where, f"field {missing[0]!r} is missing or not {wanted} (fields found: {found})")
        elif unpaired := [k for k, kind in types.items() if kind is str and not _is_unicode(row[k])]:
            bad.add(where, f"field {unpaired[0]!r} holds half a surrogate pair, which is no text")
        else:
            good.append((index, row))
    if not good:
        raise UserError(
            f"{path}: holds no usable record; expected at least one with {', '.join(required) or 'fields'}"
        )
    return good


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
    """Who makes a data file that is not there."""
    if "_sampling_" in path.name:
        return "the sample stage writes it: run train.py with stages=[sample] first"
    return "`bash bin/prepare_data.sh` makes the data files, or check data_dir"


@contextlib.contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Has an OSError name `path` where it names no file: a full disk's, and what safetensors makes of one."""
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
    """Gives a path beside `path` to write to, and renames it over `path` only when the block ends well.

    Works for a file and for a folder; what was at `path` stands until the rename. A folder is renamed aside
    first: where a kill came between both renames, the next call for the same path puts it back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path)
    # Host and process are part of the name: two that write the same file must not take each other's.
    aside, old = (path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        with path_in_errors(path):
            yield aside
            if aside.is_dir() and os.path.lexists(path):
                os.rename(path, old)
            os.replace(aside, path)
    finally:
        _tidy(path)


def _tidy(path: Path) -> None:
    """Clears what this process, or one that is no longer alive, left beside `path`; puts an old folder back
    where nothing has taken its place.
    """
    leftover = re.compile(re.escape(f".{path.name}.{HOST}.") + r"(\d+)\.(partial|old)")
    for found in path.parent.iterdir():
        match = leftover.fullmatch(found.name)
        if match is None or _is_another_process(int(match[1])):
            continue
        if match[2] == "old" and not os.path.lexists(path):
            os.rename(found, path)
        else:
            _remove(found)


def _is_another_process(pid: int) -> bool:
    """Whether a process other than this one has that id and lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return pid != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, why: str, quiet: bool = False) -> None:
    """Renames a file or folder to NAME.old, in place of an earlier one, and says why."""
    old = path.with_name(f"{path.name}.old")
    _remove(old)
    os.rename(path, old)
    if not quiet:
        log.info(f"{path}: {why}; kept as {old.name} and made anew")


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Keeps a second run from writing what this one writes; raises UserError where one already does.

    The first of several processes holds the lock. The system gives it back when that process ends, however it
    ends, so none is ever stale.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another run is writing it; wait for it, or stop it first") from None
            except OSError as error:  # a file system without locks
                log.debug(f"{path}: not locked ({error})")
            if not _is_open(file, lock):  # whoever had it before has just removed it
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_open(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    with replacing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """One line per row; the columns are the keys of all rows in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: str | Path) -> Any:
    """The value of a JSON file; raises UserError where there is none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file") from None


def fingerprint(value: Any) -> str:
    """Content hash of a JSON-like value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(before: dict, now: dict) -> str:
    """The keys that differ between two settings, as `key: old -> new`."""
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    return ", ".join(f"{key}: {short(before.get(key))} -> {short(now.get(key))}" for key in changed)


def short(value: Any) -> str:
    """A value for a message; of a fingerprint its first characters."""
    text = str(value)
    return f"{text[:12]}…" if len(text) > 60 else text


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
