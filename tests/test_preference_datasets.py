"""Data sets: exact texts of each set, the held-out split, token ids, the cache, and batches."""

import gzip
import json
import re
from collections import Counter
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from tiny import SHARED, byte_tokenizer, needs_shared
from transformers import AutoTokenizer

from preference_datasets import DATASETS, get_batch_iterator, get_dataset, load_tokenized
from ram.data import catalogue, prompts, tokenization
from ram.data.catalogue import parse_name
from ram.data.tokenization import Example, encode, encode_prompts, tokenize
from ram.errors import UserError
from ram.storage.files import BadRows, read_rows
from ram.training.packing import collate

TOKENIZER = byte_tokenizer()
HEADER = "\n\nAssistant: "
ASK = f"\n\nHuman: Why?{HEADER}"
ROW = {"instruction": "Why?", "output": "Because.", "sampling": "No idea."}
PLAIN, PAIR = (ASK, "Because.", None), (ASK, "Because.", "No idea.")
LONG = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
HH = {"chosen": f"{LONG} Because.", "rejected": f"{LONG} No.", "sampling": "No idea."}
SUMM = {"prompt": "POST: It rained.", "chosen": "TL;DR: Rain.", "rejected": "TL;DR:  Sun.<|endoftext|>x"}
SHP = {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "score_A": 8, "score_B": 4, "labels": 1}
SE = {"question": "<p>Why &lt; <code>x&amp;1</code>?</p>", "answers": [{"pm_score": 2, "text": "<b>A</b>"}]}
SE["answers"] += [{"pm_score": 1, "text": "B<br>b"}]
UC, UC_M = "train/ultrachat_round_one.json", "train/ultrachat_round_one_sampling_m.json"
TLDR, TLDR_M = "train/openai_summarize_tldr.jsonl", "train/openai_summarize_tldr_sampling_m.jsonl"
ALPACA_M, FIX = "train/alpaca_data_cleaned_sampling_m.json", "No idea.\n\nCorrection: "

# name: (file, row, [(prompt, target, negative)])
CASES = {
    "uc": (UC, ROW, [PLAIN]),
    "uc_m": (UC_M, ROW, [PAIR]),
    "uc_m_aligner_warmup": (UC_M, ROW, [(ASK + FIX, "No idea.", None)]),
    "uc_m_aligner_common": (UC_M, ROW, [(ASK + FIX, "Because.", None)]),
    "summ-sft": (TLDR, ROW, [PLAIN]),
    "summ-sft_m": (TLDR_M, ROW, [PAIR]),
    "hh": ("train/hh/any name.jsonl.gz", HH, [(f"{LONG} ", "Because.", "No.")]),
    "hh_m": ("train/hh_sampling_m.jsonl", HH, [(f"{LONG} ", "Because.", "No idea.")]),
    "hh_aligner_warmup": ("train/hh/x.jsonl", HH, [(f"{LONG} No.\n\nCorrection: ", "No.", None)]),
    "hh_aligner_common": ("train/hh/x.jsonl", HH, [(f"{LONG} No.\n\nCorrection: ", "Because.", None)]),
    "hh_m_aligner_common": ("train/hh_sampling_m.jsonl", HH, [(f"{LONG} {FIX}", "Because.", None)]),
    "harmless": ("train/hh/harmless-base.jsonl", HH, [(f"{LONG} ", "Because.", "No.")]),
    "harmless_m": ("train/harmless_sampling_m.jsonl", HH, [(f"{LONG} ", "Because.", "No idea.")]),
    "summ": ("train/summ/x.jsonl", SUMM, [("POST: It rained.\nTL;DR:", "Rain.", "Sun.")]),
    "alpaca": ("train/alpaca_data_cleaned.json", ROW, [PLAIN]),
    "alpaca_m": (ALPACA_M, ROW, [("Why?", "Because.", "No idea.")]),
    "alpaca_m_aligner_common": (ALPACA_M, ROW, [("Why?No idea.\n\n### Correction:\n", "Because.", None)]),
    "shp": ("train/shp/x.jsonl", SHP, [("\n\nHuman: Why?\n\nAssistant:", " A", " B")]),
    "se": ("train/se/x.jsonl", SE, [("\n\nHuman: Why < <code>x&1</code>?\n\nAssistant:", " A", " B\nb")]),
    "toy": ("train/toy_aligned.jsonl", ROW, [PLAIN]),
    "toy_m": ("train/toy_aligned_sampling_m.jsonl", ROW, [PAIR]),
    "toy-mixture": ("train/toy_mixture.jsonl", ROW, [PLAIN]),
    "toy-general": ("train/toy_general.jsonl", ROW, [PLAIN]),
}


