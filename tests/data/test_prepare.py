"""ram.data.prepare: accepted formats, error messages, drawing test rows, reading from the hub."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import pipeline
import utils
from ram.data import prepare as prepare_data
from ram.errors import UserError
from ram.evaluation import length_control
from ram.storage import files
from ram.storage.files import read_rows

ROOT = Path(__file__).resolve().parents[2]

PAIR = {"instruction": "Why?", "output": "Because."}
ASK = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Why?"
HH = {"chosen": f"{ASK}\n\nAssistant: Because.", "rejected": f"{ASK}\n\nAssistant: No."}
UNEQUAL = {"chosen": HH["chosen"], "rejected": "\n\nHuman: How?\n\nAssistant: No."}
ALPACA = {"dataset": "koala", **PAIR, "generator": "gpt4_1106_preview"}
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]

UC_FILE = "train/ultrachat_round_one.json"
SUMM_FILE, SUMM_TEST = "train/openai_summarize_tldr.jsonl", "test/openai_summarize_tldr_test_300.json"
HELPFUL, HARMLESS = "test/hh_helpful_test_chosen_300.json", "test/hh_harmless_test_chosen_300.json"
ALPACA_FILE = "test/alpaca_eval_gpt4_baseline.json"
GAMED_FILE = "test/alpaca_eval_length_control.csv"
GAMED = {"index": 0, "preference": 0.25, "std_delta_len": -1.5, "instruction_difficulty": 0.75}
GAMED |= {"not_gamed_baseline": False, "model": "brief"}
GAMED_CSV = (
    "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,0.25,-1.5,0.75,False\n"
)


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """Collects the messages of the project's log."""
    lines = []
    monkeypatch.setattr(utils.log, "info", lines.append)
    return lines


@pytest.fixture
def put(tmp_path):
    """Writes rows, or text unchanged, to a file in a separate folder."""

    def write(name, rows):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, str):
            text = rows
        elif ".jsonl" in name:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            text = json.dumps(rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def rows_of(path):
    return [row for _, row in read_rows(path)]


# ---- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("row", "instruction"),
    [
        ({"id": "0", "data": ["Why?", "Because.", "Really?", "Yes."]}, "Why?"),
        ({"prompt": "Why?", "messages": TURNS}, "Why?"),
        ({"messages": [{"role": "system", "content": "Be brief."}, *TURNS]}, "Why?"),
        ({**PAIR, "input": "", "chosen": "x"}, "Why?"),
        ({**PAIR, "input": "The sky."}, "Why?\nThe sky."),
    ],
)
def test_uc_takes_dialogues_and_pairs(prepare, put, data_dir, name, row, instruction):
    prepare("uc", "--from", put(name, [row]))
    assert rows_of(data_dir / UC_FILE) == [{"instruction": instruction, "output": "Because."}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "POST: x\n\nTL;DR:", "label": "Short.", "subreddit": "a"},
        {"prompt": "POST: x\n\nTL;DR:", "completion": " Short."},
        {"instruction": "POST: x\n\nTL;DR:", "output": "Short."},
    ],
)
def test_summ_takes_three_formats_and_both_splits(prepare, put, data_dir, row):
    expected = {"instruction": "POST: x\n\nTL;DR:", "output": "Short."}
    prepare("summ", "--from", put("latest.jsonl", [row]))  # no test, though "test" is in its name
    assert rows_of(data_dir / SUMM_FILE) == [expected] and not (data_dir / SUMM_TEST).exists()
    prepare("summ", "--from", put("tldr_test.jsonl", [row]))
    assert rows_of(data_dir / SUMM_TEST) == [expected | {"generator": "human", "dataset": "summ/test"}]
    prepare("summ", "--split", "test", "--overwrite", "--from", put("x.json", [row, row]))
    assert len(rows_of(data_dir / SUMM_TEST)) == 2


def test_summ_takes_parquet_files(prepare, tmp_path, data_dir):
    path = tmp_path / "train-00000-of-00001-e8.parquet"
    datasets.Dataset.from_list([{"prompt": "POST: x\n\nTL;DR:", "label": "Short."}]).to_parquet(path)
    prepare("summ", "--from", path)
    assert rows_of(data_dir / SUMM_FILE) == [{"instruction": "POST: x\n\nTL;DR:", "output": "Short."}]
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        prepare("summ", "--overwrite", "--from", path)


