"""The launcher: exit codes, dead processes, and whole stages by two processes, typed as a user types them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import ROOT, run
from tiny import byte_tokenizer, save_model_folder, tiny_model

import train
from ram.distributed import launch as launch_module
from ram.distributed import processes
from ram.storage.files import fingerprint, write_json


def launch(*command, cwd=ROOT, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NPROC": "2", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "ram.distributed.launch", *command], cwd=cwd, env=env, **pipes
    )


def script(folder, text):
    """A script whose two processes have found each other before `text` runs."""
    path = folder / "script.py"
    start = "import os, sys, time\nimport utils\nfrom ram.distributed import processes\n"
    start += "processes.start()\nrank = processes.rank()\n"
    path.write_text(f"{start}def main():\n    {text}\n    processes.barrier()\nprocesses.run(main)\n")
    return str(path)


@pytest.mark.parametrize(
    "text, code, said",
    [
        ("raise utils.UserError('no such thing')", 2, "error: no such thing\n"),
        pytest.param("rank and sys.exit(3)", 3, "", marks=pytest.mark.slow),
        ("rank and os.kill(os.getpid(), 9)", 137, "process 1 was ended by SIGKILL"),
        pytest.param("1 / 0", 1, "ZeroDivisionError", marks=pytest.mark.slow),
    ],
)
def test_exit_code_and_words_are_the_first_process_to_end(text, code, said, tmp_path):
    """What failed says why, once, and the others are not waited for."""
    running = launch(script(tmp_path, text), cwd=tmp_path)
    _, errors = running.communicate(timeout=300)  # the others would wait for two days
    assert running.returncode == code, errors
    assert said in errors and "ChildFailedError" not in errors and "torchrun" not in errors


def test_failed_process_does_not_leave_its_group(tmp_path):
    """NCCL's destroy_process_group waits for the other ranks, which wait in a collective."""
    blocked = "processes.dist.destroy_process_group = lambda: time.sleep(600)"
    failing = "print('failing', flush=True); 1 / 0"
    text = f"if rank:\n        {blocked}\n        {failing}"
    running = launch(script(tmp_path, text), cwd=tmp_path)
    assert running.stdout.readline() == "failing\n"
    try:
        _, errors = running.communicate(timeout=30)
    finally:
        running.terminate()
    assert running.returncode == 1 and "ZeroDivisionError" in errors


@pytest.mark.slow
def test_only_python_objects_are_waited_for_long(tmp_path):
    """NCCL took two days to notice a stuck rank; a process that judges for hours is still waited for."""
    path = tmp_path / "script.py"
    path.write_text(
        "import datetime, sys, time\nimport torch\nfrom ram.distributed import processes\n"
        "processes.TENSOR_TIMEOUT = datetime.timedelta(seconds=3)\nprocesses.start()\n"
        "def main():\n    rank = processes.rank()\n    time.sleep(6 * rank)\n    processes.barrier()\n"
        "    print(f'met {rank}\\n', end='', flush=True)\n    time.sleep(600 * rank)\n"
        "    processes.dist.all_reduce(torch.ones(1))\nprocesses.run(main)\n"
    )
    running = launch(str(path), cwd=tmp_path)
    said, errors = running.communicate(timeout=120)
    assert sorted(said.split("\n")) == ["", "met 0", "met 1"]
    assert running.returncode == 1 and "Timed out" in errors


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process(number, code, tmp_path):
    text = "print('ready\\n', end='', flush=True); [time.sleep(0.05) for _ in range(6000)]"
    running = launch(script(tmp_path, text), cwd=tmp_path)
    said = ""
    while said.count("ready\n") < 2:
        said += running.stdout.readline()
        assert running.poll() is None
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == code
    assert "stopped: finished work is kept" in errors and "Traceback" not in errors


def kill_and_see_its_processes_end(running):
    """Kill a launcher once its two processes have printed their ids."""
    said = ""
    while len(found := [int(pid) for pid in re.findall(r"pid (\d+)\n", said)]) < 2:
        said += running.stdout.readline()
        assert running.poll() is None
    running.kill()
    running.wait()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_processes_end_with_their_launcher(tmp_path):
    """kill -9 of the launcher leaves nobody behind."""
    running = launch(
        script(
            tmp_path,
            "print(f'pid {os.getpid()}\\n', end='', flush=True); [time.sleep(0.05) for _ in range(6000)]",
        ),
        cwd=tmp_path,
    )
    kill_and_see_its_processes_end(running)


