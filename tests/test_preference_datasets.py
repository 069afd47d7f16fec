"""From rows on disk to batches: exact texts of every data set, the held-out split, ids, cache and order."""

import contextlib
import gzip
import json
import re
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny import EOS, PAD, SHARED, byte_tokenizer, needs_shared
from transformers import AutoTokenizer

import prompts
import tokenization
from preference_datasets import (
    DATASETS,
    collate,
    get_batch_iterator,
    get_dataset,
    html_to_text,
    load_tokenized,
    local_file,
    parse_name,
)
from tokenization import Example, encode, encode_prompts, tokenize
from utils import BadRows, UserError

TOKENIZER = byte_tokenizer()
ASK = "\n\nHuman: Why?\n\nAssistant: "
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
ALPACA_M = "train/alpaca_data_cleaned_sampling_m.json"
FIX = "No idea.\n\nCorrection: "

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
    "shp": ("train/shp/x.jsonl", SHP, [("\n\nHuman: Why?\n\nAssistant:", " A", " B")]),
    "se": ("train/se/x.jsonl", SE, [("\n\nHuman: Why < <code>x&1</code>?\n\nAssistant:", " A", " B\nb")]),
    "toy": ("train/toy_aligned.jsonl", ROW, [PLAIN]),
    "toy_m": ("train/toy_aligned_sampling_m.jsonl", ROW, [PAIR]),
    "toy-mixture": ("train/toy_mixture.jsonl", ROW, [PLAIN]),
    "toy-general": ("train/toy_general.jsonl", ROW, [PLAIN]),
}


@pytest.fixture
def put(tmp_path):
    """Writes rows (or bytes as they are) into a file below data_dir and returns data_dir."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in name else None
        data = rows if isinstance(rows, bytes) else (text or json.dumps(rows)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") and data is not rows else data)
        return tmp_path

    return write


def texts(examples):
    return [(example.prompt, example.target, example.negative) for example in examples]


# ---- every name --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_every_data_set_becomes_these_texts(put, name):
    """Prompt and answers of one literal row, letter by letter, with its place and the row itself."""
    file, row, expected = CASES[name]
    examples = get_dataset(name, "all", data_dir=put(file, [row]))
    assert texts(examples) == expected
    assert [(example.row, example.record) for example in examples] == [(0, row)]


def test_every_data_set_has_a_case():
    """A data set added to the table gets its texts checked above."""
    assert {parse_name(name)[0] for name in CASES} == set(DATASETS)


@pytest.mark.xfail(strict=True, reason="all correctors are asked by '\\n\\nCorrection: '")
def test_the_raw_alpaca_prompt_has_its_own_request(put):
    """Alpaca's sampled runs have no headers, and their corrector asks in that style."""
    (example,) = get_dataset("alpaca_m_aligner_common", "all", data_dir=put(ALPACA_M, [ROW]))
    assert example.prompt == "Why?No idea.\n\n### Correction:\n"


@pytest.mark.parametrize(
    ("a", "b", "label", "expected"),
    [
        (8, 4, 0, (" B", " A")),
        (4, 8, 0, (" B", " A")),
        (7, 4, 1, None),
        (4, 7, 0, None),
        (3, 0, 1, (" A", " B")),
    ],
)
def test_shp_keeps_pairs_of_clear_preference(put, a, b, label, expected):
    """The label says which answer is preferred; a pair within a factor of two says too little and is left."""
    rows = [SHP, SHP | {"score_A": a, "score_B": b, "labels": label}]
    found = get_dataset("shp", "all", data_dir=put("train/shp/x.jsonl", rows))
    assert [(e.row, e.target, e.negative) for e in found[1:]] == ([(1, *expected)] if expected else [])


def test_se_pairs_every_better_answer_with_every_worse(put):
    """Three scores of which two are equal give two pairs; equal answers are never compared."""
    answers = [{"pm_score": score, "text": text} for score, text in ((1, "c"), (5, "a"), (1, "b"), (3, "d"))]
    found = get_dataset("se", "all", data_dir=put("train/se/x.jsonl", [SE | {"answers": answers}]))
    expected = {("a", "d"), ("a", "b"), ("a", "c"), ("d", "b"), ("d", "c")}
    assert Counter((e.target.strip(), e.negative.strip()) for e in found) == Counter(expected)