@pytest.mark.parametrize(
    ("name", "arguments", "written"),
    [
        ("helpful-base.test.jsonl.gz", [], ["test/hh/helpful-base.jsonl", HELPFUL]),
        ("harmless-base/test.jsonl.gz", [], ["test/hh/harmless-base.jsonl", HARMLESS]),
        ("test/helpful-online.jsonl", [], ["test/hh/helpful-online.jsonl"]),
        ("helpful-rejection-sampled/train.jsonl", [], ["train/hh/helpful-rejection-sampled.jsonl"]),
        ("harmless-base.json", ["--split", "train"], ["train/hh/harmless-base.jsonl"]),
    ],
)
def test_hh_target_depends_on_the_file_name(prepare, put, data_dir, name, arguments, written):
    prepare("hh", *arguments, "--from", put(name, [HH, {**HH, "extra": 1}]))
    assert {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*.*")} == set(written)
    assert rows_of(data_dir / written[0]) == [HH, HH]


def test_hh_test_sample_drops_unusable_comparisons(prepare, put, data_dir, logged):
    silent = {"chosen": f"{ASK}\n\nAssistant:", "rejected": f"{ASK}\n\nAssistant: No."}
    broken = {"chosen": "Hello", "rejected": "Hello"}
    prepare("hh", "--from", put("harmless-base.test.jsonl", [UNEQUAL, HH, silent, broken]))
    assert rows_of(data_dir / HARMLESS) == [
        {
            "instruction": f"{ASK}\n\nAssistant: ",
            "output": "Because.",
            "generator": "chosen",
            "dataset": "hh/harmless-base/test",
        }
    ]
    assert rows_of(data_dir / "test/hh/harmless-base.jsonl") == [UNEQUAL, HH, silent]
    assert "skipped 1 of 4: 1 no '\\n\\nAssistant:' in a dialogue" in logged[0]
    assert "1 rows" in logged[1] and "fewer than 300" in logged[1]
    for reason in ("3 of 4", "1 chosen and rejected prompts differ", "1 no question or no answer"):
        assert reason in logged[1]


def test_alpaca_keeps_every_row_in_its_order(prepare, put, data_dir):
    rows = [ALPACA, {**ALPACA, "output": ""}, {**ALPACA, "instruction": "How?", "extra": 1}]
    prepare("alpaca", "--from", put("model_outputs.json", rows))
    assert rows_of(data_dir / ALPACA_FILE) == [*rows[:2], {**ALPACA, "instruction": "How?"}]


def test_alpaca_length_control_keeps_the_columns_it_reads(prepare, put, data_dir):
    """The reduced file, made alone or with the questions, reads like the full df_gamed.csv."""
    source = put("df_gamed.csv", ",".join(GAMED) + "\n" + 805 * (",".join(map(str, GAMED.values())) + "\n"))
    prepare("alpaca", "--from", source)
    assert not (data_dir / ALPACA_FILE).exists()
    prepare("alpaca", "--from", put("x.json", [ALPACA]), source)
    assert rows_of(data_dir / ALPACA_FILE) == [ALPACA]
    assert (data_dir / GAMED_FILE).read_text().startswith(GAMED_CSV)
    reduced = length_control.read_gamed(data_dir / GAMED_FILE)
    full = length_control.read_gamed(source)
    assert all((a == b).all() for a, b in zip(reduced, full, strict=True)) and len(reduced.difficulty) == 805
    assert f"test/{length_control.FILE}" == GAMED_FILE


def test_several_files_are_read_in_order(prepare, put, data_dir):
    files = [put("b.jsonl", [{"data": ["1", "a"]}]), put("a.json", [{"instruction": "2", "output": "b"}])]
    prepare("uc", "--from", *files)
    assert [row["instruction"] for row in rows_of(data_dir / UC_FILE)] == ["1", "2"]


def test_log_line_has_path_rows_checksum_and_skipped_rows(prepare, put, data_dir, logged):
    rows = [{"data": ["Why?", "Because."]}, {"data": ["Why?"]}, {"data": ["Why?", " "]}, {"data": [1, 2]}]
    rows += [{"messages": TURNS[::-1]}, {"text": "x"}, {}]
    prepare("uc", "--from", put("x.jsonl", rows))
    assert len(logged) == 1
    digest = files.file_sha256(data_dir / UC_FILE)[:16]
    assert logged[0].startswith(f"{data_dir / UC_FILE}: 1 rows, sha256 {digest}, ")
    assert "skipped 6 of 7: 3 no question or no answer; 1 does not begin with a user turn" in logged[0]
    for reason in (
        "(found: text)",
        "(found: none)",
        "fewer than 120,000",
    ):
        assert reason in logged[0]


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name", "content", "message"),
    [
        (["uc"], "x.jsonl", [{"text": "x"}], r"none of 1 rows.*found: text.*expected data \(a list"),
        (["summ"], "x.json", [{"prompt": "x"}], "expected prompt and label"),
        (["hh"], "helpful-base.test.jsonl", [{"chosen": "x"}], "expected chosen and rejected"),
        (["hh"], "helpful-base.test.jsonl", [UNEQUAL], "1 chosen and rejected prompts differ"),
        (["alpaca"], "x.json", [PAIR], "expected dataset, instruction, output and generator"),
        (["alpaca"], "x.csv", "index,preference\n0,1\n", "expected .* or the columns of df_gamed.csv"),
        (["uc"], "x.jsonl", "", "no usable record"),
        (["uc"], "x.json", "", "not valid JSON"),
        (["uc"], "x.json", "[]", "no usable record"),
        (["uc"], "x.json", '[{"data": ["Why?", "Bec', "line 1.*truncated"),
        (["uc"], "x.json", '{"data": ["Why?", "Because."]}', "expected a JSON list"),
        (["uc"], "x.jsonl", '{"data": ["Why?", "Because."]}\n{"data": ["W', "line 2.*truncated"),
        (["uc"], "x.jsonl", '{"data": ["Why?", "Because."]}\n"text"\n', "line 2"),
        (
            ["hh"],
            "test.jsonl.gz",
            [HH],
            r"name it SUBSET.SPLIT.jsonl.gz.*one of helpful-base, .*harmless-base",
        ),
        (["hh"], "red-team-attempts/train.jsonl.gz", [HH], "cannot tell which part of hh"),
        (["hh"], "helpful-base.jsonl", [HH], "SPLIT is train or test"),
        ([], "x.json", [PAIR], "name it first"),
        (["uc", "summ"], "x.json", [PAIR], "name it first"),
        (["uc", "--split", "test"], "x.json", [PAIR], "leave it out"),
    ],
)
def test_input_errors_are_one_line_and_write_nothing(
    prepare, put, data_dir, arguments, name, content, message
):
    with pytest.raises(UserError, match=message) as error:
        prepare(*arguments, "--from", put(name, content))
    assert "\n" not in str(error.value)
    # test/hh may have been written: its comparisons are usable even if no test row can be drawn from them.
    assert not [path for path in data_dir.rglob("*.json*") if path.parent.name != "hh"]


