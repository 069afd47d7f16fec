"""kill -9 at random moments of all three stages and of evaluation: the same command ends as if nothing had
been.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import SMALL

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [*SMALL, "save_every=16", "stage.sample.sampling.batch_size=5", "sampling.dtype=float32"]
KILLS = 20


def commands(folder, count):
    trainer = ["trainer=FSDPTrainer"] if count > 1 else []
    given = ["experiment=demo", f"output_dir={folder}", *SETTINGS, *trainer]
    return [
        [sys.executable, "-m", "ram.distributed.launch", script, *given]
        for script in ("train.py", "pipeline.py")
    ]


def start(command, count, log):
    env = os.environ | {"NPROC": str(count), "OMP_NUM_THREADS": "1"}
    with open(log, "a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )


def processes_of(parent):
    """A process and all that it started, by id."""
    found, children = [parent], {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    for process in found:
        found += children.get(process, [])
    return found


def kill(running, rng):
    """kill -9 of everything, as a machine that fails, or of one process, whose others then must not stay."""
    known = processes_of(running.pid)
    for process in known if rng.random() < 0.5 else [rng.choice(known)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    running.wait(60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in known):
        assert time.monotonic() < deadline, "processes stay behind"
        time.sleep(0.1)


def contents(folder):
    """Weights, samples and answers of a finished run."""
    found = {}
    for path in sorted(folder.glob("model/*/LATEST/model.safetensors")):
        found[path.parts[-3]] = {name: weight.numpy().tobytes() for name, weight in load_file(path).items()}
    for path in sorted([*folder.glob("data/seed0/train/*"), *folder.glob("data/seed0/test/*")]):
        timed = path.name.endswith((".meta.json", ".speed.json"))  # they name the run's folder, its seconds
        found[path.name] = b"" if timed else path.read_bytes()
    answers = [json.loads(path.read_text()) for path in folder.glob("toy/facts/*/*/output.json")]
    found["answers"] = sorted(json.dumps([row["output"] for row in rows]) for rows in answers)
    systems = json.loads((folder / "results.json").read_text())["systems"]
    for row in systems.values():
        row.pop("mean_kl", None)  # rounded as the batch's shape has it, unlike every token
    found["systems"] = systems
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_moments(count, tmp_path, capsys):
    """Weights, samples, answers and results equal, bit by bit, those of the run that nobody killed."""
    whole, log = tmp_path / "whole", tmp_path / "log"
    began = time.monotonic()
    for command in commands(whole, count):
        assert start(command, count, log).wait(600) == 0, log.read_text()[-3000:]
    took = time.monotonic() - began
    rng, killed, turn = random.Random(count), 0, 0
    while killed < KILLS:
        turn += 1
        folder = tmp_path / f"cut{turn}"
        for command in commands(folder, count):
            while True:
                running = start(command, count, log)
                try:
                    code = running.wait(rng.uniform(0.1, 0.6) * took if killed < KILLS else 600)
                except subprocess.TimeoutExpired:
                    kill(running, rng)
                    killed += 1
                    continue
                assert code == 0, log.read_text()[-3000:]
                break
        expected, found = contents(whole), contents(folder)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert found[name] == value, name
    with capsys.disabled():
        sys.stdout.write(
            f"{count} processes: {killed} kills over {turn} runs, {took:.0f} s each if left alone\n"
        )
