"""Memory, communication and time of training on many devices, by formula; `--measure` checks them here.

    python benchmarks/scaling.py                the tables of SCALING.md
    python benchmarks/scaling.py --measure      the formulas against 1, 2 and 4 processes of this machine

benchmarks/SCALING.md explains the formulas. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# ---- constants ---------------------------------------------------------------------------------------------
MFU = 0.40  # assumed share of a GPU's peak that the forward and backward pass reach; not measured here
PEAK_FLOPS = 989e12  # dense bf16, H100 or H200
HBM = 3.35e12  # bytes/s of an H100
NVLINK = 450e9  # bytes/s and direction between the 8 GPUs of a machine
NETWORK = 50e9  # bytes/s and GPU between machines (400 Gb/s)
GPUS_OF_A_MACHINE = 8
SAVED = 34  # bytes per token, layer and hidden unit that a Llama layer in bf16 keeps for its backward pass
TILE = {2: 2**28, 4: 2**22}  # bytes of logits that the LM head holds at once (losses.py): a GPU's, a CPU's
PROCESS = 44 * 2**20  # bytes that a process takes once it works, whatever the model (seen here)


@dataclass(frozen=True)
class Size:
    """A Llama-like model; all weights are counted."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    head_size: int = 128

    @property
    def block(self) -> int:
        """Weights of one decoder block."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside the blocks: embedding, LM head, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def all(self) -> int:
        return self.layers * self.block + self.root


SIZES = {
    "Llama-3.2-1B": Size(16, 2048, 8192, 32, 8, 128256, tied=True, head_size=64),
    "Llama-3.2-3B": Size(28, 3072, 8192, 24, 8, 128256, tied=True),
    "Llama-3.1-8B": Size(32, 4096, 14336, 32, 8, 128256),
    "Qwen2.5-14B": Size(48, 5120, 13824, 40, 8, 152064),
    "Llama-3.1-70B": Size(80, 8192, 28672, 64, 8, 128256),
}


# ---- formulas ----------------------------------------------------------------------------------------------
def state_bytes(size: Size, devices: int, moments: int = 1) -> float:
    """Float32 weights and the optimizer's moments of one device (RMSprop 1, AdamW 2)."""
    return 4 * (1 + moments) * size.all / devices


def gradient_bytes(size: Size, devices: int) -> float:
    return 4 * size.all / devices


def gathered_bytes(size: Size, compute: int = 2) -> float:
    """What is whole on every device at once: the root, the block at work, the next one, and a block's
    gradients on their way in float32.
    """
    return compute * (size.root + 2 * size.block) + 4 * max(size.block, size.root)


def activation_bytes(size: Size, tokens: int, checkpointing: bool, compute: int = 2) -> float:
    """Activations of one micro-batch of `tokens` on one device, and the chunk of logits."""
    saved = SAVED * compute / 2 * size.hidden * tokens
    kept = compute * size.hidden * tokens * size.layers
    return (kept + saved if checkpointing else saved * size.layers) + 3 * TILE[compute]


def peak_bytes(size: Size, devices: int, tokens: int, checkpointing: bool, compute: int = 2) -> float:
    """The most that a device holds in a step: at the end of the forward pass no gradient is there yet, at the
    end of the backward pass no activation; the two together bound both.
    """
    held = state_bytes(size, devices) + gradient_bytes(size, devices) + gathered_bytes(size, compute)
    return held + activation_bytes(size, tokens, checkpointing, compute)


def traffic_bytes(size: Size, devices: int, compute: int = 2, reduce: int = 4) -> float:
    """What a device receives in one micro-batch: weights for the forward and for the backward pass, and
    gradients in float32.
    """
    return (devices - 1) / devices * size.all * (2 * compute + reduce)


def flops(size: Size, tokens: int, checkpointing: bool) -> float:
    """Of forward and backward pass: 2 a weight and token forward, twice that backward, forward again where
    activations are computed again.
    """
    return (8 if checkpointing else 6) * size.all * tokens


