"""JSON within bounds: what is read can be worked on, what is written can be read by others."""

import json
import math
import random

import pytest

from ram.errors import UserError
from ram.storage.files import BadRows, differences, read_json, read_rows, write_json
from ram.storage.json_text import DEEPEST, BadJSON, dumps, elements, loads
from ram.storage.records import is_of, read_record, write_record

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "9" * 5000
BAD = {"deep": DEEP, "huge": HUGE, "half a pair": '"\\ud83d"', "half a pair as key": '{"\\uDE00": 1}'}
LEAVES = [
    None,
    True,
    0,
    -1,
    10**40,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "é\u2028",
    'a"\\',
    "[{,]}",
    "\x00",
]


def random_value(rng, depth=3):
    kind = rng.random()
    if not depth or kind < 0.4:
        return rng.choice(LEAVES)
    inner = [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if kind < 0.7 else {f"{rng.choice(LEAVES)}": value for value in inner}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_value_beyond_the_bounds_is_refused(text, tmp_path):
    """Python's own reader raises RecursionError or ValueError, or returns what no UTF-8 file can hold."""
    for wrapped in (text, f'{{"a": [{text}]}}'):
        with pytest.raises(BadJSON, match="nested deeper|5,000 digits|unpaired surrogate"):
            loads(wrapped)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: .*\Z"):
        read_json(tmp_path / "x.json")


def test_written_values_are_valid_json():
    """NaN and infinities become null; everything else comes back as it was."""

    def refuse(name):
        raise AssertionError(name)

    def equal(a, b):
        if isinstance(a, list | dict):
            keys = a if isinstance(a, dict) else range(len(a))
            return type(a) is type(b) and len(a) == len(b) and all(equal(a[k], b[k]) for k in keys)
        return b is None if isinstance(a, float) and not math.isfinite(a) else a == b

    rng = random.Random(0)
    for value in (random_value(rng) for _ in range(500)):
        assert equal(value, json.loads(dumps(value), parse_constant=refuse))
        assert equal(value, loads(dumps(value)))


def test_elements_of_a_list():
    """The scanner that finds the elements of a list agrees with the parser."""
    rng = random.Random(0)
    for _ in range(500):
        values = [random_value(rng) for _ in range(rng.randrange(5))]
        found = [json.loads(part) for part in elements(json.dumps(values, indent=1)) if part.strip()]
        assert repr(found) == repr(values)


def test_depth_limit_is_exact():
    assert loads("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(BadJSON, match="nested deeper than 100 levels"):
        loads("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_rows_beyond_the_bounds_are_bad_rows(tmp_path, name):
    """A field that nobody reads makes its row a bad one, which can be skipped. Others keep their index."""
    good = '{"a": "x", "n": NaN}'
    lines = [good, *(f'{{"a": "y", "b": {text}}}' for text in BAD.values()), good]
    (tmp_path / name).write_text("\n".join(lines) if name == "x.jsonl" else f"[{', '.join(lines)}]")
    bad = BadRows("skip")
    rows = read_rows(tmp_path / name, ["a"], bad)
    assert [index for index, _ in rows] == [0, 5] and len(bad.rows) == 4
    with pytest.raises(UserError, match=r"x\.jsonl?, (row 1|line 2): nested deeper.*; fix the row"):
        read_rows(tmp_path / name, ["a"])


def test_json_lines_under_another_name_are_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": "x"}\n\n{"a": "y"}\n')
    assert read_rows(tmp_path / "x.json", ["a"]) == [(0, {"a": "x"}), (2, {"a": "y"})]
    (tmp_path / "x.json").write_text('[{"a": "x"},\n{"a": ')
    with pytest.raises(UserError, match="line 2: not valid JSON .*is the file truncated"):
        read_rows(tmp_path / "x.json", ["a"])


# ---- records -----------------------------------------------------------------------------------------------


def test_changed_record_is_refused(tmp_path):
    path = tmp_path / "r.json"
    write_record(path, {"seconds": 1.5, "limit": math.inf})
    assert read_record(path, {"seconds": float}, "do this") == {"seconds": 1.5, "limit": None}
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(UserError, match=r"r\.json: was changed .*; do this\Z"):
        read_record(path, {"seconds": float}, "do this")


def test_damaged_key_of_the_digest_is_noticed(tmp_path):
    """Without it the record would pass for one of an earlier version."""
    path = tmp_path / "r.json"
    write_record(path, {"seconds": 1.5})
    path.write_text(path.read_text().replace('"digest"', '"dicest"').replace("1.5", "1.6"))
    with pytest.raises(UserError, match="was changed or cut short"):
        read_record(path, {"seconds": float}, "do this")


def test_record_of_an_earlier_version_is_read(tmp_path):
    write_json(tmp_path / "r.json", {"seconds": 1})
    assert read_record(tmp_path / "r.json", {"seconds": int | float}, "") == {"seconds": 1}


@pytest.mark.parametrize(
    "text", ["[]", "5", "{}", '{"seconds": true}', '{"seconds": NaN}', '{"seconds": "1"}']
)
def test_record_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=r"r\.json: expected a record with seconds.*; do this\Z"):
        read_record(tmp_path / "r.json", {"seconds": int | float}, "do this")


def test_types_are_strict():
    assert is_of(True, bool) and is_of(None, int | None) and is_of(3, int) and is_of(3, int | float)
    assert not is_of(True, int) and not is_of(True, int | None) and not is_of(math.nan, float)


def test_infinity_is_compared_as_it_is_stored():
    assert differences({"a": math.inf}, {"a": None}) == ""