def test_unknown_names_and_missing_or_truncated_files(prepare, put, tmp_path, data_dir):
    with pytest.raises(UserError, match="unknown data set 'sum': did you mean 'summ'"):
        prepare("uc", "sum")
    with pytest.raises(UserError, match="no such file"):
        prepare("uc", "--from", tmp_path / "none.json")
    with pytest.raises(UserError, match="--split"):
        prepare("summ", "--split", "test")
    path = put("x.jsonl.gz", [PAIR] * 50)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        prepare("uc", "--from", path)
    assert not data_dir.exists()


def test_existing_file_is_kept_without_overwrite(prepare, put, data_dir, logged):
    first, second = put("a.json", [PAIR]), put("b.json", [PAIR, PAIR])
    prepare("uc", "--from", first)
    before = (data_dir / UC_FILE).read_bytes()
    prepare("uc", "--from", second)
    assert (data_dir / UC_FILE).read_bytes() == before and "kept (--overwrite" in logged[-1]
    prepare("uc", "--overwrite", "--from", second)
    assert len(rows_of(data_dir / UC_FILE)) == 2
    with pytest.raises(UserError):
        prepare("uc", "--overwrite", "--from", put("c.json", [{"text": "x"}]))
    assert len(rows_of(data_dir / UC_FILE)) == 2  # the old file stays until the new one is complete
    assert [path.name for path in (data_dir / "train").iterdir()] == ["ultrachat_round_one.json"]


