"""Random damage to every kind of file that is read: refused in a line or made again, never a wrong result."""

import json
import random
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from damage import damage
from sample_report import BOARD
from sample_report import make_report as sample_report
from tiny import byte_tokenizer, save_model_folder, tiny_model

from ram.answers import answer_files
from ram.data.tokenization import Example, tokenize_cached
from ram.data.toy_world import build_world
from ram.errors import UserError
from ram.evaluation.judges.base import Cache
from ram.evaluation.report import gather
from ram.models import checkpoints, run_folder
from ram.storage import provenance
from ram.storage.files import BadRows, file_sha256, read_rows, write_json, write_jsonl
from ram.storage.parts import PartFiles
from ram.storage.records import write_record
from ram.training import resume
from ram.training.metrics import rows_until

TOKENIZER = byte_tokenizer()
EXAMPLES = [Example(i, f"Q{i}", "an answer " * i, "no" * i) for i in range(1, 6)]
ROWS = [{"instruction": f"why {i}?", "output": "é" * i, "n": i, "tags": ["a", None]} for i in range(1, 6)]
WORLD = {"entities": 4, "general_rows": 8, "aligned_rows": 4}
WORLD |= {"general_styles": {"terse": 1.0}, "mixture_styles": {"rude": 1.0}}


# ---- one function per kind: (make its files in a folder, read them again) ----------------------------------
# A reader returns True if what it got is right or is made again, and raises UserError for a refusal.


def make_cache(folder):
    read_cache(folder)


def read_cache(folder):
    settings = SimpleNamespace(output_dir=folder, max_length=64, max_prompt_length=16, add_bos=False)
    data = tokenize_cached(EXAMPLES, "x", TOKENIZER, settings)
    texts = {name: [TOKENIZER.decode(data.part(name, i)) for i in range(len(data))] for name in data.ids}
    return texts["target"] == [e.target + "</s>" for e in EXAMPLES] and texts["prompt"] == [
        e.prompt for e in EXAMPLES
    ]


KEYS = [f"row {i}" for i in range(4)]
ANSWERS = [{"index": i, "text": f"text {i}", "n_tokens": i, "row_key": KEYS[i]} for i in range(4)]


def make_parts(folder):
    parts = PartFiles(folder / "out.json", "identity", False, KEYS)
    for answer in ANSWERS:
        parts.add(answer)
    parts.close()


def read_parts(folder):
    parts = PartFiles(folder / "out.json", "identity", False, KEYS)
    parts.close()
    return all(answer == ANSWERS[index] for index, answer in parts.done.items())


def make_marked(folder):
    output = folder / "output.json"
    write_jsonl(answer_files.trace_path(output), ANSWERS)
    provenance.write_marked(output, ROWS, {"seed": 0}, answer_files.trace_path(output))


def read_marked(folder):
    output = folder / "output.json"
    is_finished = provenance.finished(output, {"seed": 0}, overwrite=False, label="x")
    if not is_finished:
        return True  # set aside and made again
    trace = answer_files.trace_path(output)
    return [row for _, row in read_rows(output)] == ROWS and [r for _, r in read_rows(trace)] == ANSWERS


def make_judgements(folder):
    cache = Cache(folder / "judgements.jsonl")
    for i in range(5):
        cache.add(f"key {i}", i / 4)


def read_judgements(folder):
    return Cache(folder / "judgements.jsonl").known.items() <= {f"key {i}": i / 4 for i in range(5)}.items()


SPEED = {"tokens": 100, "seconds": 2.5, "tokens_per_second": 40.0}


def make_speed(folder):
    write_record(answer_files.speed_path(folder / "x"), SPEED)


def read_speed(folder):
    return answer_files.read_speed(folder / "x") in (None, SPEED)


DONE = {
    "settings": {"lr": 1e-3, "n": None},
    "inputs": {"data": "x"},
    "metrics": {"loss": 1.5},
    "seconds": 9.5,
}


def make_run(folder):
    card = {"add_bos": False, "max_length": 9}
    model = tiny_model(len(TOKENIZER), 0)
    checkpoints.export_model(model, TOKENIZER, folder / "LATEST", "float32", card)
    (folder / "metrics.csv").write_text("split,updates,loss\ntrain,1,0.5\n")
    run_folder.write_done(folder, DONE)


def read_run(folder):
    record = run_folder.finished_run(folder)
    if record is None:
        return True
    run_folder.check_finished(folder, record)
    rows_until(folder / "metrics.csv", 5)
    checkpoints.read_card(str(folder / "LATEST"))
    checkpoints.check_context(str(folder / "LATEST"), 8)
    return all(record[key] == value for key, value in DONE.items())


def stepped():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


