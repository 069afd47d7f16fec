"""Files that appear whole or not at all, records on disk, what is wrong with them."""

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
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


# ---- replacing ---------------------------------------------------------------------------------------------


def write_folder(path, text):
    path.mkdir()
    (path / "weights").write_text(text)


def test_replacing_makes_a_file_and_the_folders_above_it(tmp_path):
    """A new file appears when the block ends, not before, and nothing else is left beside it."""
    path = tmp_path / "a" / "b" / "file.txt"
    with replacing(path) as aside:
        aside.write_text("new")
        assert not path.exists() and aside.parent == path.parent
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


def test_replacing_makes_a_folder_anew(tmp_path):
    """A folder is exchanged as a whole: files that only the old one had are gone."""
    path = tmp_path / "model"
    write_folder(path, "old")
    (path / "only in the old one").touch()
    with replacing(path) as aside:
        write_folder(aside, "new")
        assert (path / "weights").read_text() == "old"
    assert (path / "weights").read_text() == "new"
    assert names(path) == ["weights"] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_old_stands_where_writing_fails(tmp_path, kind, error):
    """A block that raises, even by Ctrl-C, leaves what was there, and no half-written leftover."""
    path = tmp_path / "thing"
    write = Path.write_text if kind == "file" else write_folder
    write(path, "old")
    with pytest.raises(error), replacing(path) as aside:
        write(aside, "new")
        raise error
    assert (path if kind == "file" else path / "weights").read_text() == "old"
    assert names(tmp_path) == ["thing"]


def test_the_old_stands_where_nothing_was_written(tmp_path):
    """A block that forgets to write is an error, not an empty file."""
    (tmp_path / "thing").write_text("old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "thing"):
        pass
    assert (tmp_path / "thing").read_text() == "old" and names(tmp_path) == ["thing"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_leftover_of_a_killed_run_is_cleared(tmp_path, kind):
    """What a kill left half written never becomes part of the next one, whatever it was."""
    path = tmp_path / "model"
    with replacing(path) as aside:
        leftover = aside
        write_folder(aside, "one")
    if kind == "file":
        leftover.write_text("half")
    else:
        write_folder(leftover, "half")
        (leftover / "more").touch()
    with replacing(path) as aside:
        write_folder(aside, "two")
    assert names(path) == ["weights"] and names(tmp_path) == ["model"]


KILLED = """
import os, sys
from ram.storage import files
def killed(source, target):
    os.kill(os.getpid(), 9)
with files.replacing(sys.argv[1]) as aside:
    aside.mkdir()
    (aside / "weights").write_text("new")
    if sys.argv[2] == "writing":
        killed(0, 0)
    os.replace = killed
"""


@pytest.mark.parametrize("moment", ["writing", "between both renames"])
def test_a_kill_leaves_one_whole_folder_which_the_next_write_finds(tmp_path, moment):
    """Killed while it writes, or between both renames: the old folder stands or is put back, nothing else
    stays.
    """
    path = tmp_path / "model"
    write_folder(path, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=ROOT)
    assert done.returncode == -9 and len(names(tmp_path)) == 2
    with pytest.raises(ValueError), replacing(path):
        raise ValueError
    assert (path / "weights").read_text() == "old" and names(tmp_path) == ["model"]


def test_what_a_living_process_writes_is_left_to_it(tmp_path):
    """Two processes may write the same path at once; on another host a process id says nothing."""
    parent, elsewhere = f".x.{files.HOST}.{os.getppid()}.partial", ".x.elsewhere.1.partial"
    (tmp_path / parent).touch(), (tmp_path / elsewhere).touch()
    files.write_json(tmp_path / "x", 1)
    assert names(tmp_path) == sorted([parent, elsewhere, "x"])


def test_a_full_disk_names_the_file(tmp_path):
    """The error of a write names no file by itself: the one that was to be made is put in."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left (28)")):
        with pytest.raises(OSError, match="No space left") as found, replacing(tmp_path / "x") as aside:
            aside.touch()
            raise error
        assert found.value.filename == str(tmp_path / "x") and names(tmp_path) == []


# ---- what is written ---------------------------------------------------------------------------------------


def test_json_is_written_for_people_and_read_back(tmp_path):
    """Text stays readable as it is, indented, with a final newline; reading gives the value back."""
    value = {"b": ["é", "空", None], "a": 1.5}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": [\n    "é",\n    "空",\n    null\n  ],\n  "a": 1.5\n}\n'
    assert files.read_json(tmp_path / "x.json") == value


def test_jsonl_is_one_record_a_line(tmp_path):
    """Line breaks of every kind stay inside their record, and rows may come from a generator."""
    rows = [{"text": "a\nb\r\nc"}, {"text": "d\u2028e\x85空"}, {"text": ""}]
    files.write_jsonl(tmp_path / "x.jsonl", (row for row in rows))
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 3
    assert [row for _, row in read_rows(tmp_path / "x.jsonl")] == rows


def test_csv_has_the_columns_of_all_rows(tmp_path):
    """Columns stand in order of first appearance; what a row lacks is empty; commas and breaks survive."""
    files.write_csv(tmp_path / "x.csv", [{"name": 'a,"b"\nc', "n": 1}, {"late": 2.5, "name": "é"}])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "n", "late"], ['a,"b"\nc', "1", ""], ["é", "", "2.5"]]


def test_a_value_that_cannot_be_written_spares_the_old_file(tmp_path):
    """An error in the middle of the rows leaves the file of before."""
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


def test_broken_json_names_file_and_line(tmp_path):
    """A JSON file that was cut is the user's to mend: one line with file and line number."""
    (tmp_path / "x.json").write_text('{\n"a": 1,\n')
    with pytest.raises(UserError, match=r"x\.json, line 3: not valid JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": "\xff"}', "UTF-8 .*at byte 7"), (None, "cannot be read .*directory")],
)
def test_what_is_no_text_is_no_json(tmp_path, content, message):
    """A binary file or a folder in the place of a JSON file is named in one line."""
    path = tmp_path / "x.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.json: .*{message}"):
        files.read_json(path)