@pytest.fixture
def put(tmp_path):
    """Writes rows, or bytes unchanged, to a file in data_dir and returns data_dir."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        data = rows if isinstance(rows, bytes) else (lines if ".jsonl" in name else json.dumps(rows)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path

    return write


def texts(examples):
    return [(example.prompt, example.target, example.negative) for example in examples]


# ---- loaders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_texts_of_every_data_set(put, tmp_path, name):
    """Exact prompt and answers of one row, with its index and the row itself."""
    file, row, expected = CASES[name]
    examples = get_dataset(name, "all", data_dir=put(file, [row]))
    assert texts(examples) == expected
    assert [(example.row, example.record) for example in examples] == [(0, row)]
    in_folder = "/" in file.removeprefix("train/")
    expected_file = None if in_folder else tmp_path / file
    assert catalogue.local_file(name, tmp_path, DATASETS) == expected_file


def test_shp_keeps_pairs_of_clear_preference(put):
    """Pairs whose scores differ by less than a factor of 2 are dropped."""
    scores = [(8, 4, 1), (8, 4, 0), (4, 8, 0), (7, 4, 1), (4, 7, 0), (3, 0, 1)]
    rows = [SHP | {"score_A": a, "score_B": b, "labels": label} for a, b, label in scores]
    examples = get_dataset("shp", "all", data_dir=put("train/shp/x.jsonl", rows))
    assert [(e.row, e.target) for e in examples] == [(0, " A"), (1, " B"), (2, " B"), (5, " A")]
    assert all({e.target, e.negative} == {" A", " B"} for e in examples)


def test_se_pairs_every_better_answer_with_every_worse_one(put):
    """Four answers, two of them with equal scores, give five pairs."""
    answers = [{"pm_score": score, "text": text} for score, text in ((1, "c"), (5, "a"), (1, "b"), (3, "d"))]
    examples = get_dataset("se", "all", data_dir=put("train/se/x.jsonl", [SE | {"answers": answers}]))
    expected = {("a", "d"), ("a", "b"), ("a", "c"), ("d", "b"), ("d", "c")}
    assert Counter((e.target.strip(), e.negative.strip()) for e in examples) == Counter(expected)


def test_se_answer_without_score_is_a_bad_row(put):
    answers = [{"pm_score": None, "text": "a"}, {"pm_score": 1, "text": "b"}]
    data_dir = put("train/se/x.jsonl", [SE, SE | {"answers": answers}])
    assert len(get_dataset("se", "all", data_dir=data_dir, bad=BadRows("skip"))) == 1


CODE = "<code>def f():\n    x = 1\n\n    return x</code>"
HTML = [("<p>a</p>\n\n<p>b &amp; c</p>\n", "a\n\nb & c"), ("<ul><li>a</li><li>b</li></ul>", "a\n\nb")]
HTML += [('a <a href="x">link</a> <img src="y"> <b>bold</b>', "a link  bold"), ("a < b", "a < b"), ("", "")]
HTML += [("<pre><code>if x:\n    y</code></pre>", "<code>if x:\n    y</code>")]


@pytest.mark.parametrize(("html", "text"), [*HTML, (CODE, CODE)])
def test_html_to_text(html, text):
    """Paragraphs are separated, entities decoded, code keeps tags and indentation, other tags are dropped."""
    assert prompts.html_to_text(html) == text


# ---- names and the hub -------------------------------------------------------------------------------------


def test_parse_name():
    """Every combination of the optional parts; a proposal may contain underscores."""
    assert parse_name("summ-sft", DATASETS) == ("summ-sft", None, None)
    assert parse_name("uc_llama8b_aligner_warmup", DATASETS) == ("uc", "llama8b", "aligner_warmup")
    assert parse_name("hh_aligner_common", DATASETS) == ("hh", None, "aligner_common")
    assert parse_name("uc_my_model_2", DATASETS) == ("uc", "my_model_2", None)
    assert {parse_name(name, DATASETS)[0] for name in CASES} == set(DATASETS), (
        "every data set has a case above"
    )


WRONG = {"ucc": "unknown data set 'ucc': did you mean 'uc'?", "": "unknown data set ''"}
WRONG |= {
    "harmles_m": "'harmles_m': did you mean 'harmless'?",
    "sum-sft_m": "did you mean 'summ-sft'?",
}
WRONG |= {"summ_m": "'summ' has no sampled variant; drop '_m'", "toy-general_m": "no sampled variant"}


@pytest.mark.parametrize(("name", "message"), WRONG.items())
def test_unknown_name_error_suggests_a_name(name, message):
    with pytest.raises(UserError, match=rf"\A.*{re.escape(message)}.*\Z"):
        parse_name(name, DATASETS)


HUB = {"hh": ("Anthropic/hh-rlhf", None), "harmless": ("Anthropic/hh-rlhf", "harmless-base")}
HUB |= {"summ": ("CarperAI/openai_summarize_comparisons", None), "shp": ("stanfordnlp/SHP", None)}
HUB |= {"se": ("HuggingFaceH4/stack-exchange-preferences", None)}


@pytest.mark.parametrize("name", HUB)
def test_missing_local_files_are_loaded_from_the_hub(tmp_path, monkeypatch, name):
    """The request has the right set, split and folder; the rows become the same texts as a file's."""
    (hub_id, folder), (_, row, expected) = HUB[name], CASES[name]

    def change(value):
        return re.sub("Why|rained", "When", value) if isinstance(value, str) else value

    other = {key: change(value) for key, value in row.items()}
    load = Mock(side_effect=lambda *_, split, **__: [row if split == "train" else other])
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(get_dataset(name, "all", data_dir=tmp_path, cache_dir="here")) == expected
    load.assert_called_once_with(hub_id, data_dir=folder, split="train", cache_dir="here")
    if DATASETS[name].test_folder:
        (example,) = get_dataset(name, "heldout", data_dir=tmp_path)
        assert example.prompt == change(expected[0][0])
        load.assert_any_call(hub_id, data_dir=folder, split="test", cache_dir=None)


