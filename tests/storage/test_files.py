"""Atomic replacement of files and folders, and reading of rows with precise error messages."""

import csv
import errno
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ram.errors import UserError
from ram.storage import files
from ram.storage.files import BadRows, read_rows, replacing

ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    """List a folder, including hidden files."""
    return sorted(path.name for path in folder.iterdir())


# ---- replacing ---------------------------------------------------------------------------------------------


def write_folder(path, text):
    path.mkdir()
    (path / "weights").write_text(text)


def test_replacing_creates_a_file_and_its_parent_folders(tmp_path):
    """The file appears when the block ends, and no temporary file remains."""
    path = tmp_path / "a" / "b" / "file.txt"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


def test_replacing_exchanges_a_whole_folder(tmp_path):
    """Files that only the old folder had are gone."""
    path = tmp_path / "model"
    write_folder(path, "old")
    (path / "only in the old one").touch()
    with replacing(path) as partial:
        write_folder(partial, "new")
        assert (path / "weights").read_text() == "old"
    assert (path / "weights").read_text() == "new"
    assert names(path) == ["weights"] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failed_write_keeps_the_old_content(tmp_path, kind, error):
    """If the block raises, even KeyboardInterrupt, the old content stays and no partial file remains."""
    path = tmp_path / "thing"
    write = Path.write_text if kind == "file" else write_folder
    write(path, "old")
    with pytest.raises(error), replacing(path) as partial:
        write(partial, "new")
        raise error
    assert (path if kind == "file" else path / "weights").read_text() == "old"
    assert names(tmp_path) == ["thing"]


def test_missing_write_keeps_the_old_content(tmp_path):
    """A block that writes nothing raises instead of creating an empty file."""
    (tmp_path / "thing").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "thing"):
        pass
    assert (tmp_path / "thing").read_text() == "old" and names(tmp_path) == ["thing"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_leftover_of_a_killed_run_is_removed(tmp_path, kind):
    """A partial file or folder of an earlier run never becomes part of the next write."""
    path = tmp_path / "model"
    with replacing(path) as partial:
        leftover = partial
        write_folder(partial, "one")
    if kind == "file":
        leftover.write_text("half")
    else:
        write_folder(leftover, "half")
        (leftover / "more").touch()
    with replacing(path) as partial:
        write_folder(partial, "two")
    assert names(path) == ["weights"] and names(tmp_path) == ["model"]


KILLED = """
import os, sys
from ram.storage import files
def killed(source, target):
    os.kill(os.getpid(), 9)
with files.replacing(sys.argv[1]) as partial:
    partial.mkdir()
    (partial / "weights").write_text("new")
    if sys.argv[2] == "writing":
        killed(0, 0)
    os.replace = killed
"""


@pytest.mark.parametrize("moment", ["writing", "between both renames"])
def test_kill_leaves_one_whole_folder(tmp_path, moment):
    """After a kill at either moment, the next call restores the old folder and removes the rest."""
    path = tmp_path / "model"
    write_folder(path, "old")
    result = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=ROOT)
    assert result.returncode == -9 and len(names(tmp_path)) == 2
    with pytest.raises(ValueError), replacing(path):
        raise ValueError
    assert (path / "weights").read_text() == "old" and names(tmp_path) == ["model"]


def test_partial_files_of_live_processes_are_kept(tmp_path):
    """Files of a live process and of other hosts, whose process ids mean nothing here, are kept."""
    parent, elsewhere = f".x.{files.HOST}.{os.getppid()}.partial", ".x.elsewhere.1.partial"
    (tmp_path / parent).touch(), (tmp_path / elsewhere).touch()
    files.write_json(tmp_path / "x", 1)
    assert names(tmp_path) == sorted([parent, elsewhere, "x"])