def test_fingerprints_ignore_the_order_of_keys_only():
    """Equal values give equal hashes however their keys stand; order in lists, types and names count."""
    one = files.fingerprint({"a": 1, "b": {"c": [1, 2], "d": "é"}})
    assert one == files.fingerprint({"b": {"d": "é", "c": [1, 2]}, "a": 1})
    others = [{"a": 1, "b": {"c": [2, 1], "d": "é"}}, {"a": "1", "b": {"c": [1, 2], "d": "é"}}]
    others += [{"a": 1, "b": {"c": [1, 2], "d": "e\u0301"}}, {"a": 1, "b": {"c": [1, 2]}, "d": "é"}]
    assert len({one, *map(files.fingerprint, others)}) == 5 and re.fullmatch("[0-9a-f]{64}", one)


# ---- what is read ------------------------------------------------------------------------------------------

LINE = b'{"a": "x"}\n'
ZIP = gzip.compress(LINE * 100)
BROKEN = [("x.json", b'[{"a": "x"},\n{"a": ', r"x\.json, line 2: not valid JSON .*; is the file cut short\?")]
BROKEN += [("x.json", b"", r"x\.json, line 1: not valid JSON"), ("x.json", b"[]", "no usable record; .* a")]
BROKEN += [("x.json", b'{"a": "x"}', "expected a JSON list of records, found a dict")]
BROKEN += [("x.json", b'[{"a": "x"}, 5]', r"row 1: expected a record .*, found an? int; mend")]
BROKEN += [("x.json", b'[{"b": 1, "c": 2}]', r"row 0: field 'a' is missing .* \(fields found: b, c\)")]
BROKEN += [
    ("x.json", b'[{"a": null}]', "field 'a' is missing or not text"),
    ("x.json", b"[{}]", "none"),
]
BROKEN += [("x.jsonl", LINE + b'{"a": "', r"x\.jsonl, line 2: not valid JSON"), ("x.jsonl", b"", "no usable")]
BROKEN += [("x.jsonl", b'["a"]\n', "line 1: .*found a list"), ("x.jsonl", b"\xff\n", "cannot be read")]
BROKEN += [(f"x.{kind}.gz", ZIP[:-12], r"x\..* cannot be read .*cut short\?") for kind in ("json", "jsonl")]
BROKEN += [("x.jsonl.gz", LINE, "cannot be read"), ("x.json", b"{", r"line 1: not valid JSON")]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, name, content, message):
    """Whatever is wrong with a file or a row of it is one line with the file's name and the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"\A{re.escape(str(tmp_path))}.*{message}.*\Z"):
        read_rows(tmp_path / name, ("a",))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
def test_a_skipped_row_leaves_the_others_their_ids(tmp_path, name):
    """With skip, rows keep their place in the file as id and every bad one is listed, in all four formats."""
    rows = [{"a": "x"}, {"b": 1}, {"a": "é"}, 5, {"a": ""}]
    data = "".join(f"{json.dumps(row)}\n" for row in rows) if "jsonl" in name else json.dumps(rows)
    data = data.replace("5\n", '{"a": \n').encode()  # a line that is no JSON has its number too
    (tmp_path / name).write_bytes(gzip.compress(data) if "gz" in name else data)
    bad, places = BadRows("skip"), ["2", "4"] if "jsonl" in name else ["1", "3"]
    assert read_rows(tmp_path / name, ("a",), bad) == [(0, {"a": "x"}), (2, {"a": "é"}), (4, {"a": ""})]
    assert sorted(row["where"].rsplit(" ", 1)[1] for row in bad.rows) == places


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz"])
def test_a_byte_order_mark_is_no_content(tmp_path, name):
    """Files that an editor saved as "UTF-8 with BOM" read like any other."""
    text = '[{"a": "x"}]' if name == "x.json" else '{"a": "x"}\n'
    data = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if "gz" in name else data)
    assert read_rows(tmp_path / name, ("a",)) == [(0, {"a": "x"})]


def test_a_missing_file_says_how_to_get_it(tmp_path):
    """Data files come from one script, sampled ones from the sample stage, and each message says so."""
    with pytest.raises(UserError, match=r"no such file: .*uc\.json; `bash bin/prepare_data.sh`"):
        read_rows(tmp_path / "uc.json")
    with pytest.raises(UserError, match=r"no such file: .*uc_sampling_m\.json; .*stages=\[sample\]"):
        read_rows(tmp_path / "uc_sampling_m.json")


def test_the_first_bad_row_stops_unless_told_otherwise():
    """By default the place, the reason and the remedy are raised in one line."""
    remedy = "mend the row, or set on_bad_row=skip to leave such rows out"
    with pytest.raises(UserError, match=rf"\Ax\.jsonl, line 3: no text; {remedy}\Z"):
        BadRows().add("x.jsonl, line 3", "no text")


def test_skipped_rows_are_listed_in_a_file(tmp_path, caplog):
    """With skip bad rows are kept with their reasons, written beside the run and counted; none, no file."""
    bad = BadRows("skip")
    bad.report(tmp_path / "none.jsonl")
    bad.add("x.jsonl, line 3", "no text")
    bad.add("x.jsonl, line 9", "no braces")
    bad.report(tmp_path / "run" / "bad_rows.jsonl")
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"where": "x.jsonl, line 3", "reason": "no text"} and len(lines) == 2
    assert "skipped 2 bad rows" in caplog.text and names(tmp_path) == ["run"]


def test_a_bad_row_that_is_read_twice_counts_once(tmp_path):
    """Training and held-out part come from one file, which is read for each of them."""
    (tmp_path / "x.jsonl").write_text('{"a": "x"}\n{"a": 1}\n[]\n')
    bad = BadRows("skip")
    for _ in range(2):
        read_rows(tmp_path / "x.jsonl", ("a",), bad)
    assert [row["where"][-6:] for row in bad.rows] == ["line 2", "line 3"]


def test_on_bad_row_takes_two_words():
    """A misspelt on_bad_row says what it may be."""
    with pytest.raises(UserError, match="on_bad_row='skp': expected 'error' or 'skip'"):
        BadRows("skp")
