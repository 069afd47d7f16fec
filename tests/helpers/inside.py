"""Pairs that vLLM's CPU attention supports, and running vLLM in its own Python."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import ROOT, run
from tiny import byte_tokenizer, save_model_folder, tiny_model

from ram.storage.files import read_json, write_json

PYTHON = os.environ.get("RAM_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not shutil.which(PYTHON), reason="set RAM_VLLM_PYTHON to the Python of vLLM's environment (docs/vllm.md)"
)
TOKENIZER = byte_tokenizer()
# A trained pair whose aligner has heads of 32; the demo's have 14.
TRAINED = [
    "experiment=demo",
    "stages=[world,general_proposal,general_aligner,proposal,sample,aligner]",
    "world.entities=30",
    "world.aligned_rows=30",
    "world.general_rows=4000",
    "stage.general_proposal.n_examples=9600",
    "stage.general_aligner.n_examples=6400",
    "stage.aligner.n_examples=3200",
    "eval_every=6400",
    "sampling.batch_size=32",
    "+stage.general_aligner.model_settings={architecture: {hidden_size: 64, intermediate_size: 160, "
    "num_attention_heads: 2, num_key_value_heads: 2}}",
]


def save_random_pair(folder: Path, is_plain: bool = False) -> list[str]:
    """Write a pair with random weights, of unequal sizes; return its two folders.

    If it is not plain, the vocabulary rows are unequal, too, and the proposal favours the characters that a
    judge answers, by one large feature.
    """
    size, end = len(TOKENIZER), TOKENIZER.eos_token_id
    proposal = tiny_model(size, 1, layers=2, hidden=128, extra_rows=0 if is_plain else 6, eos_token_id=end)
    aligner = tiny_model(size, 5, hidden=64, extra_rows=0 if is_plain else 2, eos_token_id=end)
    with torch.no_grad():
        if not is_plain:  # the proposal's first feature is constant and favours m and M
            proposal.model.embed_tokens.weight[:, 0] = 3.0
            for layer in proposal.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
            proposal.lm_head.weight[TOKENIZER.convert_tokens_to_ids(["m", "M"]), 0] = 1.0
        for model in (proposal, aligner):  # sharper: nuclei of a dozen tokens, divergences around 5
            model.lm_head.weight[:size] *= 2
    for model in (proposal, aligner):
        model.config.max_position_embeddings = 4096  # a judge's question is longer than the tests' texts
    models = {"proposal": proposal, "aligner": aligner}
    return [save_model_folder(folder / name / "LATEST", model, TOKENIZER) for name, model in models.items()]


def save_quantised(source: str, folder: Path) -> str:
    """Write a model whose layers have 8-bit weights, as compressed-tensors does; return the folder."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
        weights[f"{name}_scale"], weights[name] = scale, (weights[name] / scale).round().to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    quantization |= {"quantization_status": "compressed", "config_groups": {"group_0": group}}
    config = folder / "config.json"
    write_json(config, read_json(config) | {"quantization_config": quantization})
    return str(folder)


def train_pair(folder: Path) -> dict[str, str]:
    """Train the toy pair into a folder; return the overrides' list and both models' folders."""
    import train

    run(train, *TRAINED, f"output_dir={folder}")
    models = {path.parent.name.split("_")[0]: str(path) for path in sorted(folder.glob("model/*/LATEST"))}
    return {"proposal": models["wu"], "aligner": models["ours"]}


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run jobs of vllm_run.py in vLLM's Python and return their results."""
    script = Path(__file__).with_name("vllm_run.py")
    given, results, log = folder / "jobs.json", folder / "results.json", folder / "vllm.log"
    given.write_text(json.dumps(jobs))
    two = any(job["engine"].get("tensor_parallel_size") == 2 for job in jobs)  # one core for each
    with open(log, "w") as file:
        command = [PYTHON, str(script), str(given), str(results)]
        binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if two else {}
        done = subprocess.run(
            command, stdout=file, stderr=file, timeout=1800, env=os.environ | binding, check=False
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    return json.loads(results.read_text())


def pair_engine(aligner: str, **settings: Any) -> dict[str, Any]:
    """The engine's arguments for a pair with these next-token settings."""
    return {"hf_overrides": {"architectures": ["RAMPair"], "ram": {"aligner": aligner} | settings}}


def report(line: str) -> None:
    """Print a measured figure past pytest's capture."""
    sys.__stderr__.write(f"\n{line}")


@contextlib.contextmanager
def serving(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a server of vLLM on the port at the command's end; the context begins when it answers."""
    environment = {"PYTHON": PYTHON, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "a") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | environment, cwd=ROOT, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{command[-1]}", server, log)
        yield server
    finally:
        stop(server, signal.SIGTERM)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Return once the server answers; fail if it ends or takes ten minutes."""
    for _ in range(600):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", trust_env=False, timeout=5).status_code == 200:
                return
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def stop(server: subprocess.Popen, how: signal.Signals) -> None:
    """End a server with its worker processes, which share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
