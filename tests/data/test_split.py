"""`python -m ram.data.split`: files without a common prompt, the same for the same seed."""

import json

import pytest

from ram.data import split
from ram.errors import UserError
from ram.storage.files import read_rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def posts(count, copies=2):
    return [
        {"post": f"post {i} of some words", "short": f"no. {i}.{k}"}
        for i in range(count)
        for k in range(copies)
    ]


def texts_in(folder, name, *keys):
    return [tuple(row[key] for key in keys) for _, row in read_rows(folder / f"{name}.jsonl")]


def test_equal_prompts_stay_in_one_file(tmp_path):
    source = write(tmp_path / "posts.jsonl", posts(30))
    keys = ["prompt=post", "answer=short", "test=9", "heldout=6", "train=20"]
    split.main([source, f"out={tmp_path / 'a'}", *keys])
    rows = {
        name: texts_in(tmp_path / "a", name, "instruction", "output") for name in ("train", "heldout", "test")
    }
    assert {name: len(found) for name, found in rows.items()} == {"train": 20, "heldout": 6, "test": 10}
    prompts = [{prompt for prompt, _ in found} for found in rows.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    split.main([source, f"out={tmp_path / 'b'}", *keys])
    split.main([source, f"out={tmp_path / 'c'}", *keys, "seed=1"])
    assert texts_in(tmp_path / "b", "test", "output") == texts_in(tmp_path / "a", "test", "output")
    assert texts_in(tmp_path / "c", "test", "output") != texts_in(tmp_path / "a", "test", "output")


def test_prompts_are_cut_between_words_and_end_as_asked(tmp_path):
    rows = [
        {"post": "one two three", "short": "x"},
        {"post": "one", "short": "y"},
        {"post": "z" * 20, "short": "z"},
    ]
    keys = ["prompt=post", "answer=short", "test=1", "heldout=1", "cut=9", "end=!"]
    split.main([write(tmp_path / "posts.jsonl", rows), f"out={tmp_path}", *keys])
    found = [
        row
        for name in ("train", "heldout", "test")
        for row in texts_in(tmp_path, name, "instruction", "output")
    ]
    assert sorted(found) == [("one two!", "x"), ("one!", "y"), ("z" * 9 + "!", "z")]


def test_text_for_language_modelling_has_other_files_no_answer_and_no_test_row(tmp_path):
    """A model that had read the answers of its training rows would seem better there than elsewhere."""
    others = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "no"},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"nothing": "known"},
    ]
    files = [write(tmp_path / "posts.jsonl", posts(12, 1)), write(tmp_path / "others.jsonl", others)]
    keys = ["prompt=post", "answer=short", "test=4", "heldout=2", f"text=[{files[1]}]", "end= TL;DR"]
    split.main([files[0], f"out={tmp_path}", *keys])
    texts = [text for (text,) in texts_in(tmp_path, "text", "text")]
    prompts = [prompt for (prompt,) in texts_in(tmp_path, "train", "instruction")]
    assert all(prompt.endswith(" TL;DR") for prompt in prompts)
    train = [prompt.removesuffix(" TL;DR") for prompt in prompts]
    known = ["hello\n\nthere", "Human: hi\n\nAssistant: yes", "add\n\n1 2\n\n3"]
    assert sorted(texts) == sorted([*train, *known])


def test_pieces_join_to_the_text():
    text = "alpha beta " * 40 + "x" * 50
    parts = list(split.pieces(text, 30))
    assert max(map(len, parts)) <= 30 and "".join(parts).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["test=60"], "30 rows are too few: 30 of 60 for test"),
        (["sed=6"], "did you mean 'seed'"),
        (["test=six"], "are whole numbers"),
        (["answer=summary"], "summary"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, arguments, message):
    source = write(tmp_path / "posts.jsonl", posts(15))
    with pytest.raises(UserError, match=message):
        split.main([source, f"out={tmp_path}", "prompt=post", "answer=short", "heldout=2", *arguments])


def test_no_text_holds_a_prompt_of_test_or_heldout(tmp_path, caplog):
    """Not with its answer, uncut, or quoted in the middle; a short prompt only at the beginning."""
    rows = [{"post": f"post {i} " + "of some words " * 9, "short": f"no. {i}"} for i in range(8)]
    rows += [{"post": "hi", "short": "ho"}]
    others = [{"prompt": row["post"], "completion": row["short"]} for row in rows]
    others += [{"text": f"a reply to: {rows[i]['post'].strip()} by me"} for i in range(8)]
    others += [{"text": "oh hi there"}]
    files = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("posts", rows), ("others", others))]
    keys = ["prompt=post", "answer=short", "test=5", "heldout=3", "cut=60", "end= TL;DR:"]
    with caplog.at_level("INFO"):
        split.main([files[0], f"out={tmp_path}", *keys, f"text={files[1]}"])
    texts = " ".join(text for (text,) in texts_in(tmp_path, "text", "text"))
    held = {row for name in ("test", "heldout") for row in texts_in(tmp_path, name, "instruction", "output")}
    numbers = [answer for _, answer in held if answer != "ho"]
    assert len(numbers) >= 7 and not any(f"post {n.removeprefix('no. ')} " in texts for n in numbers)
    assert "oh hi there" in texts and f"{len(held) + len(numbers)} texts with a prompt of test" in caplog.text


def test_end_of_a_prompt_stands_once(tmp_path):
    rows = [{"post": f"post {i}" + "\nTL;DR:" * (i % 2), "short": "x"} for i in range(6)]
    keys = ["prompt=post", "answer=short", "test=2", "heldout=2", "end=\nTL;DR:"]
    split.main([write(tmp_path / "posts.jsonl", rows), f"out={tmp_path}", *keys])
    prompts = [p for name in ("train", "heldout", "test") for (p,) in texts_in(tmp_path, name, "instruction")]
    assert sorted(prompts) == [f"post {i}\nTL;DR:" for i in range(6)]


@pytest.mark.parametrize(
    "row, text",
    [
        ({"prompt": "a", "label": "b"}, "a\n\nb"),
        ({"prompt": [{"content": "a"}], "completion": [{"content": "b"}]}, "a\n\nb"),
        ({"chosen": [{"content": "a"}, {"content": "b"}]}, "a\n\nb"),
    ],
)
def test_text_of_a_row(row, text):
    assert split.texts_of(row) == [text]