FACTS = {"updates": 3, "examples": 24, "tokens": 5, "best": [8, 0.5]}
ORIGIN = {"settings": {"lr": 0.1}}


def make_state(folder):
    saver = resume.Saver(folder, 3)
    for updates in (2, 3):
        saver.save(*stepped(), FACTS | {"updates": updates, "origin": ORIGIN, "seconds": 1.0})
    saver.wait()


def read_state(folder):
    facts = resume.newest(folder, ORIGIN)
    if facts is None:
        return True
    (model, optimizer), (expected, _) = stepped(), stepped()
    with torch.no_grad():
        model.weight.zero_()
    resume.load(facts["folder"], model, optimizer)
    right = all(facts[key] == value for key, value in FACTS.items() if key != "updates")
    return right and facts["updates"] in (2, 3) and torch.equal(model.weight, expected.weight)


def make_world(folder):
    build_world(folder, WORLD, 0)


def read_world(folder):
    build_world(folder, WORLD, 0)
    rows = [row for _, row in read_rows(folder / "train" / "toy_aligned.jsonl")]
    return len(rows) == 4 and all(row["output"].startswith("Happy to help") for row in rows)


REPORT = sample_report() | {"board": BOARD[:1]}


def make_report(folder):
    gather.save(folder, REPORT)


def read_report(folder):
    return gather.rebuild(folder) == gather.plain(REPORT)


def make_digests(folder):
    (folder / "weights").write_bytes(bytes(100))
    provenance.cached_sha256(folder / "weights")


def read_digests(folder):
    return provenance.cached_sha256(folder / "weights") == file_sha256(folder / "weights")


def make_model(folder):
    save_model_folder(folder / "m", tiny_model(len(TOKENIZER), 0), TOKENIZER)
    names = dict.fromkeys(tiny_model(len(TOKENIZER), 0).state_dict(), "model.safetensors")
    write_json(folder / "m" / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})


def read_model(folder):
    """A model that somebody else made: damage need not be noticed."""
    source = str(folder / "m")
    checkpoints.find_model(source)
    checkpoints.check_context(source, 8)
    checkpoints.load_pair(source, None)
    checkpoints.load_model(source)
    return True


def make_rows(folder):
    write_json(folder / "rows.json", ROWS)
    write_jsonl(folder / "rows.jsonl", ROWS)


def read_user_rows(folder):
    for name in ("rows.json", "rows.jsonl"):
        for rows in (read_rows(folder / name, {"instruction": str, "n": int}, BadRows("skip")),):
            json.dumps([row for _, row in rows], ensure_ascii=False).encode()
    return True


KINDS = {
    "token cache": (make_cache, read_cache),
    "part files": (make_parts, read_parts),
    "marked file": (make_marked, read_marked),
    "judgements": (make_judgements, read_judgements),
    "speed": (make_speed, read_speed),
    "finished run": (make_run, read_run),
    "training state": (make_state, read_state),
    "toy data set": (make_world, read_world),
    "report": (make_report, read_report),
    "digests": (make_digests, read_digests),
    "model": (make_model, read_model),
    "data rows": (make_rows, read_user_rows),
}


def attack(kind, folder, tmp_path, rng, monkeypatch):
    """Damage one file of a fresh copy and read it; return what happened."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    paths = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "weights")
    path = rng.choice(paths)
    how = damage(path, rng)
    try:
        right = KINDS[kind][1](copy)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)[:2000]
        return "refused"
    except Exception as error:
        raise AssertionError(
            f"{kind}: {how} of {path.relative_to(copy)}: {type(error).__name__}: {error}"
        ) from error
    assert right, f"{kind}: {how} of {path.relative_to(copy)} was accepted and changed the result"
    return "right"


def run_damages(kind, count, tmp_path, monkeypatch):
    if kind == "digests":
        monkeypatch.setattr(provenance, "LARGE", 1)
    folder = tmp_path / "whole"
    folder.mkdir()
    KINDS[kind][0](folder)
    assert KINDS[kind][1](folder), "undamaged"
    rng = random.Random(kind)
    found = [attack(kind, folder, tmp_path, rng, monkeypatch) for _ in range(count)]
    return {name: found.count(name) for name in ("refused", "right")}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_made_again(kind, tmp_path, monkeypatch):
    """A seeded slice of the test below."""
    run_damages(kind, 8, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage_is_refused_or_made_again(kind, tmp_path, monkeypatch, capsys):
    """5,004 damages over all kinds: none is a traceback, and none of our own files changes a result."""
    found = run_damages(kind, 417, tmp_path, monkeypatch)
    with capsys.disabled():
        sys.stdout.write(f"\n{kind}: {found}\n")
