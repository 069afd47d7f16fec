"""Compare the formulas of scaling.py with training by 1, 2 and 4 processes on this machine (CPU, Linux).

    python benchmarks/scaling_measured.py

The last line is one JSON object.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling import Size, peak_bytes, state_bytes, traffic_bytes

PROCESS = 44 * 2**20  # bytes that a process needs besides the model, as measured
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
    print(json.dumps(measure()))


if __name__ == "__main__":
    main()
