"""prepare_data.py on the real data files; skipped where those are not there."""

import pytest
from small import settings
from tiny import SHARED, needs_shared

import pipeline
from preference_datasets import get_dataset
from ram.errors import UserError
from ram.evaluation import context
from ram.evaluation.judges.dummy import DummyJudge
from ram.storage.files import BadRows, read_rows

pytestmark = needs_shared
REAL = SHARED / "data"


def rows_of(path):
    return [row for _, row in read_rows(path)]


def read_test_rows(data_dir, dataset, task):
    """What pipeline.py reads of a test file, found by the names in its table."""
    config = settings(f"data_dir={data_dir}", f"evaluation.dataset={dataset}")
    path = pipeline.test_file(config, task)
    return [row for _, row in context.read_test_rows(path, [config.sampling], DummyJudge(), BadRows())]


def test_real_hh(prepare, data_dir):
    prepare("hh", "--from", *sorted((REAL / "hh").glob("*.jsonl.gz")))
    examples = get_dataset("hh", "heldout", data_dir=data_dir)
    assert len(examples) == 2354 + 2312 - 9 - 5  # rows whose own prompts differ are left out
    assert len(get_dataset("harmless", "heldout", data_dir=data_dir)) == 2312 - 5
    known = {(example.prompt, example.target) for example in examples}
    for task in ("helpful", "harmless"):
        rows = read_test_rows(data_dir, "hh", task)
        assert len(rows) == 300 and {(row["instruction"], row["output"]) for row in rows} <= known
        assert all(row["instruction"].endswith("\n\nAssistant: ") and row["output"] for row in rows)
        assert {row["generator"] for row in rows} == {"chosen"}


def test_real_hh_trains_too(prepare, data_dir, tmp_path):
    source = REAL / "hh" / "harmless-base.test.jsonl.gz"
    (tmp_path / "harmless-base").mkdir()
    (tmp_path / "harmless-base" / "train.jsonl.gz").write_bytes(source.read_bytes())
    prepare("hh", "--from", tmp_path / "harmless-base" / "train.jsonl.gz")
    for name in ("hh", "harmless"):
        assert len(get_dataset(name, "all", data_dir=data_dir)) == 2312 - 5


def test_real_tldr(prepare, data_dir):
    source = REAL / "tldr" / "tldr_1945.jsonl.gz"
    prepare("summ", "--from", source)
    prepare("summ", "--split", "test", "--from", source)
    examples = get_dataset("summ-sft", "all", data_dir=data_dir)
    assert len(examples) == 1945
    assert all(example.prompt.endswith("TL;DR:\n\nAssistant: ") for example in examples)
    rows = read_test_rows(data_dir, "summ-sft", "summ")
    assert len(rows) == 300 and {row["output"] for row in rows} <= {example.target for example in examples}


def test_real_ultrachat(prepare, data_dir):
    """The 1,100 instruction pairs stand in for UltraChat's answers, which are not among the real files."""
    folder = REAL / "ultrachat"
    files = [folder / "instruction_pairs_1100.json", folder / "ultrachat_200k_row0.jsonl"]
    prepare("uc", "--from", *files)
    pairs, dialogue = rows_of(files[0]), rows_of(files[1])[0]
    examples = get_dataset("uc", "all", data_dir=data_dir)
    assert len(examples) == len(pairs) + 1
    assert examples[-1].prompt == f"\n\nHuman: {dialogue['prompt']}\n\nAssistant: "
    assert examples[-1].target == dialogue["messages"][1]["content"]
    with_input = [(e.prompt, row) for e, row in zip(examples, pairs, strict=False) if row["input"].strip()]
    assert len(with_input) == 325
    assert all(f"{row['instruction']}\n{row['input']}\n\nAssistant: " in prompt for prompt, row in with_input)
    with pytest.raises(UserError, match="found: prompt"):
        prepare("uc", "--overwrite", "--from", folder / "ultrachat_prompts.jsonl")


def test_real_alpaca_eval(prepare, data_dir):
    source = REAL / "alpaca_eval" / "gpt4_1106_preview_first300.json"
    prepare("alpaca", "--from", source)
    for dataset in ("uc", "alpaca"):
        assert read_test_rows(data_dir, dataset, "helpful") == rows_of(source)
