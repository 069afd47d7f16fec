"""What must not be trained on: ends that no model gave, pairs without a preference, rows that count twice."""

import gzip
import json
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import pytest
from tiny import byte_tokenizer

from preference_datasets import get_dataset, load_tokenized
from ram.errors import UserError
from ram.storage.files import BadRows

TOKENIZER = byte_tokenizer()
ROW = {"instruction": "Why?", "output": "Because."}
HH = {name: f"\n\nHuman: Why?\n\nAssistant: {name}" for name in ("chosen", "rejected")}
UC_M = "train/ultrachat_round_one_sampling_m.json"


@pytest.fixture
def put(tmp_path):
    """Writes rows to a file in data_dir and returns data_dir."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        text = lines if ".jsonl" in name else json.dumps(rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return tmp_path

    return write


def load(name, data_dir, **given):
    keys = {"data_dir": data_dir, "output_dir": data_dir, "local_dirs": [], "heldout_fraction": 0.0}
    settings = SimpleNamespace(**keys, max_length=90, max_prompt_length=60, add_bos=False)
    return load_tokenized([name], "train", TOKENIZER, settings, BadRows(), True, **given)


def test_sample_that_was_cut_has_no_eos(put):
    """The proposal gave no EOS there: the aligner must not learn that it did."""
    ended = load("uc_m", put(UC_M, [ROW | {"sampling": "yes"}]))
    cut = load("uc_m", put(UC_M, [ROW | {"sampling": "yes", "sampling_finish_reason": "length"}]))
    assert TOKENIZER.decode(ended.part("negative", 0)) == "yes</s>"
    assert TOKENIZER.decode(cut.part("negative", 0)) == "yes"
    assert TOKENIZER.decode(cut.part("target", 0)) == TOKENIZER.decode(ended.part("target", 0))
    assert cut.key != ended.key
    (example,) = get_dataset("uc_m_aligner_warmup", "all", data_dir=put(UC_M, [example_row("length")]))
    assert example.target == "yes" and example.unfinished == ("target",)
    (example,) = get_dataset("uc_m_aligner_common", "all", data_dir=put(UC_M, [example_row("length")]))
    assert example.target == ROW["output"] and example.unfinished == ()


def example_row(reason):
    return ROW | {"sampling": "yes", "sampling_finish_reason": reason}


def test_identical_pairs_are_left_out_and_counted(put, caplog):
    """A pair that is identical, or becomes so when it is cut, states no preference."""
    dialogue = "\n\nHuman: Why?\n\nAssistant: "
    pairs = [("a", "b"), ("same", "same"), ("x" * 99 + "a", "x" * 99 + "b"), ("c", "d")]
    rows = [{"chosen": dialogue + better, "rejected": dialogue + worse} for better, worse in pairs]
    data_dir = put("train/hh/x.jsonl", rows)
    everything, kept = load("hh", data_dir), load("hh", data_dir, distinct=True)
    assert (len(everything), len(kept)) == (4, 2) and "2 of 4 pairs are identical: left out" in caplog.text
    assert [TOKENIZER.decode(kept.part("target", i)) for i in range(2)] == ["a</s>", "c</s>"]
    assert [TOKENIZER.decode(kept.part("negative", i)) for i in range(2)] == ["b</s>", "d</s>"]
    assert kept.counts["tokens"] == sum(len(ids) for ids in kept.ids.values())
    assert kept.key != everything.key == kept.earlier_key
    with pytest.raises(UserError, match="two answers of all 1 pairs are identical"):
        load("hh", put("train/hh/x.jsonl", rows[1:2]), distinct=True)
    different = load("hh", put("train/hh/x.jsonl", rows[:1]), distinct=True)
    assert different.key == load("hh", data_dir).key, "nothing was left out: the same data"


def test_copies_of_files_do_not_double_rows(put, caplog):
    put("train/hh/x.jsonl", [HH])
    data_dir = put("train/hh/x.jsonl.bak", [HH])
    assert len(get_dataset("hh", "all", data_dir=data_dir)) == 1 and "x.jsonl.bak" in caplog.text
    put("train/hh/x.jsonl.gz", [HH])
    with pytest.raises(UserError, match=r"x\.jsonl is there twice, plain and as \.gz.*remove one"):
        get_dataset("hh", "all", data_dir=data_dir)


def test_hub_rows_are_checked(tmp_path, monkeypatch):
    """A null, or half of a surrogate pair, in a row of the hub is a bad row, not a traceback."""
    rows = [HH, HH | {"rejected": None}, HH | {"chosen": HH["chosen"] + "\ud83d"}, HH]
    monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=rows))
    with pytest.raises(UserError, match="Anthropic/hh-rlhf, row 1: field 'rejected' is missing"):
        get_dataset("hh", "all", data_dir=tmp_path)
    bad = BadRows("skip")
    assert [e.row for e in get_dataset("hh", "all", data_dir=tmp_path, bad=bad)] == [0, 3]
    assert len(bad.rows) == 2


def test_damaged_token_cache_is_made_again(put, tmp_path, caplog):
    """A flipped bit among the ids is a valid file with another token."""
    whole = load("uc_m", put(UC_M, [ROW | {"sampling": "yes"}]))
    (path,) = (tmp_path / "cache").iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    again = load("uc_m", tmp_path)
    assert all((again.ids[name] == whole.ids[name]).all() for name in whole.ids)
    assert "is damaged or of an earlier version; tokenising again" in caplog.text
