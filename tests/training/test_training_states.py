"""Training states: what is loaded from them, what is counted over all sessions, what is left behind."""

import csv
import json
import pickle
import time

import pytest
import torch
from training_runs import RESUMABLE, path_of, resumed_run, stopped_run, trainer, weights

from ram.errors import UserError
from ram.storage.files import file_sha256
from ram.storage.records import read_record, write_record
from ram.training import resume

OVERRIDES = ("loss=ours_sft", *RESUMABLE)


def rewrite(state, **facts):
    """Write state.json anew, with the digests of the files as they are."""
    record = read_record(state / "state.json", {}, "")
    files = {name: file_sha256(state / name) for name in record["files"]}
    write_record(state / "state.json", record | {"files": files} | facts)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("place", ["index", "value"])
def test_state_that_names_a_function_runs_no_code(tmp_path, place):
    """A state is a pickle in two places; neither may call what somebody put there."""
    stopped_run(tmp_path / "run", 5, *OVERRIDES)
    (state,) = resume.complete_states(tmp_path / "run")[-1:]
    index = state / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    if place == "index":
        metadata.planner_data = Attack(tmp_path / "harm")
    else:
        key, info = next((k, v) for k, v in metadata.storage_data.items() if "lr" in k.fqn)
        shard = state / info.relative_path
        info.offset, info.length = shard.stat().st_size, None
        data = pickle.dumps(Attack(tmp_path / "harm"))
        info.length = len(data)
        shard.write_bytes(shard.read_bytes() + data)
        metadata.storage_data[key] = info
    index.write_bytes(pickle.dumps(metadata))
    rewrite(state)
    found = resume.newest(tmp_path / "run", {"it": 1})
    assert found is not None, "the digests fit: only the unpickler stands between"
    run = trainer(tmp_path / "run", *OVERRIDES)
    with pytest.raises((UserError, OSError), match="a state needs no .*open|weights_only|Weights only"):
        resume.load(found["folder"], run.model, run.optimizer)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("change", [{"updates": "4"}, {"examples": True}, {"best": 3}, {"origin": []}])
def test_counters_of_another_type_are_damage(tmp_path, change):
    stopped_run(tmp_path / "run", 5, *OVERRIDES)
    newest = resume.complete_states(tmp_path / "run")[-1]
    rewrite(newest, **change)
    assert resume.newest(tmp_path / "run", {"it": 1})["updates"] == 4


def test_state_from_before_a_key_is_used(tmp_path):
    """A key that is younger than the state has the value that the state was trained with."""
    stopped_run(tmp_path / "run", 5, *OVERRIDES)
    newest = resume.complete_states(tmp_path / "run")[-1]
    rewrite(newest, origin={"settings": {"lr": 1e-3}, "inputs": {}})

    def found(**settings):
        origin = {"settings": {"lr": 1e-3} | settings, "inputs": {}}
        return resume.newest(tmp_path / "run", origin, None, {"last_batch": "whole"})

    assert found(last_batch="whole")["updates"] == 5
    assert found(last_batch="scaled") is None and found(other=1) is None


def test_changed_counter_is_damage(tmp_path):
    """A flipped bit in state.json leaves valid JSON with another number of examples."""
    stopped_run(tmp_path / "run", 5, *OVERRIDES)
    mark = resume.complete_states(tmp_path / "run")[-1] / "state.json"
    mark.write_text(mark.read_text().replace('"examples": 36', '"examples": 34'))
    assert json.loads(mark.read_text())["examples"] == 34
    assert resume.newest(tmp_path / "run", {"it": 1})["updates"] == 4


def test_optimizer_goes_on_from_its_moments(tmp_path):
    """Every tensor of the optimizer's state is loaded: Adam and RMSprop without them take other steps."""
    whole = trainer(tmp_path / "whole", *OVERRIDES, "optimizer=Adam")
    whole.train()
    stopped = stopped_run(tmp_path / "run", 3, *OVERRIDES, "optimizer=Adam")
    run = trainer(tmp_path / "run", *OVERRIDES, "optimizer=Adam")
    run.recall(resume.newest(tmp_path / "run", {"it": 1}))
    before, after = (r.optimizer.state_dict()["state"] for r in (stopped, run))
    assert before.keys() == after.keys() and len(after) == len(list(run.model.parameters()))
    for index, moments in before.items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(after[index][k])) for k, v in moments.items()
        )
    resumed, _ = resumed_run(tmp_path / "run", *OVERRIDES, "optimizer=Adam")
    assert path_of(resumed) == path_of(whole)
    assert all(
        torch.equal(a, b) for a, b in zip(weights(resumed).values(), weights(whole).values(), strict=True)
    )


@pytest.mark.parametrize("after", [2, 3, 4])
def test_steps_of_a_resumed_run_are_saved_at_the_same_examples(tmp_path, after):
    """When the next step is due belongs to the state: 8 and 16, then 28 and 36, after a shorter batch."""
    stopped_run(tmp_path / "run", after, *OVERRIDES, "keep_steps=null", "save_every=12")
    resumed_run(tmp_path / "run", *OVERRIDES, "keep_steps=null", "save_every=12")
    trainer(tmp_path / "whole", *OVERRIDES, "keep_steps=null", "save_every=12").train()
    steps = [sorted(path.name for path in (tmp_path / n).glob("step-*")) for n in ("run", "whole")]
    assert steps[0] == steps[1] == ["step-16", "step-28", "step-36"]


def heldout_rows(run_dir):
    with open(run_dir / "metrics.csv", newline="") as file:
        return [row["updates"] for row in csv.DictReader(file) if row["split"] == "heldout"]


def test_last_heldout_row_stands_once_after_a_kill(tmp_path, monkeypatch):
    """A run killed between its last evaluation and its record evaluates again."""
    run = trainer(tmp_path, *OVERRIDES)
    monkeypatch.setattr(run, "origin", {"it": 1})
    monkeypatch.setattr(
        run, "save", lambda name: (_ for _ in ()).throw(KeyboardInterrupt) if name == "LATEST" else None
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    rows = heldout_rows(tmp_path)
    resumed_run(tmp_path, *OVERRIDES)
    assert heldout_rows(tmp_path) == rows and rows[-1] == "6" and len(set(rows)) == len(rows)


def test_seconds_of_all_sessions_count(tmp_path):
    stopped_run(tmp_path / "run", 5, *OVERRIDES)
    newest = resume.complete_states(tmp_path / "run")[-1]
    assert 0 < read_record(newest / "state.json", {}, "")["seconds"] < 600
    rewrite(newest, seconds=5000.0)
    run, _ = resumed_run(tmp_path / "run", *OVERRIDES)
    assert 5000 < time.monotonic() - run.began < 5600


def test_resumed_run_follows_the_schedule_of_now(tmp_path):
    """A state holds no counts of the next evaluation and save, which other settings would put elsewhere."""
    stopped_run(tmp_path / "run", 2, "eval_every=1000", "save_every=null", "n_examples=48")
    run = trainer(tmp_path / "run", "eval_every=8", "save_every=16", "n_examples=48")
    run.train(resume.newest(tmp_path / "run", {"it": 1}))
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("step-*"))
    assert saved == [36]  # the first update beyond 32; 16 had passed before the stop, and the end is LATEST