def test_full_disk_error_names_the_file(tmp_path):
    """The errors of write calls name no file; `replacing` adds the name."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left (28)")):
        with pytest.raises(OSError, match="No space left") as raised, replacing(tmp_path / "x") as partial:
            partial.touch()
            raise error
        assert raised.value.filename == str(tmp_path / "x") and names(tmp_path) == []


# ---- writing -----------------------------------------------------------------------------------------------


def test_json_is_indented_and_not_escaped(tmp_path):
    """Non-ASCII text is not escaped, the file ends in a newline, and reading returns the value."""
    value = {"b": ["é", "空", None], "a": 1.5}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": [\n    "é",\n    "空",\n    null\n  ],\n  "a": 1.5\n}\n'
    assert files.read_json(tmp_path / "x.json") == value


def test_jsonl_has_one_record_per_line(tmp_path):
    """Line breaks of every kind stay inside their record; rows may come from a generator."""
    rows = [{"text": "a\nb\r\nc"}, {"text": "d\u2028e\x85空"}, {"text": ""}]
    files.write_jsonl(tmp_path / "x.jsonl", (row for row in rows))
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 3
    assert [row for _, row in read_rows(tmp_path / "x.jsonl")] == rows


def test_csv_has_the_columns_of_all_rows(tmp_path):
    """Columns are in order of first appearance; missing values are empty; commas and line breaks survive."""
    files.write_csv(tmp_path / "x.csv", [{"name": 'a,"b"\nc', "n": 1}, {"late": 2.5, "name": "é"}])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "n", "late"], ['a,"b"\nc', "1", ""], ["é", "", "2.5"]]


def test_unserialisable_value_keeps_the_old_file(tmp_path):
    (tmp_path / "x").write_text("old")
    writers = {
        files.write_json: {"a": {1}},
        files.write_jsonl: [{"a": 1}, {1}],
        files.write_csv: [{"a": 1}, 5],
    }
    for write, broken in writers.items():
        with pytest.raises(TypeError):
            write(tmp_path / "x", broken)
        assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_malformed_json_names_file_and_line(tmp_path):
    (tmp_path / "x.json").write_text('{\n"a": 1,\n')
    with pytest.raises(UserError, match=r"x\.json, line 3: not valid JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": "\xff"}', "UTF-8 .*at byte 7"), (None, "cannot be read .*directory")],
)
def test_binary_file_or_folder_is_refused_as_json(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json: .*{message}"):
        files.read_json(path)


def test_fingerprint_ignores_key_order_only():
    """The order of list items, types and key names change the fingerprint."""
    one = files.fingerprint({"a": 1, "b": {"c": [1, 2], "d": "é"}})
    assert one == files.fingerprint({"b": {"d": "é", "c": [1, 2]}, "a": 1})
    others = [{"a": 1, "b": {"c": [2, 1], "d": "é"}}, {"a": "1", "b": {"c": [1, 2], "d": "é"}}]
    others += [{"a": 1, "b": {"c": [1, 2], "d": "e\u0301"}}, {"a": 1, "b": {"c": [1, 2]}, "d": "é"}]
    assert len({one, *map(files.fingerprint, others)}) == 5 and re.fullmatch("[0-9a-f]{64}", one)


# ---- reading -----------------------------------------------------------------------------------------------

LINE = b'{"a": "x"}\n'
ZIP = gzip.compress(LINE * 100, mtime=0)  # the same test names at every time
BROKEN = [("x.json", b'[{"a": "x"},\n{"a": ', r"x\.json, line 2: not valid JSON .*; is the file truncated\?")]
BROKEN += [("x.json", b"", r"x\.json, line 1: not valid JSON"), ("x.json", b"[]", "no usable record; .* a")]
BROKEN += [("x.json", b'{"a": "x"}', "expected a JSON list of records, got a dict")]
BROKEN += [("x.json", b'[{"a": "x"}, 5]', r"row 1: expected a record .*, got an? int; fix")]
BROKEN += [("x.json", b'[{"b": 1, "c": 2}]', r"row 0: field 'a' is missing .* \(fields: b, c\)")]
BROKEN += [
    ("x.json", b'[{"a": null}]', "field 'a' is missing or not text"),
    ("x.json", b"[{}]", "none"),
]
BROKEN += [("x.jsonl", LINE + b'{"a": "', r"x\.jsonl, line 2: not valid JSON"), ("x.jsonl", b"", "no usable")]
BROKEN += [("x.jsonl", b'["a"]\n', "line 1: .*got a list"), ("x.jsonl", b"\xff\n", "cannot be read")]
BROKEN += [(f"x.{kind}.gz", ZIP[:-12], r"x\..* cannot be read .*truncated\?") for kind in ("json", "jsonl")]
BROKEN += [("x.jsonl.gz", LINE, "cannot be read"), ("x.json", b"{", r"line 1: not valid JSON")]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_unusable_file_error_names_place_and_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"\A{re.escape(str(tmp_path))}.*{message}.*\Z"):
        read_rows(tmp_path / name, ("a",))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
def test_skipped_rows_do_not_change_other_ids(tmp_path, name):
    """Ids are positions in the file, bad rows included, and every bad row is listed."""
    rows = [{"a": "x"}, {"b": 1}, {"a": "é"}, 5, {"a": ""}]
    data = "".join(f"{json.dumps(row)}\n" for row in rows) if "jsonl" in name else json.dumps(rows)
    data = data.replace("5\n", '{"a": \n').encode()  # a line that is not JSON has an id too
    (tmp_path / name).write_bytes(gzip.compress(data) if "gz" in name else data)
    bad = BadRows("skip")
    places = ["2", "4"] if "jsonl" in name else ["1", "3"]
    assert read_rows(tmp_path / name, ("a",), bad) == [(0, {"a": "x"}), (2, {"a": "é"}), (4, {"a": ""})]
    assert sorted(row["where"].rsplit(" ", 1)[1] for row in bad.rows) == places


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz"])
def test_byte_order_mark_is_dropped(tmp_path, name):
    text = '[{"a": "x"}]' if name == "x.json" else '{"a": "x"}\n'
    data = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if "gz" in name else data)
    assert read_rows(tmp_path / name, ("a",)) == [(0, {"a": "x"})]


def test_missing_file_error_says_how_to_create_it(tmp_path):
    """Data files are created by a script, sampled files by the sample stage."""
    with pytest.raises(UserError, match=r"no such file: .*uc\.json; .*`bash bin/prepare_data.sh`"):
        read_rows(tmp_path / "train" / "uc.json")
    with pytest.raises(UserError, match=r"no such file: .*mine\.json; check its path"):
        read_rows(tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"no such file: .*uc_sampling_m\.json; .*stages=\[sample\]"):
        read_rows(tmp_path / "uc_sampling_m.json")


def test_first_bad_row_raises_by_default():
    remedy = "fix the row, or set on_bad_row=skip to leave such rows out"
    with pytest.raises(UserError, match=rf"\Ax\.jsonl, line 3: no text; {remedy}\Z"):
        BadRows().add("x.jsonl, line 3", "no text")


def test_skipped_rows_are_written_to_a_file(tmp_path, caplog):
    """The file has the reasons and the log the number; without bad rows there is no file."""
    bad = BadRows("skip")
    bad.report(tmp_path / "none.jsonl")
    bad.add("x.jsonl, line 3", "no text")
    bad.add("x.jsonl, line 9", "no braces")
    bad.report(tmp_path / "run" / "bad_rows.jsonl")
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"where": "x.jsonl, line 3", "reason": "no text"} and len(lines) == 2
    assert "skipped 2 bad rows" in caplog.text and names(tmp_path) == ["run"]


def test_bad_row_read_twice_counts_once(tmp_path):
    """The training and the held-out split may read the same file."""
    (tmp_path / "x.jsonl").write_text('{"a": "x"}\n{"a": 1}\n[]\n')
    bad = BadRows("skip")
    for _ in range(2):
        read_rows(tmp_path / "x.jsonl", ("a",), bad)
    assert [row["where"][-6:] for row in bad.rows] == ["line 2", "line 3"]


def test_unknown_on_bad_row_is_refused():
    with pytest.raises(UserError, match="on_bad_row='skp': expected 'error' or 'skip'"):
        BadRows("skp")
