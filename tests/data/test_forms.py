"""Users' own files: every form of a row, as training, sampling and evaluation read it."""

import gzip
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from chatty import chatml_tokenizer

from preference_datasets import DATASETS, get_dataset
from ram.data import catalogue, forms, prompts
from ram.data.chat import ChatTemplate
from ram.data.tokenization import encode, tokenize
from ram.errors import UserError
from ram.evaluation.context import read_test_rows
from ram.storage.files import BadRows

JUDGE: Any = SimpleNamespace()
ASK = [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
ASKED, PLAIN = "S\n\nHuman: Why?\n\nAssistant: ", "\n\nHuman: Why?\n\nAssistant: "
LONG = "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: "
TALK = [*ASK, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
ROWS = [
    ({"messages": ASK + YES}, (ASKED, "Yes.", None)),
    ({"instruction": "Why?", "output": "Yes."}, (PLAIN, "Yes.", None)),
    (
        {"instruction": "Why?", "input": "It rained.", "output": "Yes."},
        ("\n\nHuman: Why?\nIt rained.\n\nAssistant: ", "Yes.", None),
    ),
    ({"prompt": "Why?", "completion": " Yes."}, (PLAIN, "Yes.", None)),
    ({"prompt": ASK, "completion": YES}, (ASKED, "Yes.", None)),
    ({"prompt": "Why?", "chosen": " Yes.", "rejected": " No."}, (PLAIN, "Yes.", "No.")),
    ({"prompt": ASK, "chosen": YES, "rejected": NO}, (ASKED, "Yes.", "No.")),
    ({"chosen": ASK + YES, "rejected": ASK + NO, "messages": ASK + YES}, (ASKED, "Yes.", "No.")),
    ({"prompt": "Why?", "chosen": ASK[1:] + YES, "rejected": ASK[1:] + NO}, (PLAIN, "Yes.", "No.")),
    ({"chosen": f"{PLAIN}Yes.", "rejected": f"{PLAIN}No."}, (PLAIN, "Yes.", "No.")),
    ({"prompt": PLAIN, "chosen": "Yes.", "rejected": "No."}, (PLAIN, "Yes.", "No.")),
    ({"prompt": PLAIN.rstrip(), "chosen": f"{PLAIN}Yes.", "rejected": f"{PLAIN}No."}, (PLAIN, "Yes.", "No.")),
    ({"prompt": LONG, "completion": " Yes."}, (LONG, "Yes.", None)),
    ({"prompt": "Why?", "chosen": TALK + YES, "rejected": TALK + NO}, (f"S{LONG}", "Yes.", "No.")),
    ({"prompt": "And? ", "chosen": TALK + YES, "rejected": TALK + NO}, (f"S{LONG}", "Yes.", "No.")),
    ({"prompt": ASK, "completion": TALK[2:] + YES}, (f"S{LONG}", "Yes.", None)),
    ({"prompt": "Why?", "completion": ASK + YES}, (ASKED, "Yes.", None)),
]
DEFECTS = [
    ({"messages": ASK}, "do not end with one of the assistant"),
    ({"messages": ASK + YES + [{"role": "tool", "content": "x"}]}, "role='tool'"),
    ({"messages": YES}, "no question"),
    ({"messages": "Why?"}, "not a list"),
    ({"messages": [{"role": "user", "content": ["Why?"]}, *YES]}, "messages[0].content is not a text"),
    ({"prompt": "Why?", "completion": " "}, "an empty answer"),
    ({"chosen": ASK + YES, "rejected": NO}, "differ before their last message"),
    ({"chosen": "Yes.", "rejected": "No."}, "not two answers to one dialogue"),
    ({"instruction": 1, "output": "Yes."}, "instruction is not a text"),
    ({"instruction": 1, "prompt": "Why?", "completion": ""}, "an empty answer"),
    ({"prompt": "Who?", "chosen": TALK + YES, "rejected": TALK + NO}, "chosen do not hold the prompt"),
    ({"prompt": "Why?", "chosen": TALK + YES, "rejected": NO}, "differ before their last message"),
    ({"prompt": ASK, "completion": [{"role": "system", "content": "T"}, *YES]}, "another system message"),
    ({"prompt": "Why?", "completion": f"{PLAIN}"}, "does not end with a message of the assistant"),
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["my.jsonl", "my.json", "my.jsonl.gz"])
def test_every_form_is_read(tmp_path, name):
    path = write(tmp_path / name, [row for row, _ in ROWS])
    examples = get_dataset(str(path), "all", data_dir=tmp_path)
    assert [(e.prompt, e.target, e.negative) for e in examples] == [expected for _, expected in ROWS]
    assert [e.row for e in examples] == list(range(len(ROWS)))


def test_chat_template_renders_every_form(tmp_path):
    """The roles and the system message go to the places that the template has for them."""
    chat = ChatTemplate(chatml_tokenizer())
    path = write(tmp_path / "my.jsonl", [row for row, _ in ROWS])
    for example, (_, (ram, *_)) in zip(
        get_dataset(str(path), "all", data_dir=tmp_path, chat=chat), ROWS, strict=True
    ):
        system, turns = prompts.parse_dialogue(ram)
        assert example.prompt == chat.render(turns, system)


@pytest.mark.parametrize(("row", "words"), DEFECTS)
def test_unusable_row_is_refused_or_skipped(tmp_path, row, words):
    path = write(tmp_path / "my.jsonl", [ROWS[0][0], row])
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        get_dataset(str(path), "all", data_dir=tmp_path)
    assert f"{path}, record 2: " in str(caught.value)
    bad = BadRows("skip")
    assert len(get_dataset(str(path), "all", data_dir=tmp_path, bad=bad)) == len(bad.rows) == 1


def test_file_of_another_form_is_refused(tmp_path):
    """Even if bad rows are skipped: the message has the fields found and the forms accepted."""
    path = write(tmp_path / "my.jsonl", [{"question": "Why?", "text": "So."}])
    expected = re.escape(f"{path}: found the fields question, text; expected {forms.ACCEPTED}")
    for bad in (None, BadRows("skip")):
        with pytest.raises(UserError, match=expected):
            get_dataset(str(path), "all", data_dir=tmp_path, bad=bad)
        with pytest.raises(UserError, match=expected):
            read_test_rows(path, [settings()], JUDGE, bad or BadRows("skip"), is_own=True)


def settings(**changes: Any) -> Any:
    keys = {"input_key": "instruction", "output_key": "output", "system_key": None, "for_aligner": False}
    return SimpleNamespace(**keys | {"template": "ram", "multiround": False, "limit": None} | changes)


def test_test_file_takes_the_same_forms(tmp_path):
    """A test row has the prompt of the training row, and a question that a judge can read."""
    path = write(tmp_path / "my.jsonl", [row for row, _ in ROWS])
    rows = read_test_rows(path, [settings()], JUDGE, BadRows(), is_own=True)
    chat = ChatTemplate(chatml_tokenizer())
    for (_, row), (_, (prompt, answer, _)) in zip(rows, ROWS, strict=True):
        assert prompts.from_record(row, settings()) == prompt
        assert row["output"] == answer and "Why?" in row["instruction"]
        system, turns = prompts.parse_dialogue(prompt)
        assert prompts.from_record(row, settings(template="chat"), chat) == chat.render(turns, system)
    assert rows[1][1] == ROWS[1][0], "a row with instruction and output stays as it is"


def test_sampled_variant_is_named_after_the_file(tmp_path):
    """Its held-out prompts are those of the file; its second answers are the samples."""
    rows = [{"prompt": f"Q{i}", "completion": "a"} for i in range(20)]
    path = write(tmp_path / "my.data.jsonl.gz", rows)
    name = f"{path}_toy-large"
    assert catalogue.parse_name(f"{name}_aligner_warmup", DATASETS) == (
        str(path),
        "toy-large",
        "aligner_warmup",
    )
    sampled = catalogue.local_file(name, tmp_path, DATASETS)
    assert sampled is not None
    assert sampled == tmp_path / "train" / "my_sampling_toy-large.data.jsonl"
    sampled.parent.mkdir()
    write(sampled, [row | {"sampling": "b"} for row in rows])
    for split in ("train", "heldout"):
        plain, pairs = (
            get_dataset(n, split, data_dir=tmp_path, heldout_fraction=0.2) for n in (str(path), name)
        )
        assert [e.prompt for e in plain] == [e.prompt for e in pairs]
        assert len(plain) == {"train": 16, "heldout": 4}[split]
        assert {e.negative for e in pairs} == {"b"}
    assert catalogue.short_name(str(path)) == "my.data"
    assert catalogue.short_name("uc") == "uc"


@pytest.mark.parametrize("chat", [None, ChatTemplate(chatml_tokenizer())], ids=["ram", "chat"])
def test_prompts_are_held_out_whole_whatever_the_template(tmp_path, chat):
    """Rows of one instruction with different inputs are different prompts; equal prompts stay together."""
    rows = [{"instruction": "Sort.", "input": str(i % 10), "output": str(i)} for i in range(20)]
    path = write(tmp_path / "my.jsonl", rows)
    held, trained = (
        get_dataset(str(path), split, data_dir=tmp_path, heldout_fraction=0.3, chat=chat)
        for split in ("heldout", "train")
    )
    inputs = [{(example.record or {})["input"] for example in part} for part in (held, trained)]
    assert [len(held), len(trained)] == [6, 14] and not inputs[0] & inputs[1]
    assert inputs[0] == {"2", "4", "8"}


def test_samples_of_another_file_of_the_name_are_refused(tmp_path):
    """Sampled files lie in one folder, wherever the files are that they were made from."""
    rows = {name: [{"prompt": f"{name}{i}", "completion": "a"} for i in range(9)] for name in ("one", "two")}
    files = {name: tmp_path / name / "data.jsonl" for name in rows}
    for name, path in files.items():
        path.parent.mkdir()
        write(path, rows[name])
    sampled = tmp_path / "train" / "data_sampling_p.jsonl"
    sampled.parent.mkdir()
    write(sampled, [row | {"sampling": "b", catalogue.CUT: "length"} for row in rows["one"][:5]])
    assert len(get_dataset(f"{files['one']}_p", "all", data_dir=tmp_path)) == 5
    with pytest.raises(UserError, match="5 of 5 rows are not in .*two/data.jsonl"):
        get_dataset(f"{files['two']}_p", "all", data_dir=tmp_path)


def test_empty_text_is_told_by_its_name(tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": "a part"}, {"text": " "}])
    with pytest.raises(UserError, match="record 2: text is empty"):
        get_dataset(str(path), "all", data_dir=tmp_path)
    assert len(get_dataset(str(path), "all", data_dir=tmp_path, bad=BadRows("skip"))) == 1


def test_parts_of_a_text_are_targets_without_question_or_end(tmp_path):
    """They are held out by their own text, the first token is predicted by nothing, and no EOS follows."""
    texts = [f"part {number} of a text" for number in range(20)]
    path = write(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    parts = {
        split: get_dataset(str(path), split, data_dir=tmp_path, heldout_fraction=0.2)
        for split in ("train", "heldout")
    }
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 16, "heldout": 4}
    assert sorted(example.target for part in parts.values() for example in part) == sorted(texts)
    tokenizer = chatml_tokenizer()
    data = tokenize(parts["heldout"], tokenizer, max_length=64, max_prompt_length=32)
    for index, example in enumerate(parts["heldout"]):
        assert data.part("prompt", index).size == 0
        assert data.part("target", index).tolist() == encode(tokenizer, [example.target])[0]
