"""Many processes and stopped runs: the same losses, gradient norms and weights as one process in one go."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from training_runs import (
    RESUMABLE,
    RUNS,
    TOKENIZER,
    frozen_proposal,
    path_of,
    recorded_path,
    resumed_run,
    settings,
    stopped_run,
    trainer,
    weights,
)

from ram.errors import UserError
from ram.models import lora
from ram.settings.schema import check_training
from ram.training import resume, sharding
from trainers import Preempted
from utils import TABLES

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("ours_sft", "dpo", "ratio", "budget", "padded", *(["lora"] if find_spec("peft") else []))
# Adadelta's step is smooth at a gradient of 0: it changes by at most lr times the change of the gradient. The
# steps of RMSprop and Adam jump there and would turn a rounding error into a share of a whole step.
SPREAD = ("gradient_accumulation_steps=2", "optimizer=Adadelta", "lr=1", *RESUMABLE[1:])


def torchrun(count, folder, stop):
    """What `fsdp_run.py` says when it is run by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in (".", "tests", "tests/helpers")),
    }
    done = subprocess.run(
        [
            *command,
            str(ROOT / "tests" / "helpers" / "fsdp_run.py"),
            str(folder),
            str(stop),
            ",".join(KINDS),
            *SPREAD,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def near(actual, expected):
    """Compare losses and gradient norms of float64 models whose gradients FSDP sums in float32.

    That rounds a gradient by 2**-24 of its size, and a DPO loss near 0 changes by the absolute error of its
    margin, a difference of log-probabilities near -100: together some 100 * 2**-24.
    """
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def same_weights(folder, run):
    """Compare an export, which is float32, with a run's float64 weights."""
    saved = load_file(folder / "LATEST" / "model.safetensors")
    for name, weight in lora.merged_weights(run.model, weights(run)):
        torch.testing.assert_close(saved[name].double(), weight, rtol=2 * 2**-24, atol=1e-6)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Runs of each kind by two processes, stopped after 4 updates, and resumed by three processes.

    Returns the folders and the output of both.
    """
    folder = tmp_path_factory.mktemp("spread")
    two = torchrun(2, folder / "two", 4)
    shutil.copytree(folder / "two", folder / "three")
    return folder / "two", two, folder / "three", torchrun(3, folder / "three", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_stopped_and_three_going_on_equal_one(kind, spread, tmp_path):
    """Two processes follow one process's path; told to stop they save; three, and one, go on to the same end.

    Three do not divide a batch of 8 or a weight of 16; of the 2 rows that 18 leave, one of them has none.
    One process forms its passes without a budget of tokens.
    The models are float64, so that little more than FSDP's own float32 sums is rounded.
    """
    two, said_by_two, three, said_by_three = spread
    overrides = (*RUNS[kind], *SPREAD, "tokens_per_pass=null")

    def run_of_one(folder):
        reference = None
        if "loss=dpo" in overrides:
            reference = tiny_model(len(TOKENIZER), seed=7, layers=2, dtype=torch.float64)
        proposal = frozen_proposal() if "loss=ratio" in overrides else None
        return trainer(folder, *overrides, n=18, reference=reference, dtype=torch.float64, proposal=proposal)

    one = run_of_one(tmp_path / "one")
    one.train()
    assert said_by_two.count("2 processes") == len(KINDS) and states(two / kind)[-1] == "000000004"
    near(recorded_path(two / kind), path_of(one)[:4])
    assert not (two / kind / "LATEST").exists()

    alone = tmp_path / "alone"  # what two processes saved, gone on from by one
    shutil.copytree(two / kind, alone)
    last = run_of_one(alone)
    last.train(resume.newest(alone, {"it": 1}))
    near(path_of(last), path_of(one))
    same_weights(alone, one)

    assert said_by_three.count("resuming after 26 of 36 examples") == len(KINDS)
    near(recorded_path(three / kind), path_of(one))
    same_weights(three / kind, one)
    assert (three / kind / "LATEST" / "config.json").read_text().count("LlamaForCausalLM") == 1


def states(folder):
    return [path.name for path in resume.complete_states(folder)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW"])
def test_a_stopped_run_ends_as_if_it_had_not(number, optimizer, tmp_path):
    """A signal saves after the update at hand; the next start gives the same weights, bit by bit, and log."""
    given = ("loss=ours_sft", "loss.sampled_fraction=0.5", f"optimizer={optimizer}", *RESUMABLE)
    whole = trainer(tmp_path / "whole", *given)
    whole.train()
    folder = tmp_path / "cut"
    stopped_run(folder, 4, *given, number=number)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run, state = resumed_run(folder, *given)
    assert state["updates"] == 4 and run.updates == whole.updates == 6
    assert path_of(run) == path_of(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(run)[name], weight), name
    log = (folder / "metrics.csv").read_text(), (tmp_path / "whole" / "metrics.csv").read_text()
    assert [line.split(",")[:8] for line in log[0].splitlines()] == [
        line.split(",")[:8] for line in log[1].splitlines()
    ]


def test_a_state_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    """Training continues while a state is written, and later changes are not in it.

    A second state waits until the first is written.
    """
    begin, order = threading.Event(), []
    write = resume.write_state
    monkeypatch.setattr(
        resume, "write_state", lambda *args: (begin.wait(30), order.append(args), write(*args))
    )
    run = trainer(tmp_path, *RESUMABLE, "optimizer=AdamW")
    run.update(np.arange(8))
    before = {name: weight.clone() for name, weight in weights(run).items()}
    run.remember()
    run.update(np.arange(8))
    assert not order and resume.complete_states(tmp_path) == []
    assert not all(torch.equal(weights(run)[name], weight) for name, weight in before.items())
    threading.Timer(0.2, begin.set).start()
    run.remember()
    run.saver.wait()
    assert [path.name for path in resume.complete_states(tmp_path)] == ["000000001", "000000002"]
    other = trainer(tmp_path, *RESUMABLE, "optimizer=AdamW")
    other.update(np.arange(3))  # its moments are there to be filled
    resume.load(resume.complete_states(tmp_path)[0], other.model, other.optimizer)
    for name, weight in before.items():
        assert torch.equal(weights(other)[name], weight), name


def test_a_run_stopped_in_its_last_evaluation_has_nothing_to_do_again(tmp_path, monkeypatch):
    """The state after the last update is there before the last evaluation begins."""
    run = trainer(tmp_path, "lr=1e-3", "save_every=null", "do_first_eval=false")

    def told(metrics):
        raise Preempted(signal.SIGTERM)

    monkeypatch.setattr(run, "evaluate", told)
    with pytest.raises(Preempted):
        run.train()
    state = resume.newest(tmp_path, run.origin)
    assert state["updates"] == run.total_updates
    again = trainer(tmp_path, "lr=1e-3", "save_every=null", "do_first_eval=false")
    again.train(state)
    assert again.updates == run.updates and (tmp_path / "LATEST").is_dir()
    for name, weight in weights(run).items():
        assert torch.equal(weights(again)[name], weight), name


def test_what_fails_while_a_state_is_written_is_raised(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "states")

    monkeypatch.setattr(resume, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, *RESUMABLE).train()


def test_only_whole_states_of_the_same_run_count(tmp_path):
    """The newest complete state is used; damaged or partial states and those of other runs are not."""
    folder = tmp_path / "run"
    stopped_run(folder, 5, *RESUMABLE)
    assert states(folder) == ["000000002", "000000004", "000000005"]
    half = folder / "states" / "000000009.aside"
    half.mkdir()
    (half / "state.json").write_text("{}")
    assert resume.newest(folder, {"it": 1})["updates"] == 5
    (file,) = (folder / "states" / "000000005").glob("__0_*")
    file.write_bytes(file.read_bytes()[:-7])
    assert resume.newest(folder, {"it": 1})["updates"] == 4
    (folder / "states" / "000000004" / "state.json").write_text('{"files"')
    assert resume.newest(folder, {"it": 1})["updates"] == 2
    assert resume.newest(folder, {"it": 2}) is None
    resume.clear(folder)
    assert states(folder) == [] and resume.newest(folder, {"it": 1}) is None


def test_nothing_is_saved_to_go_on_from_in_a_trial(tmp_path):
    run = trainer(tmp_path, *RESUMABLE, "debug=true")
    run.train()
    assert not (tmp_path / "states").exists()


def test_a_block_that_is_not_there_is_named(tmp_path):
    """FSDP without a matching block would be one shard of everything: it is refused, with what would fit."""
    with pytest.raises(UserError, match="block_name='Layr': .*LlamaDecoderLayer"):
        sharding.shard(tiny_model(9, 0, layers=2), "Layr", torch.device("cpu"), None, print)
    config = settings("sample_during_eval=true", "trainer=FSDPTrainer")
    with pytest.raises(UserError, match="sample_during_eval=true: FSDPTrainer has no whole model"):
        check_training(config, TABLES)