def test_script_reports_a_user_error_in_one_line(tmp_path):
    command = ["bash", ROOT / "bin" / "prepare_data.sh", "uk"]
    environment = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "did you mean 'uc'" in result.stderr


# ---- the draw ----------------------------------------------------------------------------------------------


def test_draw_depends_on_seed_and_rows_only():
    rows = [{"instruction": f"{i}", "output": "x"} for i in range(1000)]
    drawn = prepare_data.draw(rows, 300, seed=0)
    assert len(drawn) == 300 and drawn == sorted(drawn, key=rows.index)
    assert prepare_data.draw(rows, 300, seed=0) == drawn
    shuffled = prepare_data.draw(rows[::-1], 300, seed=0)
    assert shuffled == drawn[::-1]
    assert prepare_data.draw(rows, 300, seed=1) != drawn
    assert prepare_data.draw(rows[:5], 300, seed=0) == rows[:5]
    # Literal values, since every machine must draw the same rows.
    assert [row["instruction"] for row in drawn[:5]] == ["0", "2", "10", "11", "13"]


# ---- the hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: records the requested files and returns tiny rows."""
    requests = []

    def load_dataset(builder, data_files, split, streaming):
        requests.append(data_files.removeprefix("hf://datasets/"))
        assert split == "train" and streaming
        kind = {"parquet": "parquet", "csv": "csv"}.get(data_files.rpartition(".")[2], "json")
        assert builder == kind
        if "UltraChat" in data_files:
            return iter([{"id": "0", "data": ["Why?", "Because.", "More?"]}] * 120_003)
        if "tldr" in data_files:
            return iter([{"prompt": f"POST: {i}\n\nTL;DR:", "label": f"{i}"} for i in range(400)])
        if "hh-rlhf" in data_files:
            return iter([UNEQUAL, *({k: f"{i}" + v for k, v in HH.items()} for i in range(400))])
        return iter([GAMED] * 1610) if "gamed" in data_files else iter([ALPACA] * 805)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


def test_all_data_sets_from_the_hub(prepare, hub, data_dir, logged):
    prepare()
    assert {path.relative_to(data_dir).as_posix() for path in data_dir.rglob("*.json*")} == {
        *(UC_FILE, SUMM_FILE, SUMM_TEST, HELPFUL, HARMLESS, ALPACA_FILE),
        *(f"{part}/hh/{name}.jsonl" for part in ("train", "test") for name in prepare_data.HH_SUBSETS),
    }
    assert len(rows_of(data_dir / UC_FILE)) == 120_000
    assert len(rows_of(data_dir / SUMM_FILE)) == 400 and len(rows_of(data_dir / ALPACA_FILE)) == 805
    assert len(rows_of(data_dir / "train/hh/helpful-online.jsonl")) == 401
    for file in (SUMM_TEST, HELPFUL, HARMLESS):
        assert len(rows_of(data_dir / file)) == 300
    assert {"openbmb/UltraChat/train_[01].jsonl", "Anthropic/hh-rlhf/harmless-base/train.jsonl.gz"} < set(hub)
    assert "tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json" in hub
    assert "tatsu-lab/alpaca_eval/df_gamed.csv" in hub
    assert (data_dir / GAMED_FILE).read_text().startswith(GAMED_CSV)
    assert not [name for name in hub if "red-team" in name]

    before = {path: files.file_sha256(path) for path in data_dir.rglob("*.json*")}
    requests = len(hub)
    prepare()
    assert len(hub) == requests and "kept" in logged[-1]  # nothing is requested for existing files
    prepare("summ", "hh", "--overwrite")
    assert {path: files.file_sha256(path) for path in data_dir.rglob("*.json*")} == before