def step_seconds(size: Size, devices: int, tokens: int, micro_batches: int, checkpointing: bool) -> tuple:
    """(computing, communicating) of an update over `tokens` on all devices; torch overlaps the two."""
    compute = flops(size, tokens, checkpointing) / (devices * PEAK_FLOPS * MFU)
    link = NVLINK if devices <= GPUS_OF_A_MACHINE else NETWORK
    return compute, micro_batches * traffic_bytes(size, devices) / link


def sampling_seconds(size: Size, devices: int, rows: int, new_tokens: int, batch: int) -> float:
    """Decoding `rows` answers with whole models on every device: each step reads all weights once."""
    step = max(2 * size.all / HBM, 2 * size.all * batch / (PEAK_FLOPS * MFU))
    return rows / (devices * batch) * new_tokens * step


# ---- tables ------------------------------------------------------------------------------------------------
TOKENS = (
    64 * 600
)  # an update of the published recipes: 64 examples of about 600 tokens, both answers together


def tables() -> dict:
    found: dict = {}
    print("memory of a device, GB (checkpointing, micro-batch of 16,384 tokens, RMSprop)")
    devices = (1, 2, 4, 8, 16, 32, 64)
    print(f"{'':>16}" + "".join(f"{n:>9}" for n in devices))
    for name, size in SIZES.items():
        row = [peak_bytes(size, n, 16384, True) / 1e9 for n in devices]
        found[f"memory {name}"] = dict(zip(devices, row, strict=True))
        print(f"{name:>16}" + "".join(f"{value:9.1f}" for value in row))
    print(f"\nseconds of an update of {TOKENS:,} tokens: the longer of computing and communicating")
    print(f"{'':>16}" + "".join(f"{n:>9}" for n in devices))
    for name, size in SIZES.items():
        row = []
        for n in devices:
            micro = max(1, round(TOKENS / n / 16384))
            row.append(max(step_seconds(size, n, TOKENS, micro, True)))
        found[f"step {name}"] = dict(zip(devices, row, strict=True))
        print(f"{name:>16}" + "".join(f"{value:9.2f}" for value in row))
    print(
        "\nhours of a recipe on 8 GPUs: 10,048 examples of warm-up, one answer of 300 tokens to every prompt"
    )
    print("(batch 256), one epoch of the aligner; 100,000 training examples of 600 tokens")
    for proposal in ("Llama-3.1-8B", "Qwen2.5-14B", "Llama-3.1-70B"):
        for aligner in ("Llama-3.2-1B", "Llama-3.2-3B"):
            updates = {proposal: 10048 / 64, aligner: 100_000 / 64}
            parts = [
                count * max(step_seconds(SIZES[name], 8, TOKENS, 1, True)) for name, count in updates.items()
            ]
            parts.insert(1, sampling_seconds(SIZES[proposal], 8, 100_000, 300, 256))
            hours = [part / 3600 for part in parts]
            found[f"recipe {proposal} + {aligner}"] = hours
            print(
                f"  {proposal:>14} + {aligner}: "
                + " + ".join(f"{h:.2f}" for h in hours)
                + f" = {sum(hours):.2f}"
            )
    return found


# ---- against this machine ----------------------------------------------------------------------------------
HERE = Size(8, 512, 1376, 8, 8, 8192, head_size=64)
ROWS, LENGTH, STEPS = 16, 128, 6