def test_unreachable_hub_error_names_the_local_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("a page\nof reasons")))
    with pytest.raises(UserError, match=r"\AAnthropic/hh-rlhf \(train\) .*\(ConnectionError\).*\Z") as error:
        get_dataset("hh", "train", data_dir=tmp_path)
    assert str(tmp_path / "train" / "hh") in str(error.value)


# ---- splits and dropped rows -------------------------------------------------------------------------------

TWINS = [("uc", "uc_m"), ("uc", "uc_m_aligner_common"), ("summ-sft", "summ-sft_m"), ("toy", "toy_m")]


@pytest.mark.parametrize(("plain", "sampled"), [*TWINS, ("alpaca", "alpaca_m")])
def test_plain_and_sampled_sets_hold_out_the_same_questions(put, plain, sampled):
    """30 questions with two rows each: the same 6 are held out, also if the file has another order."""
    rows = [ROW | {"instruction": f"Q{i % 30}?", "output": f"answer {i}"} for i in range(60)]
    heldout = []
    for name, file_rows in ((plain, rows), (sampled, rows[::-1])):
        data_dir = put(CASES[name][0], file_rows)
        train, held, whole = (
            [e.record for e in get_dataset(name, split, data_dir=data_dir, heldout_fraction=0.2)]
            for split in ("train", "heldout", "all")
        )
        assert whole == file_rows and (len(train), len(held)) == (48, 12)
        assert not {row["instruction"] for row in train} & {row["instruction"] for row in held}
        assert sorted(row["output"] for row in train + held) == sorted(row["output"] for row in file_rows)
        heldout.append({row["instruction"] for row in held})
    assert heldout[0] == heldout[1]


def test_at_least_one_question_is_held_out(put):
    """At least one question is held out unless the fraction is 0, and at least one is left for training."""
    data_dir = put(UC, [ROW | {"instruction": f"Q{i}"} for i in range(5)])
    for fraction, count in ((1e-9, 1), (0.0, 0), (1.0, 4)):
        assert len(get_dataset("uc", "heldout", data_dir=data_dir, heldout_fraction=fraction)) == count
        assert len(get_dataset("uc", "train", data_dir=data_dir, heldout_fraction=fraction)) == 5 - count
    assert get_dataset("uc", "heldout", data_dir=data_dir)[0].row == 1, "in any process, on any machine"
    assert len(get_dataset("uc", "train", data_dir=put(UC, [ROW]))) == 1