def test_hub_formats_are_read_by_the_datasets_library(prepare, put, monkeypatch, data_dir):
    """The real calls with a folder in place of the hub: gzip, JSON list, parquet, file patterns."""
    pairs = [{"data": [f"{i}", "Because."]} for i in range(4)]
    put("openbmb/UltraChat/train_1.jsonl", pairs[2:])
    put("openbmb/UltraChat/train_0.jsonl", pairs[:2])
    put("Anthropic/hh-rlhf/README.md", "")
    for name in prepare_data.HH_SUBSETS:
        for part in ("train", "test"):
            put(f"Anthropic/hh-rlhf/{name}/{part}.jsonl.gz", [HH, UNEQUAL])
    folder = put("tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json", [ALPACA, ALPACA]).parents[2]
    put("tatsu-lab/alpaca_eval/df_gamed.csv", f"{','.join(GAMED)}\n{','.join(map(str, GAMED.values()))}\n")
    for part in ("train", "test"):
        path = folder / "CarperAI/openai_summarize_tldr/data" / f"{part}-00000-of-00001-e8.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"prompt": f"{part} TL;DR:", "label": "Short."}]).to_parquet(path)
    load = datasets.load_dataset

    def load_locally(builder, data_files, **arguments):
        return load(builder, data_files=data_files.replace("hf://datasets", str(folder)), **arguments)

    monkeypatch.setattr(datasets, "load_dataset", load_locally)
    prepare()
    assert [row["instruction"] for row in rows_of(data_dir / UC_FILE)] == ["0", "1", "2", "3"]
    assert rows_of(data_dir / SUMM_FILE) == [{"instruction": "train TL;DR:", "output": "Short."}]
    assert rows_of(data_dir / SUMM_TEST)[0]["instruction"] == "test TL;DR:"
    assert rows_of(data_dir / "train/hh/helpful-online.jsonl") == [HH, UNEQUAL]
    assert len(rows_of(data_dir / HARMLESS)) == 1 and rows_of(data_dir / ALPACA_FILE) == [ALPACA, ALPACA]
    assert (data_dir / GAMED_FILE).read_text() == GAMED_CSV


def test_unreachable_hub_error_names_files_and_command(prepare, monkeypatch, data_dir):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name, sources in {
        "uc": "train_[01].jsonl",
        "summ": "data/train-*.parquet data/test-*.parquet",
        "hh": "helpful-base/train.jsonl.gz helpful-online/train.jsonl.gz",
        "alpaca": "alpaca_eval_gpt4_baseline.json df_gamed.csv",
    }.items():
        with pytest.raises(UserError, match="ConnectionError") as error:
            prepare(name)
        assert f"python -m ram.data.prepare {name} --from {sources}" in str(error.value)
        assert prepare_data.SOURCES[name][0] in str(error.value) and "\n" not in str(error.value)
    assert not data_dir.exists()


def test_lost_connection_leaves_no_partial_file(prepare, monkeypatch, data_dir):
    def rows():
        yield {"data": ["Why?", "Because."]}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(UserError, match="--from train"):
        prepare("uc")
    assert not data_dir.exists()


def test_every_test_file_of_the_pipeline_has_a_target():
    targets = {target.file for target in prepare_data.TARGETS}
    names = [
        name for dataset, tasks in pipeline.test_files.items() if dataset != "toy" for name in tasks.values()
    ]
    assert {f"test/{name}" for name in names} <= targets


def test_data_readme_names_every_file_and_has_valid_examples():
    text = (ROOT / "_data" / "README.md").read_text(encoding="utf-8")
    for target in prepare_data.TARGETS:
        assert target.file in text or f"{Path(target.file).parent.as_posix()}/SUBSET.jsonl" in text
        assert prepare_data.SOURCES[target.name][0] in text
    examples = re.findall(r"```json\n(.*?)\n```", text, flags=re.DOTALL)
    assert len(examples) >= 10 and all(isinstance(json.loads(example), dict) for example in examples)