@pytest.mark.xfail(strict=True, raises=TypeError, reason="scores are compared outside the check of the row")
def test_se_answers_without_a_score_are_a_bad_row(put):
    """A null score is reported as a bad row, not as a crash of the sort."""
    answers = [{"pm_score": None, "text": "a"}, {"pm_score": 1, "text": "b"}]
    data_dir = put("train/se/x.jsonl", [SE, SE | {"answers": answers}])
    assert len(get_dataset("se", "all", data_dir=data_dir, bad=BadRows("skip"))) == 1


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p>\n\n<p>b &amp; c</p>\n", "a\n\nb & c"),
        ("<ul><li>a</li><li>b</li></ul>", "a\n\nb"),
        ("<pre><code>if x:\n    y\n</code></pre>", "<code>if x:\n    y\n</code>"),
        ('a <a href="x">link</a> <img src="y"> <b>bold</b>', "a link  bold"),
        ("a < b", "a < b"),
        ("", ""),
    ],
)
def test_html_becomes_text(html, text):
    """Paragraphs stand apart, entities are characters, code keeps its tags and indentation, the rest goes."""
    assert html_to_text(html) == text


@pytest.mark.xfail(strict=True, reason="the collapse of empty lines takes the next line's indentation too")
def test_code_keeps_its_indentation_after_an_empty_line():
    """An empty line inside a program leaves the program as it was."""
    source = "<code>def f():\n    x = 1\n\n    return x</code>"
    assert html_to_text(f"<pre>{source}</pre>") == source


# ---- names -------------------------------------------------------------------------------------------------


def test_names_are_taken_apart():
    """Base, proposal and Aligner variant, each optional part alone and together, underscores in proposals."""
    assert parse_name("summ-sft") == ("summ-sft", None, None)
    assert parse_name("uc_llama8b_aligner_warmup") == ("uc", "llama8b", "aligner_warmup")
    assert parse_name("hh_aligner_common") == ("hh", None, "aligner_common")
    assert parse_name("uc_my_model_2") == ("uc", "my_model_2", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ucc", "unknown data set 'ucc': did you mean 'uc'?"),
        ("harmles_llama8b", "unknown data set 'harmles_llama8b': did you mean 'harmless'?"),
        ("sum-sft_m_aligner_warmup", "did you mean 'summ-sft'?"),
        ("", "unknown data set ''"),
        ("summ_m", "'summ' has no sampled variant; drop '_m'"),
        ("toy-general_m", "'toy-general' has no sampled variant"),
    ],
)
def test_unknown_names_say_what_is_near(name, message):
    """A wrong name is one line with the nearest right one, or what of it must go."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        parse_name(name)
    assert "\n" not in str(error.value)


def test_a_name_tells_its_one_file(tmp_path):
    """Where a name stands for one file, that is the file the loader reads; sets of many files have none."""
    for name, (file, _, _) in CASES.items():
        found = local_file(name, tmp_path)
        assert found == (None if file.count("/") == 2 else tmp_path / file)


def test_a_correction_needs_an_answer_to_correct(put):
    """The Aligner variant of a set with one answer says which variant to take."""
    with pytest.raises(
        UserError, match=r"'uc_aligner_common' needs an answer .*NAME_PROPOSAL_aligner_common"
    ):
        get_dataset("uc_aligner_common", "all", data_dir=put(UC, [ROW]))


# ---- the hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked", "row"),
    [
        ("hh", ("Anthropic/hh-rlhf", None), HH),
        ("harmless", ("Anthropic/hh-rlhf", "harmless-base"), HH),
        ("summ", ("CarperAI/openai_summarize_comparisons", None), SUMM),
        ("shp", ("stanfordnlp/SHP", None), SHP),
        ("se", ("HuggingFaceH4/stack-exchange-preferences", None), SE),
    ],
)
def test_what_is_not_local_comes_from_the_hub(tmp_path, monkeypatch, name, asked, row):
    """The hub is asked for the right set, part and folder, and its rows become the same texts as a file's."""
    calls = []

    def load(hub_id, data_dir, split, cache_dir):
        calls.append((hub_id, data_dir, split, cache_dir))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(get_dataset(name, "all", data_dir=tmp_path, cache_dir="here")) == CASES[name][2]
    assert calls == [(*asked, "train", "here")]
    if DATASETS[name].test_folder:
        assert texts(get_dataset(name, "heldout", data_dir=tmp_path)) == CASES[name][2]
        assert calls[1:] == [(*asked, "test", None)]


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    """Without network the message names the set, the cause and where to put files instead."""

    def load(*_, **__):
        raise ConnectionError("a page\nof reasons")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"\AAnthropic/hh-rlhf \(train\) .* \(ConnectionError\); put .*\Z"
    ) as error:
        get_dataset("hh", "train", data_dir=tmp_path)
    assert str(tmp_path / "train" / "hh") in str(error.value)