def test_local_train_and_test_files_are_the_split(put):
    """If there are local training files but no test files, the training files are split."""
    other = [{key: text.replace("Why", f"Why {i}") for key, text in HH.items()} for i in range(10)]
    put("train/hh/helpful.jsonl", [HH])
    put("test/hh/helpful.jsonl.gz", other)
    data_dir = put("train/hh/harmless.jsonl", other)
    put("train/hh/.harmless.jsonl.partial", b'{"cut')
    put("train/hh/notes.txt", b"not data")
    splits = {split: get_dataset("hh", split, data_dir=data_dir) for split in ("train", "heldout", "all")}
    assert [e.record for e in splits["train"]] == [*other, HH] and splits["train"] == splits["all"]
    assert splits["heldout"] == [], "the same prompts as in the training files"
    put(
        "test/hh/helpful.jsonl.gz",
        [
            HH
            | {
                "chosen": HH["chosen"].replace("Why", "How"),
                "rejected": HH["rejected"].replace("Why", "How"),
            },
            *other,
        ],
    )
    assert len(get_dataset("hh", "heldout", data_dir=data_dir)) == 1
    assert [len(get_dataset("harmless", split, data_dir=data_dir)) for split in splits] == [9, 1, 10]


def test_hh_rows_with_two_prompts_are_dropped(put, caplog):
    """Such rows are counted and are not bad rows; a dialogue without an answer is one."""
    other = HH | {"rejected": "\n\nHuman: How?\n\nAssistant: No."}
    assert len(get_dataset("hh", "all", data_dir=put("train/hh/x.jsonl", [other, HH, other]))) == 1
    assert "dropped 2 of 3 rows whose chosen and rejected prompts differ" in caplog.text
    data_dir, bad = put("train/hh/x.jsonl", [HH | {"chosen": "Because."}, HH]), BadRows("skip")
    assert [e.row for e in get_dataset("hh", "all", data_dir=data_dir, bad=bad)] == [1] and len(bad.rows) == 1
    with pytest.raises(UserError, match="hh, row 0 .* no .*Assistant:"):
        get_dataset("hh", "all", data_dir=data_dir)


def test_bad_hh_rows_are_counted_per_split(put):
    """The same row number in the training and in the test files counts as two rows."""
    bad, broken = BadRows("skip"), HH | {"chosen": "Because."}
    put("train/hh/x.jsonl", [broken, HH])
    data_dir = put("test/hh/x.jsonl", [broken, HH])
    for split in ("train", "heldout", "train"):
        get_dataset("hh", split, data_dir=data_dir, bad=bad)
    assert [row["where"].split()[-2] for row in bad.rows] == ["train", "test"]


LISTED = ["hh", "summ", "shp", "se"]


@pytest.mark.parametrize("name", ["uc", "summ-sft_m", "hh_m", *LISTED])
def test_skipped_rows_do_not_change_other_ids(put, name):
    """A row's id is its position in the file, bad rows included."""
    file, row, _ = CASES[name]
    bad = BadRows("skip")
    examples = get_dataset(name, "all", data_dir=put(file, [row, {}, row, 5, row]), bad=bad)
    assert [example.row for example in examples] == [0, 2, 4] and len(bad.rows) == 2


# ---- batches -----------------------------------------------------------------------------------------------


def test_several_sets_are_tokenised_once(put, tmp_path, monkeypatch):
    """Sets are concatenated, with second answers only if the loss needs them; the rerun reads the cache."""
    monkeypatch.setattr(tokenization, "tokenize", real := Mock(wraps=tokenization.tokenize))
    put(UC, [ROW])
    put(UC_M, [ROW])
    put("train/hh/x.jsonl", [HH])
    keys = {"data_dir": tmp_path, "output_dir": tmp_path, "local_dirs": [], "heldout_fraction": 0.0}
    settings = SimpleNamespace(**keys, max_length=90, max_prompt_length=60, add_bos=False)

    def answers(names, negative):
        data = load_tokenized(names, "train", TOKENIZER, settings, BadRows(), negative)
        kinds = sorted(data.ids.keys() - {"prompt"})
        return [TOKENIZER.decode(data.part(kind, row)) for row in range(len(data)) for kind in kinds]

    for _ in range(2):
        assert answers(["hh", "uc"], False) == ["Because.</s>"] * 2
        assert answers(["uc_m", "hh"], True) == ["No idea.</s>", "Because.</s>", "No.</s>", "Because.</s>"]
    assert real.call_count == 2
    with pytest.raises(UserError, match=r"'uc' has one answer per prompt.*NAME_PROPOSAL"):
        answers(["hh", "uc"], True)
    with pytest.raises(UserError, match=r"'uc_aligner_common' needs an .*NAME_PROPOSAL_aligner_common"):
        answers(["uc_aligner_common"], False)


