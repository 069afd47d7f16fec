"""Formulas for memory, communication and time of training on many devices, and measurements to check them.

    python benchmarks/scaling.py                print the tables of SCALING.md
    python benchmarks/scaling.py --measure      compare the formulas with 1, 2 and 4 processes on this machine

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
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# ---- constants ---------------------------------------------------------------------------------------------
MFU = 0.40  # share of a GPU's peak that the forward and backward pass reach; assumed, not measured
PEAK_FLOPS = 989e12  # dense bf16, H100 or H200
HBM = 3.35e12  # bytes/s of an H100
NVLINK = 450e9  # bytes/s per direction between the 8 GPUs of a machine
NETWORK = 50e9  # bytes/s per GPU between machines (400 Gb/s)
GPUS_OF_A_MACHINE = 8
# Bytes of logits that the LM head holds at once (losses.py), by bytes of a weight: bf16 on a GPU, float32 on
# a CPU.
TILE = {2: 2**28, 4: 2**22}
PROCESS = 44 * 2**20  # bytes that a process needs besides the model, as measured


@dataclass(frozen=True)
class Size:
    """The shape of a Llama-like model. Its properties count weights."""

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
        """Weights outside the blocks: embedding, LM head and last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def all(self) -> int:
        """All weights of the model."""
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
    """Return the bytes of float32 weights and optimizer moments (RMSprop 1, AdamW 2) on one device."""
    return 4 * (1 + moments) * size.all / devices


def gradient_bytes(size: Size, devices: int) -> float:
    return 4 * size.all / devices


def gathered_bytes(size: Size, compute: int = 2) -> float:
    """Return the bytes that every device holds unsharded at once.

    These are the root, the current and the next block, and the float32 gradients of a block in transit.
    """
    return compute * (size.root + 2 * size.block) + 4 * max(size.block, size.root)


def block_bytes(size: Size, compute: int = 2) -> float:
    """Return the bytes that a Llama block keeps of each token for its backward pass.

    The packed pass keeps the keys and values of a prompt once more for the second answer: they count twice.
    """
    queries, keys = size.heads * size.head_size, size.kv_heads * size.head_size
    norms = (
        2 * (4 + 2 * compute) * size.hidden + 8
    )  # float32 input, scaled and unscaled output; float32 factor
    attention = compute * (3 * queries + 4 * keys) + 4 * size.heads  # output twice; sums of its softmax
    return norms + attention + 4 * compute * size.inner


def activation_bytes(
    size: Size, tokens: int, checkpointing: bool, compute: int = 2, longest: int = 0
) -> float:
    """Return the bytes of the activations of one packed pass on one device, and of its logits.

    Args:
        tokens: of the pass.
        longest: tokens of the longest example, for the masks of attention on a CPU; 0 if there are none.
    """
    block = block_bytes(size, compute)
    kept = compute * size.hidden * size.layers + block if checkpointing else block * size.layers
    # Gradients on their way through a block, and the float32 states of the last norm.
    passing = compute * (size.inner + 2 * size.hidden) + 8 * size.hidden
    return tokens * (kept + passing + compute * longest) + 3 * TILE[compute]


def peak_bytes(size: Size, devices: int, tokens: int, checkpointing: bool, compute: int = 2) -> float:
    """Return an upper bound of the bytes that a device holds in a step.

    All gradients and all activations never exist at the same time, so their sum is a bound.
    """
    weights = state_bytes(size, devices) + gradient_bytes(size, devices) + gathered_bytes(size, compute)
    return weights + activation_bytes(size, tokens, checkpointing, compute)


def traffic_bytes(size: Size, devices: int, compute: int = 2, reduce: int = 4) -> float:
    """Return the bytes that a device receives per micro-batch.

    These are the weights for the forward and the backward pass, and gradients in float32.
    """
    return (devices - 1) / devices * size.all * (2 * compute + reduce)


def flops(size: Size, tokens: int, checkpointing: bool) -> float:
    """Return the operations of a forward and a backward pass.

    Per weight and token the forward pass takes 2 and the backward pass 4. Checkpointing repeats the forward.
    """
    return (8 if checkpointing else 6) * size.all * tokens


def step_seconds(
    size: Size, devices: int, tokens: int, micro_batches: int, checkpointing: bool
) -> tuple[float, float]:
    """Return the seconds of computation and of communication of an update. torch overlaps the two.

    Args:
        tokens: Tokens of the update on all devices together.
    """
    compute = flops(size, tokens, checkpointing) / (devices * PEAK_FLOPS * MFU)
    link = NVLINK if devices <= GPUS_OF_A_MACHINE else NETWORK
    return compute, micro_batches * traffic_bytes(size, devices) / link


def sampling_seconds(size: Size, devices: int, rows: int, new_tokens: int, batch: int) -> float:
    """Return the seconds of decoding `rows` answers. Each device reads a whole model once per step."""
    step = max(2 * size.all / HBM, 2 * size.all * batch / (PEAK_FLOPS * MFU))
    return rows / (devices * batch) * new_tokens * step


# ---- tables ------------------------------------------------------------------------------------------------
# An update of the published recipes: 64 examples of about 600 tokens, both answers included.
TOKENS = 64 * 600


