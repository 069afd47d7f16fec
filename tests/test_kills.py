"""kill -9 at random moments of training and evaluation: rerunning the command gives the same results."""

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
    overrides = ["experiment=demo", f"output_dir={folder}", *SETTINGS, *trainer]
    return [
        [sys.executable, "-m", "ram.distributed.launch", script, *overrides]
        for script in ("train.py", "pipeline.py")
    ]


def start(command, count, log):
    env = os.environ | {"NPROC": str(count), "OMP_NUM_THREADS": "1"}
    with open(log, "a") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )


def processes_of(parent):
    """Return the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    processes = [parent]
    for process in processes:  # grows while it is iterated over
        processes += children.get(process, [])
    return processes


def kill(running, rng):
    """Kill all processes, like a machine failure, or one of them, after which the others must end too."""
    processes = processes_of(running.pid)
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    for process in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    running.wait(60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "processes are still running"
        time.sleep(0.1)


def contents(folder):
    """Collect the weights, samples, answers and results of a finished run."""
    results = {}
    for path in sorted(folder.glob("model/*/LATEST/model.safetensors")):
        results[path.parts[-3]] = {name: weight.numpy().tobytes() for name, weight in load_file(path).items()}
    for path in sorted([*folder.glob("data/seed0/train/*"), *folder.glob("data/seed0/test/*")]):
        # These files have the name of the run folder and timings.
        timed = path.name.endswith((".meta.json", ".speed.json"))
        results[path.name] = b"" if timed else path.read_bytes()
    answers = [json.loads(path.read_text()) for path in folder.glob("toy/facts/*/*/output.json")]
    results["answers"] = sorted(json.dumps([row["output"] for row in rows]) for rows in answers)
    systems = json.loads((folder / "results.json").read_text())["systems"]
    for row in systems.values():
        row.pop("mean_kl", None)  # its rounding depends on batch shapes, unlike the tokens
    results["systems"] = systems
    return results


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_run_gives_identical_results(count, tmp_path, capsys):
    """Weights, samples, answers and results are identical to those of an undisturbed run."""
    undisturbed = tmp_path / "undisturbed"
    log = tmp_path / "log"
    start_time = time.monotonic()
    for command in commands(undisturbed, count):
        assert start(command, count, log).wait(600) == 0, log.read_text()[-3000:]
    seconds = time.monotonic() - start_time
    rng = random.Random(count)
    killed = 0
    turn = 0
    while killed < KILLS:
        turn += 1
        folder = tmp_path / f"cut{turn}"
        for command in commands(folder, count):
            while True:
                running = start(command, count, log)
                try:
                    code = running.wait(rng.uniform(0.1, 0.6) * seconds if killed < KILLS else 600)
                except subprocess.TimeoutExpired:
                    kill(running, rng)
                    killed += 1
                    continue
                assert code == 0, log.read_text()[-3000:]
                break
        expected = contents(undisturbed)
        results = contents(folder)
        assert expected.keys() == results.keys()
        for name, value in expected.items():
            assert results[name] == value, name
    with capsys.disabled():
        sys.stdout.write(
            f"{count} processes: {killed} kills over {turn} runs, {seconds:.0f} s per undisturbed run\n"
        )