def test_every_row_appears_once_per_epoch():
    """Each epoch has its own order, which the seed determines; the last batch is smaller."""
    batches = list(get_batch_iterator(10, 4, n_epochs=3, seed=1))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [np.concatenate(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    assert all(map(np.array_equal, batches, get_batch_iterator(10, 4, n_epochs=3, seed=1)))
    assert not all(map(np.array_equal, batches, get_batch_iterator(10, 4, n_epochs=3, seed=2)))


def test_n_examples_continues_with_the_next_epoch():
    """n_examples is exact and overrides n_epochs."""
    wraps = {0: [], 3: [[0, 1, 2]], 5: [[0, 1, 2], [3, 4]], 7: [[0, 1, 2], [3, 4], [0, 1]]}
    for n_examples, expected in wraps.items():
        batches = get_batch_iterator(5, 3, n_examples=n_examples, n_epochs=9, shuffle=False)
        assert [batch.tolist() for batch in batches] == expected


def test_batch_is_padded_and_labelled_by_position():
    """Prompt and padding have label -100; an answer and its EOS do not, even if the pad token is the EOS."""
    data = tokenize([Example(0, "ab", "c", "defg"), Example(1, "h", "ijk", "l")], TOKENIZER, 9, 4)
    a, b, c, h, i, j, k, eos = *encode(TOKENIZER, ["abchijk"])[0], TOKENIZER.eos_token_id
    batch = {key: tensor.tolist() for key, tensor in collate(data, [1, 0], "target", eos).items()}
    assert batch == {
        "input_ids": [[h, i, j, k, eos], [a, b, c, eos, eos]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
        "labels": [[-100, i, j, k, eos], [-100, -100, c, eos, -100]],
    }
    assert collate(data, np.array([0]), "negative", eos)["input_ids"].shape == (1, 7)


# ---- real files --------------------------------------------------------------------------------------------


def real_rows(name):
    return [row for _, row in read_rows(SHARED / "data" / f"{name}.jsonl.gz")]


@needs_shared
@pytest.mark.parametrize("name, n, by_slice, by_own", [("harmless", 2312, 4, 5), ("helpful", 2354, 2, 9)])
def test_real_hh_rows_with_two_prompts(put, caplog, name, n, by_slice, by_own):
    """Exactly the rows with different prompts are dropped; a check by slicing finds a subset of them."""
    rows = real_rows(f"hh/{name}-base.test")
    examples = get_dataset("hh", "heldout", data_dir=put("test/hh/x.jsonl", rows))
    left = set(range(n)) - {example.row for example in examples}
    assert f"hh: dropped {by_own} of {n} rows" in caplog.text and (len(rows), len(left)) == (n, by_own)
    pairs = [(row["chosen"], row["rejected"]) for row in rows]
    sliced = {i for i, (a, b) in enumerate(pairs) if not b.startswith(a[: a.rindex("\n\nAssistant:") + 12])}
    own = {i for i, pair in enumerate(pairs) if len({t.rsplit("\n\nAssistant:", 1)[0] for t in pair}) > 1}
    assert len(sliced) == by_slice and sliced <= own == left


@needs_shared
@pytest.mark.parametrize(("name", "header"), [("summ-sft", f"\nTL;DR:{HEADER}"), ("hh", HEADER)])
def test_real_prompts_keep_headers_and_ids(put, name, header):
    """200 real prompts, most of them shortened: whole headers, equal ids in training and decoding."""
    rows = real_rows("hh/harmless-base.test" if name == "hh" else "tldr/tldr_1945")[:200]
    if name == "summ-sft":
        rows = [{"instruction": row["prompt"], "output": row["label"]} for row in rows]
    examples = get_dataset(name, "all", data_dir=put("train/hh/x.jsonl" if name == "hh" else TLDR, rows))
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "tinystories-260k")
    data = tokenize(examples, tokenizer, max_length=64, max_prompt_length=48)
    assert len(data) == 200 and data.counts["prompts_cut"] > 100
    for i, example in enumerate(examples):
        ids, text = data.part("prompt", i).tolist(), tokenizer.decode(data.part("prompt", i))
        assert encode_prompts(tokenizer, [example.prompt], 48)[0] == [ids] and len(ids) <= 48
        assert text.startswith("\n\nHuman: ") and text.endswith(header)