def worker() -> None:
    """One of the processes: peak memory above what it had before the model, seconds of a step, bandwidth."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from contenders import memory_status
    from training import dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from ram.distributed import processes
    from ram.settings import compose
    from ram.settings.schema import settings_of
    from trainers import FSDPTrainer
    from utils import TABLES

    torch.set_num_threads(1)
    processes.start(alone=True)
    checkpointing = bool(int(sys.argv[2]))
    composed = compose.compose(
        [
            *("loss=sft", "trainer=FSDPTrainer", "model.block_name=LlamaDecoderLayer", f"batch_size={ROWS}"),
            *("datasets=[hh]", f"max_length={LENGTH}", "optimizer=RMSprop", "debug=true"),
            f"activation_checkpointing={str(checkpointing).lower()}",
        ]
    )
    settings = settings_of(composed, TABLES)
    lengths = np.full((ROWS, 3), LENGTH // 2)
    data = dataset(lengths, HERE.vocabulary, LENGTH)
    before = memory_status("VmRSS")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=HERE.vocabulary,
            hidden_size=HERE.hidden,
            intermediate_size=HERE.inner,
            num_hidden_layers=HERE.layers,
            num_attention_heads=HERE.heads,
            num_key_value_heads=HERE.kv_heads,
            tie_word_embeddings=HERE.tied,
        )
    )
    assert sum(p.numel() for p in model.parameters()) == HERE.all
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 0})
    run = FSDPTrainer(settings, model, tokenizer, data, data, Path("unused"), {})
    del model
    seconds = []
    for step in range(STEPS):
        if step == 1:  # the moments are there; the whole model that was loaded counts no longer
            state = memory_status("VmRSS") - before
            Path("/proc/self/clear_refs").write_text("5")
        processes.barrier()
        start = time.perf_counter()
        run.update(np.arange(ROWS))
        seconds.append(time.perf_counter() - start)
    peak = memory_status("VmHWM") - before
    bandwidth = None
    if processes.count() > 1:
        mine = torch.zeros(HERE.block // processes.count())
        whole = torch.zeros(len(mine) * processes.count())
        times = []
        for _ in range(10):
            processes.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(whole, mine)
            times.append(time.perf_counter() - start)
        bandwidth = 4 * (len(whole) - len(mine)) / statistics.median(times)
    found = {
        "state_mb": state,
        "peak_mb": peak,
        "seconds": statistics.median(seconds[1:]),
        "bandwidth": bandwidth,
    }
    everyone = processes.all_gather(found)
    if processes.is_rank0():
        print(json.dumps({key: max(part[key] or 0 for part in everyone) for key in found}))
    processes.barrier()


def measure() -> dict:
    """Every process's peak memory and step time against the formulas."""
    found = {}
    for checkpointing in (0, 1):
        print(
            f"\ncheckpointing {bool(checkpointing)}: {HERE.all / 1e6:.1f} M weights, {ROWS} x {LENGTH} "
            "tokens, float32"
        )
        alone = None
        for count in (1, 2, 4):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
            ]
            # Blocks above 64 kB go back to the system when they are freed: the peak is what was held at once.
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(
                [*command, __file__, "--worker", str(checkpointing)],
                capture_output=True,
                text=True,
                env=environment,
            )
            if done.returncode:
                sys.exit(done.stderr)
            seen = json.loads(done.stdout.splitlines()[-1])
            tokens = ROWS * LENGTH // count
            peak = peak_bytes(HERE, count, tokens, bool(checkpointing), 4)
            seen["state_formula_mb"] = (state_bytes(HERE, count) + PROCESS) / 2**20
            seen["peak_formula_mb"] = (peak + PROCESS) / 2**20
            alone = alone or seen["seconds"]
            seen["seconds_formula"] = alone / min(count, os.cpu_count())
            if count > 1:
                seen["seconds_formula"] += traffic_bytes(HERE, count, 4) / seen["bandwidth"]
            found[f"{count} processes, checkpointing {bool(checkpointing)}"] = seen
            print(
                f"  {count} processes: state {seen['state_mb']:6.0f} MB (formula "
                f"{seen['state_formula_mb']:6.0f}), "
                f"peak {seen['peak_mb']:6.0f} MB (formula {seen['peak_formula_mb']:6.0f}), step "
                f"{seen['seconds']:.2f} s (formula {seen['seconds_formula']:.2f})",
                flush=True,
            )
    return found


def main() -> None:
    if "--worker" in sys.argv:
        from ram.distributed import processes

        processes.run(worker)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    print(json.dumps(measure() if args.measure else tables()))


if __name__ == "__main__":
    main()
