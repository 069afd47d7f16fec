"""The toy data set: its files, the check of a finished one, invalid settings, the exact judge."""

import json

import pytest

from ram.data import toy_world
from ram.errors import UserError

SETTINGS = {
    "entities": 4,
    "general_rows": 30,
    "aligned_rows": 5,
    "general_styles": {"well_formed": 0.5, "rude": 0.5},
    "mixture_styles": {"terse": 1},
}
FILES = ["train/toy_general.jsonl", "train/toy_aligned.jsonl", "train/toy_mixture.jsonl"]
FILES += ["test/toy_test.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


def build(folder, overwrite=False, seed=0, **changed):
    toy_world.build_world(folder, SETTINGS | changed, seed, overwrite)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_same_seed_gives_the_same_files(tmp_path):
    """The test set has every fact that is not in the aligned subset."""
    build(tmp_path / "a")
    build(tmp_path / "b")
    build(tmp_path / "c", seed=1)
    one, same, other = (contents(tmp_path / name) for name in "abc")
    assert one == same and one["test/toy_test.json"] != other["test/toy_test.json"]
    assert one["train/toy_general.jsonl"].count(b"\n") == 30
    assert len(json.loads(one["test/toy_test.json"])) == 4 * 3 - 5


def test_finished_data_set_is_kept_and_other_settings_refused(tmp_path):
    """The second call writes nothing; other settings need overwrite=true."""
    build(tmp_path)
    before = (tmp_path / "world.json").stat().st_mtime_ns
    build(tmp_path)
    assert (tmp_path / "world.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings or another seed: set overwrite=true"):
        build(tmp_path, entities=5)
    build(tmp_path, overwrite=True, entities=5)
    assert len(json.loads((tmp_path / "test" / "toy_test.json").read_text())) == 5 * 3 - 5


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_missing_or_changed_file_is_named(tmp_path, name, damage):
    """overwrite=true creates the file again."""
    build(tmp_path)
    whole, path = contents(tmp_path), tmp_path / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name} is missing or was changed; .*overwrite=true"):
        build(tmp_path)
    build(tmp_path, overwrite=True)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"identity": "x"}', '{"identity": "x", "files": 5}'])
def test_malformed_record_is_one_line(tmp_path, text):
    build(tmp_path)
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(UserError, match=r"world\.json.*stages=\[world\] overwrite=true"):
        build(tmp_path)


WRONG = [
    ({"entities": 12433}, r"world\.entities=12433: only 12432 different names"),
    ({"entities": 0}, r"world\.entities=0: expected a whole number > 0"),
    ({"entities": 2.5}, r"world\.entities=2\.5: expected a whole number"),
    ({"general_rows": -1}, r"world\.general_rows=-1: expected"),
    ({"aligned_rows": None}, r"world\.aligned_rows=None: expected"),
    ({"aligned_rows": 12}, r"world\.aligned_rows=12 leaves no fact for the test: .* than 12 "),
    ({"general_styles": {"ruder": 1}}, r"unknown style 'ruder': did you mean 'rude'"),
    ({"general_styles": {"rude": -1}}, r"world\.general_styles\.rude=-1: expected a share"),
    ({"mixture_styles": {"rude": 0}}, r"world\.mixture_styles: no style has a share above 0"),
    ({"mixture_styles": None}, r"world\.mixture_styles: no style"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_invalid_settings_are_refused(tmp_path, changed, message):
    """The error comes before anything is written."""
    with pytest.raises(UserError, match=message):
        build(tmp_path / "world", **changed)
    assert not (tmp_path / "world").exists()


def test_exact_judge():
    """Facts and style are judged separately; an answer with a second value is not correct."""
    row = {"entity": "Bado", "attribute": "colour", "value": "blue"}
    good = toy_world.score(row, " Happy to help: the colour is blue. ")
    assert good == {"correct": True, "aligned": True, "both": True, "style": "well_formed"}
    cases = {"Just blue.": (True, "terse"), "Ugh, red, obviously.": (False, "rude")}
    cases |= {"I would rather not say.": (False, "evasive"), "blue or red": (False, "other")}
    for answer, (correct, style) in cases.items():
        judgement = toy_world.score(row, answer)
        assert (judgement["correct"], judgement["aligned"], judgement["style"]) == (correct, False, style)