def test_processes_end_with_a_launcher_that_dies_during_the_imports(tmp_path):
    """The system is asked before the script's first line, not after imports that take seconds."""
    path = tmp_path / "script.py"
    # One write per line: what two processes print in pieces can mix.
    path.write_text("import os, time\nos.write(1, b'pid %d\\n' % os.getpid())\ntime.sleep(600)\n")
    running = launch(str(path), cwd=tmp_path)
    kill_and_see_its_processes_end(running)


def test_process_whose_launcher_is_gone_already_ends(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("print('runs')")
    command = [sys.executable, "-m", "ram.distributed.worker", str(path)]
    for launcher, code in ((os.getpid(), 0), (os.getpid() + 1, 143)):
        env = os.environ | {"PYTHONPATH": str(ROOT), "RAM_LAUNCHER": str(launcher)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (code, "runs\n" if not code else ""), done.stderr


@pytest.mark.skipif(not shutil.which("ss"), reason="needs ss")
def test_no_port_is_open_beyond_this_machine(tmp_path):
    """Launcher and processes of one machine listen on loopback alone, and their files are the user's."""
    text = "print(os.getpid(), os.getppid(), os.environ['RAM_STORE'], '\\n', end='', flush=True)"
    text += "; time.sleep(600)"
    running = launch(script(tmp_path, text), cwd=tmp_path)
    found = [running.stdout.readline().split() for _ in range(2)]
    store = Path(found[0][2])
    assert store.exists() and store.parent.stat().st_mode & 0o777 == 0o700
    pids, ours, deadline = {pid for line in found for pid in line[:2]}, [], time.monotonic() + 60
    while not ours:  # gloo listens on loopback, and ss reads who owns a port while processes come and go
        assert time.monotonic() < deadline and running.poll() is None
        listed = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
        ours = [line.split()[3] for line in listed.splitlines() if pids & set(re.findall(r"pid=(\d+)", line))]
    assert all(address.startswith(("127.", "[::1]")) for address in ours), ours
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=120)
    assert not store.parent.exists()


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
def test_what_cannot_be_launched(command, environment, message):
    running = launch(*command, **environment)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 2 and message in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "drivers, seen, hip, expected",
    [
        ([], 0, None, 1),
        (["/dev/nvidiactl"], 4, None, 4),
        (["/dev/nvidiactl"], 0, None, None),
        (["/dev/kfd"], 0, None, 1),  # the driver of a screen
        (["/dev/kfd"], 0, "6.4", None),
    ],
)
def test_driver_without_a_visible_gpu_is_refused(drivers, seen, hip, expected, monkeypatch, capsys):
    """A torch build that does not fit the driver must not train on the CPU without a word."""
    monkeypatch.setattr(launch_module.os.path, "exists", drivers.__contains__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.version, "hip", hip)
    if expected is not None:
        assert launch_module.devices() == expected
        return
    with pytest.raises(SystemExit) as ended:
        launch_module.devices()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "NPROC=1 to use the CPU" in said


def test_processes_save_before_a_scheduler_kills_them():
    text = (ROOT / "docs" / "distributed.md").read_text()
    (seconds,) = re.findall(r"--signal=TERM@(\d+)", text)
    assert int(seconds) > launch_module.SAVING


def test_one_process_needs_no_launcher(tmp_path):
    """NPROC=1 runs the script itself."""
    path = tmp_path / "script.py"
    path.write_text("import os, sys; print('RANK' in os.environ, sys.argv[1:])")
    running = launch(str(path), "a=1", NPROC="1")
    assert running.communicate(timeout=120)[0] == "False ['a=1']\n"


@pytest.mark.slow
def test_two_machines(tmp_path):
    """The same command twice with NNODES=2, as two machines run it, makes one group of four."""
    text = "print(f'here {rank} {processes.count()}\\n', end='', flush=True)"
    path, port = script(tmp_path, text), processes_port()
    two = [
        launch(path, cwd=tmp_path, NNODES="2", RDZV_ENDPOINT=f"127.0.0.1:{port}", RDZV_ID="test")
        for _ in range(2)
    ]
    said = "".join(running.communicate(timeout=300)[0] for running in two)
    assert sorted(re.findall(r"here (\d) 4", said)) == ["0", "1", "2", "3"]


def processes_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


