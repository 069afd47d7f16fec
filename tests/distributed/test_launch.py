"""The launcher: exit codes, signals, dead processes, and whole stages with two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import ROOT, run
from tiny import byte_tokenizer, save_model_folder, tiny_model

import train
from ram.distributed import processes
from ram.errors import UserError
from ram.storage.files import fingerprint, only_run, write_json


def launch(*command, cwd=ROOT, **environment):
    """Start a script through the launcher with two processes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NPROC": "2", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "ram.distributed.launch", *command], cwd=cwd, env=env, **pipes
    )


def script(folder, text):
    """Write a script that runs `text` in each process after the group has been formed."""
    path = folder / "script.py"
    start = "import os, sys, time\nimport utils\nfrom ram.distributed import processes\n"
    start += "processes.start()\nrank = processes.rank()\n"
    path.write_text(f"{start}def main():\n    {text}\n    processes.barrier()\nprocesses.run(main)\n")
    return str(path)


@pytest.mark.parametrize(
    "text, code, message",
    [
        ("raise utils.UserError('no such thing')", 2, "error: no such thing\n"),
        ("rank and sys.exit(3)", 3, ""),
        ("rank and os.kill(os.getpid(), 9)", 137, "process 1 was ended by SIGKILL"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_exit_code_is_that_of_the_first_process_to_end(text, code, message, tmp_path):
    """The failing process reports its error once, and the others are not waited for."""
    start = time.monotonic()
    running = launch(script(tmp_path, text), cwd=tmp_path)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == code, errors
    assert message in errors and "ChildFailedError" not in errors and "torchrun" not in errors
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process(number, code, tmp_path):
    text = "print('ready\\n', end='', flush=True); [time.sleep(0.05) for _ in range(1200)]"
    running = launch(script(tmp_path, text), cwd=tmp_path)
    output = ""
    while output.count("ready\n") < 2:
        output += running.stdout.readline()
        assert running.poll() is None
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    assert "stopped: finished work is kept" in errors and "Traceback" not in errors


def test_processes_end_with_their_launcher(tmp_path):
    """kill -9 of the launcher leaves no process behind."""
    text = "print(f'pid {os.getpid()}\\n', end='', flush=True); [time.sleep(0.05) for _ in range(1200)]"
    running = launch(script(tmp_path, text), cwd=tmp_path)
    output = ""
    pids = []
    while len(pids) < 2:
        output += running.stdout.readline()
        pids = [int(pid) for pid in re.findall(r"pid (\d+)\n", output)]
        assert running.poll() is None
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "command, environment, message",
    [
        ((), {}, "expected a script"),
        (("nothing.py",), {}, "expected a script"),
        (("train.py",), {"NPROC": "two"}, "NPROC=two: expected a number of at least 1"),
        (("train.py",), {"NPROC": "²"}, "expected a number of at least 1"),
        (("train.py",), {"NNODES": "2"}, "RDZV_ENDPOINT is not set"),
        (("train.py",), {"NNODES": "2", "RDZV_ENDPOINT": "localhost:abc"}, "did not find each other"),
    ],
)
def test_invalid_launch_is_one_line(command, environment, message):
    running = launch(*command, **environment)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2 and message in errors and "Traceback" not in errors


def test_one_process_runs_without_torchrun(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, sys; print('RANK' in os.environ, sys.argv[1:])")
    running = launch(str(path), "a=1", NPROC="1")
    assert running.communicate(timeout=60)[0] == "False ['a=1']\n"


def test_two_machines_form_one_group(tmp_path):
    """The same command, run twice with NNODES=2, makes one group of four processes."""
    text = "print(f'here {rank} {processes.count()}\\n', end='', flush=True)"
    path = script(tmp_path, text)
    port = free_port()
    machines = [
        launch(path, cwd=tmp_path, NNODES="2", RDZV_ENDPOINT=f"127.0.0.1:{port}", RDZV_ID="test")
        for _ in range(2)
    ]
    output = "".join(running.communicate(timeout=120)[0] for running in machines)
    assert sorted(re.findall(r"here (\d) 4", output)) == ["0", "1", "2", "3"]


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


CONCURRENT_PARTS = """
    from pathlib import Path
    from ram.storage.parts import PartFiles
    read = PartFiles._read
    PartFiles._read = lambda self, path: (time.sleep(rank), read(self, path))[1]
    if rank == 0:
        Path("out.part").write_text('{"identity": "x"}\\n{"index": 0}\\n')
    processes.barrier()
    parts = PartFiles(Path("out").absolute(), "x", False)
    if rank == 0:
        parts.add({"index": 1})
    began = f"rank {rank} began with {len(parts.done) - (rank == 0)}"
    processes.barrier()
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", str(1 + rank)
    with processes.in_turn():
        pass
    sys.stdout.write(f"{began}, sum {processes.all_sum({'x': 1.0 + rank})['x']}\\n")
    sys.stdout.flush()
"""


def test_processes_wait_before_adding_answers(tmp_path):
    """No process adds answers while a slow one still reads the parts: their shares would overlap.

    in_turn passes as many barriers in every process, though machines have different numbers of processes.
    A run without errors ends with code 0 and no output of torchrun.
    """
    running = launch(script(tmp_path, CONCURRENT_PARTS), cwd=tmp_path)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 0 and "torchrun" not in errors, errors
    assert sorted(output.splitlines()) == [f"rank {i} began with 1, sum 3.0" for i in (0, 1)]


def test_two_processes_sample_the_file_of_one(tmp_path, caplog):
    """Two processes write the same bytes as one; a stopped run can be resumed by another number of them."""
    tokenizer = byte_tokenizer()
    save_model_folder(tmp_path / "model", tiny_model(len(tokenizer), 1, layers=2), tokenizer)
    rows = [{"instruction": f"row {i} " + "x" * (7 * i % 30), "output": "y"} for i in range(24)]
    overrides = [
        f"+stage.sample={{kind: sample, proposal: {tmp_path / 'model'}, dataset: uc}}",
        "sampling.max_prompt_length=80",
        "sampling.max_length=110",
        "sampling.batch_size=2",
        "sampling.base_temperature=1.0",
        "sampling.dtype=float32",
    ]
    files = {}
    for count in ("1", "2"):
        write_json(tmp_path / count / "train" / "ultrachat_round_one.json", rows)
        files[count] = tmp_path / count / "train" / "ultrachat_round_one_sampling_model.json"
    running = launch("train.py", f"data_dir={tmp_path / '2'}", *overrides)
    run(train, f"data_dir={tmp_path / '1'}", *overrides)
    log, errors = running.communicate(timeout=200)
    assert running.returncode == 0, log + errors
    assert files["1"].read_bytes() == files["2"].read_bytes()

    # The state after a run of two was killed: each process's part has some of its rows and a cut line.
    trace = files["1"].with_suffix(".trace.jsonl").read_text()
    traces = [json.loads(line) for line in trace.splitlines()]
    meta = files["1"].with_name(files["1"].name + ".meta.json")
    identity = fingerprint(json.loads(meta.read_text())["made_from"])
    files["1"].unlink()
    for rank in (0, 1):
        part = files["1"].with_name(files["1"].name + ".part" + ("-1" if rank else ""))
        lines = [json.dumps(row) for row in traces if row["index"] % 2 == rank][: 5 + rank]
        part.write_text("\n".join([json.dumps({"identity": identity}), *lines]) + "\n" + '{"index": 9, "te')
    run(train, f"data_dir={tmp_path / '1'}", *overrides)
    assert "going on after 11 of 24 answers" in caplog.text and "13 answers" in caplog.text
    assert files["1"].read_bytes() == files["2"].read_bytes()
    assert not list(files["1"].parent.glob("*.part*"))


def test_preempted_job_saves_in_time_and_resumes(tmp_path, caplog):
    """SIGTERM to the launcher and its processes, as schedulers send it: exit code 75 and a state within 30 s.

    The next start, with one process instead of two, continues from that state.
    """
    overrides = [
        *("experiment=demo", f"output_dir={tmp_path}", "stages=[world,general_proposal]"),
        *(
            "world.entities=20",
            "world.general_rows=2000",
            "world.aligned_rows=12",
            "trainer=FSDPTrainer",
            "eval_every=100000",
        ),
        "stage.general_proposal.n_examples=1600",
    ]
    running = launch("train.py", *overrides)
    while "train " not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    start = time.monotonic()
    for pid in (running.pid, *children(running.pid)):
        os.kill(pid, signal.SIGTERM)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 75 and time.monotonic() - start < 30, errors
    assert "to go on from" in output and "Traceback" not in errors
    (state,) = tmp_path.glob("model/*/states/[0-9]*/state.json")
    examples = json.loads(state.read_text())["examples"]
    assert 0 < examples < 1600
    try:
        run(train, *overrides)
    finally:
        processes.stop()
    assert f"going on after {examples:,} of 1,600 examples" in caplog.text
    assert not list(tmp_path.glob("model/*/states"))


def children(pid):
    """List the child processes of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_second_run_is_refused_by_the_lock(tmp_path):
    """A second run cannot write what another one writes, and no stale lock remains."""
    with only_run(tmp_path / "run"):
        with pytest.raises(UserError, match="another run is writing it"), only_run(tmp_path / "run"):
            pass
        with only_run(tmp_path / "other"):
            pass
    with only_run(tmp_path / "run"):
        pass


def test_repeated_signals_do_not_interrupt(monkeypatch):
    """torchrun and schedulers both forward signals; only a later Ctrl-C interrupts at once."""
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    with processes.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received[0] == signal.SIGTERM and len(received) == 4
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