def tables() -> dict[str, Any]:
    """Print the tables of SCALING.md and return their values."""
    results: dict[str, Any] = {}
    print("memory of a device, GB (checkpointing, micro-batch of 16,384 tokens, RMSprop)")
    devices = (1, 2, 4, 8, 16, 32, 64)
    print(f"{'':>16}" + "".join(f"{n:>9}" for n in devices))
    for name, size in SIZES.items():
        row = [peak_bytes(size, n, 16384, True) / 1e9 for n in devices]
        results[f"memory {name}"] = dict(zip(devices, row, strict=True))
        print(f"{name:>16}" + "".join(f"{value:9.1f}" for value in row))
    print(f"\nseconds of an update of {TOKENS:,} tokens: the longer of computing and communicating")
    print(f"{'':>16}" + "".join(f"{n:>9}" for n in devices))
    for name, size in SIZES.items():
        row = []
        for n in devices:
            micro = max(1, round(TOKENS / n / 16384))
            row.append(max(step_seconds(size, n, TOKENS, micro, True)))
        results[f"step {name}"] = dict(zip(devices, row, strict=True))
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
            results[f"recipe {proposal} + {aligner}"] = hours
            print(
                f"  {proposal:>14} + {aligner}: "
                + " + ".join(f"{h:.2f}" for h in hours)
                + f" = {sum(hours):.2f}"
            )
    return results


# ---- measurements on this machine --------------------------------------------------------------------------
MEASURED = Size(8, 512, 1376, 8, 8, 8192, head_size=64)
ROWS = 16  # examples of an update
LENGTH = 128  # tokens of an example
STEPS = 6


def worker() -> None:
    """Train in one of the processes. Print memory above that before the model, step time and bandwidth."""
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
    data = dataset(lengths, MEASURED.vocabulary, LENGTH)
    before = memory_status("VmRSS")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=MEASURED.vocabulary,
            hidden_size=MEASURED.hidden,
            intermediate_size=MEASURED.inner,
            num_hidden_layers=MEASURED.layers,
            num_attention_heads=MEASURED.heads,
            num_key_value_heads=MEASURED.kv_heads,
            tie_word_embeddings=MEASURED.tied,
        )
    )
    assert sum(p.numel() for p in model.parameters()) == MEASURED.all
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    run = FSDPTrainer(settings, model, tokenizer, data, data, Path("unused"), {})
    del model
    state = 0.0
    seconds = []
    for step in range(STEPS):
        if step == 1:  # the moments exist now, and the peak must not include the unsharded model
            state = memory_status("VmRSS") - before
            Path("/proc/self/clear_refs").write_text("5")
        processes.barrier()
        start = time.perf_counter()
        run.update(np.arange(ROWS))
        seconds.append(time.perf_counter() - start)
    peak = memory_status("VmHWM") - before
    bandwidth = None
    if processes.count() > 1:
        shard = torch.zeros(MEASURED.block // processes.count())
        whole = torch.zeros(len(shard) * processes.count())
        durations = []
        for _ in range(10):
            processes.barrier()
            start = time.perf_counter()
            dist.all_gather_into_tensor(whole, shard)
            durations.append(time.perf_counter() - start)
        bandwidth = 4 * (len(whole) - len(shard)) / statistics.median(durations)
    measured = {
        "state_mb": state,
        "peak_mb": peak,
        "seconds": statistics.median(seconds[1:]),
        "bandwidth": bandwidth,
    }
    results = processes.all_gather(measured)
    if processes.is_rank0():
        print(json.dumps({key: max(result[key] or 0 for result in results) for key in measured}))
    processes.barrier()


def measure() -> dict[str, Any]:
    """Compare the peak memory and the step time of 1, 2 and 4 processes with the formulas."""
    results = {}
    for checkpointing in (0, 1):
        print(
            f"\ncheckpointing {bool(checkpointing)}: {MEASURED.all / 1e6:.1f} M weights, {ROWS} x {LENGTH} "
            "tokens, float32"
        )
        seconds_alone = None
        for count in (1, 2, 4):
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={count}",
            ]
            # With this threshold malloc returns freed blocks above 64 kB to the system, so the peak is exact.
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            process = subprocess.run(
                [*command, __file__, "--worker", str(checkpointing)],
                capture_output=True,
                text=True,
                env=environment,
            )
            if process.returncode:
                sys.exit(process.stderr)
            row = json.loads(process.stdout.splitlines()[-1])
            tokens = ROWS * LENGTH // count
            peak = peak_bytes(MEASURED, count, tokens, bool(checkpointing), 4)
            row["state_formula_mb"] = (state_bytes(MEASURED, count) + PROCESS) / 2**20
            row["peak_formula_mb"] = (peak + PROCESS) / 2**20
            seconds_alone = seconds_alone or row["seconds"]
            row["seconds_formula"] = seconds_alone / min(count, os.cpu_count() or 1)
            if count > 1:
                row["seconds_formula"] += traffic_bytes(MEASURED, count, 4) / row["bandwidth"]
            results[f"{count} processes, checkpointing {bool(checkpointing)}"] = row
            print(
                f"  {count} processes: state {row['state_mb']:6.0f} MB (formula "
                f"{row['state_formula_mb']:6.0f}), "
                f"peak {row['peak_mb']:6.0f} MB (formula {row['peak_formula_mb']:6.0f}), step "
                f"{row['seconds']:.2f} s (formula {row['seconds_formula']:.2f})",
                flush=True,
            )
    return results


def main() -> None:
    if "--worker" in sys.argv:
        from ram.distributed import processes

        processes.run(worker)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    print(json.dumps(measure() if args.measure else tables()))


if __name__ == "__main__":
    main()