TOGETHER = """
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


def test_two_processes_wait_for_each_other(tmp_path):
    """No process adds answers while another one, however slow, still reads the existing ones.

    Otherwise their shares of the remaining prompts would overlap. Every process waits equally often for its
    turn, even if machines have different numbers of processes. A successful run exits with 0, and the
    launcher prints nothing.
    """
    running = launch(script(tmp_path, TOGETHER), cwd=tmp_path)
    said, errors = running.communicate(timeout=300)
    assert running.returncode == 0 and "torchrun" not in errors, errors
    assert sorted(said.splitlines()) == [f"rank {i} began with 1, sum 3.0" for i in (0, 1)]


def test_two_processes_share_a_file(tmp_path, caplog):
    """Two processes sample the same file as one process; a stopped run resumes with another number."""
    tokenizer = byte_tokenizer()
    save_model_folder(tmp_path / "model", tiny_model(len(tokenizer), 1, layers=2), tokenizer)
    rows = [{"instruction": f"row {i} " + "x" * (7 * i % 30), "output": "y"} for i in range(24)]
    given = [
        f"+stage.sample={{kind: sample, proposal: {tmp_path / 'model'}, dataset: uc}}",
        "sampling.max_prompt_length=80",
        "sampling.max_length=110",
        "sampling.batch_size=2",
        "sampling.base_temperature=1.0",
        "sampling.dtype=float32",
    ]
    output = {}
    for count in ("1", "2"):
        write_json(tmp_path / count / "train" / "ultrachat_round_one.json", rows)
        output[count] = tmp_path / count / "train" / "ultrachat_round_one_sampling_model.json"
    running = launch("train.py", f"data_dir={tmp_path / '2'}", *given)
    run(train, f"data_dir={tmp_path / '1'}", *given)
    said, errors = running.communicate(timeout=300)
    assert running.returncode == 0, said + errors
    assert output["1"].read_bytes() == output["2"].read_bytes()

    # As a run of two that was killed leaves it: each process's part holds some of its rows.
    trace = output["1"].with_suffix(".trace.jsonl").read_text()
    traces = [json.loads(line) for line in trace.splitlines()]
    meta = output["1"].with_name(output["1"].name + ".meta.json")
    identity = fingerprint(json.loads(meta.read_text())["made_from"])
    output["1"].unlink()
    for rank in (0, 1):
        part = output["1"].with_name(output["1"].name + ".part" + ("-1" if rank else ""))
        mine = [json.dumps(row) for row in traces if row["index"] % 2 == rank][: 5 + rank]
        part.write_text("\n".join([json.dumps({"identity": identity}), *mine]) + "\n" + '{"index": 9, "te')
    run(train, f"data_dir={tmp_path / '1'}", *given)
    assert "resuming after 11 of 24 answers" in caplog.text and "13 answers" in caplog.text
    assert output["1"].read_bytes() == output["2"].read_bytes()
    assert not list(output["1"].parent.glob("*.part*"))


def test_a_preempted_job_saves_in_time_and_goes_on(tmp_path, caplog):
    """After SIGTERM the run saves its state and exits with 75; another number of processes resumes it.

    As with a scheduler, the launcher and its processes all get the signal.
    """
    given = [
        *("experiment=demo", f"output_dir={tmp_path}", "stages=[world,general_proposal]"),
        *(
            "world.entities=20",
            "world.general_rows=1000",
            "world.aligned_rows=12",
            "trainer=FSDPTrainer",
            "eval_every=100000",
        ),
        "stage.general_proposal.n_examples=800",
    ]
    running = launch("train.py", *given)
    while "train " not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    for pid in (running.pid, *children(running.pid)):
        os.kill(pid, signal.SIGTERM)
    said, errors = running.communicate(timeout=120)
    assert running.returncode == 75, errors
    assert "(training state)" in said and "Traceback" not in errors
    (state,) = tmp_path.glob("model/*/states/[0-9]*/state.json")
    examples = json.loads(state.read_text())["examples"]
    assert 0 < examples < 800
    try:
        run(train, *given)
    finally:
        processes.stop()
    assert f"resuming after {examples:,} of 800 examples" in caplog.text
    assert not list(tmp_path.glob("model/*/states"))


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


def test_a_signal_that_comes_twice_is_one(monkeypatch):
    """A repeated SIGTERM counts once, because torchrun and a scheduler both send it.

    Only a later Ctrl-C ends the process at once.
    """
    monkeypatch.setattr(processes, "PATIENCE", 3600.0)
    with processes.stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(processes, "PATIENCE", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked[0] == signal.SIGTERM and len(asked) == 4
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
