"""Formulas for memory, communication and time on many devices, and the tables that follow from them.

    python benchmarks/scaling.py                print the tables of SCALING.md and docs/distributed.md
    python benchmarks/scaling_measured.py       compare the formulas with 1, 2 and 4 processes on this machine

benchmarks/SCALING.md explains the formulas. The last line is one JSON object.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def dpo_bytes(size: Size, devices: int, tokens: int, checkpointing: bool) -> float:
    """Return `peak_bytes` with a frozen reference of the same shape in bf16, sharded in the same way."""
    reference = 2 * size.all / devices + 2 * (size.root + 2 * size.block)
    return peak_bytes(size, devices, tokens, checkpointing) + reference


def lora_weights(size: Size, rank: int) -> int:
    """Return the weights of low-rank adapters beside all linear layers of the blocks."""
    queries, keys = size.heads * size.head_size, size.kv_heads * size.head_size
    shapes = [(size.hidden, queries), (size.hidden, keys), (size.hidden, keys), (queries, size.hidden)]
    shapes += [(size.hidden, size.inner)] * 2 + [(size.inner, size.hidden)]
    return size.layers * rank * sum(inputs + outputs for inputs, outputs in shapes)


def lora_bytes(size: Size, tokens: int, checkpointing: bool, rank: int = 16) -> float:
    """Return an upper bound of the bytes of a step with adapters beside frozen bf16 weights, on one device.

    A block keeps what it keeps without adapters, and their inner states; inputs pass through float32.
    """
    adapters = 4 * 4 * lora_weights(size, rank)  # weights, gradients, and two moments, as AdamW has
    inner_states = 7 * 2 * rank * (1 if checkpointing else size.layers)
    copies = tokens * (inner_states + 4 * size.inner)
    return 2 * size.all + adapters + activation_bytes(size, tokens, checkpointing) + copies


def cache_bytes(size: Size, rows: int, length: int) -> float:
    """Return the bytes of the keys and values of some rows in bf16."""
    return 2 * 2 * size.layers * size.kv_heads * size.head_size * rows * length


def decoding_bytes(models: Sequence[Size], rows: int, length: int) -> float:
    """Return the bytes of models that decode together in bf16, with their caches, on one device."""
    return sum(2 * size.all + cache_bytes(size, rows, length) for size in models)


def fewest_devices(bytes_on: Callable[[int], float], memory: float) -> int:
    """Return the smallest power of two of devices on which a need fits nine tenths of their memory."""
    return next(n for n in (2**i for i in range(16)) if bytes_on(n) <= 0.9 * memory)


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
BATCH = 64  # examples of an update of the published recipes, ...
EXAMPLE = 600  # ... and their mean tokens, both answers included
BUDGET = 8192  # tokens_per_pass of the recipes
MEMORY = 80e9  # bytes of a GPU
DEVICES = (1, 2, 4, 8, 16, 32, 64)
ALIGNERS = ("Llama-3.2-1B", "Llama-3.2-3B")
SAMPLE_BATCH = 16  # rows decoded at once, the default of sampling.batch_size
SAMPLE_LENGTH = 2048  # tokens of a prompt and its answer, at most


def pass_tokens(devices: int) -> int:
    """Return the tokens of the largest pass of an update, whose examples are shared out first."""
    return min(BUDGET, max(EXAMPLE, BATCH * EXAMPLE // devices))


def memory_table() -> list[list[str]]:
    """Memory of training on N devices, in GB, with checkpointing and RMSprop, at a whole budget."""
    header = ["GPUs", *map(str, DEVICES)]
    rows = [
        [name, *(shown(peak_bytes(size, n, BUDGET, True)) for n in DEVICES)] for name, size in SIZES.items()
    ]
    return [header, *rows]


def budget_table() -> list[list[str]]:
    """Memory of the activations of a pass, in GB, by its budget of tokens."""
    budgets = (4096, 8192, 16384, 32768)
    header = ["tokens_per_pass", *(f"{tokens:,}" for tokens in budgets)]
    rows = []
    for name, size in SIZES.items():
        pairs = (
            [shown(activation_bytes(size, tokens, checkpointing)) for checkpointing in (True, False)]
            for tokens in budgets
        )
        rows.append([name, *(", ".join(pair) for pair in pairs)])
    return [header, *rows]


def stage_table() -> list[list[str]]:
    """Memory per GPU of each kind of stage, in GB, and the fewest GPUs of 80 GB for full training."""
    header = ["model", "SFT, 1 GPU", "SFT, 8 GPUs", "DPO, 8 GPUs", "80 GB GPUs for SFT, DPO", "LoRA, 1 GPU"]
    header += ["decoding, 1 GPU"]
    rows = []
    for name, size in SIZES.items():

        def sft(n: int, size: Size = size) -> float:
            return peak_bytes(size, n, BUDGET, True)

        def dpo(n: int, size: Size = size) -> float:
            return dpo_bytes(size, n, BUDGET, True)

        rows.append(
            [
                name,
                shown(sft(1)),
                shown(sft(8)),
                shown(dpo(8)),
                f"{fewest_devices(sft, MEMORY)}, {fewest_devices(dpo, MEMORY)}",
                shown(lora_bytes(size, BUDGET, True)),
                shown(decoding_bytes([size], SAMPLE_BATCH, SAMPLE_LENGTH)),
            ]
        )
    return [header, *rows]


def step_table() -> list[list[str]]:
    """Seconds of an update of a recipe: the longer of computing and communicating."""
    header = ["GPUs", *map(str, DEVICES)]
    rows = []
    for name, size in SIZES.items():
        seconds = (update_seconds(size, n) for n in DEVICES)
        rows.append([name, *(f"{value:.2f}" for value in seconds)])
    return [header, *rows]


def update_seconds(size: Size, devices: int) -> float:
    """Return the seconds of an update of a recipe, with passes within the budget and checkpointing."""
    passes = -(-BATCH * EXAMPLE // (devices * BUDGET))
    return max(step_seconds(size, devices, BATCH * EXAMPLE, passes, True))


def recipe_table() -> list[list[str]]:
    """Least hours of a recipe's stages on 8 GPUs, and the memory of decoding the pair."""
    rows = [["proposal", "aligner", "warm-up", "sampling", "aligner epoch", "decoding the pair, GB"]]
    for proposal in ("Llama-3.1-8B", "Qwen2.5-14B", "Llama-3.1-70B"):
        for aligner in ALIGNERS:
            pair = SIZES[proposal], SIZES[aligner]
            warm_up = 10048 / BATCH * update_seconds(pair[0], 8)
            sampling = sampling_seconds(pair[0], 8, 100_000, 300, SAMPLE_BATCH)
            epoch = 100_000 / BATCH * update_seconds(pair[1], 8)
            memory = decoding_bytes(pair, SAMPLE_BATCH, SAMPLE_LENGTH)
            fits = memory <= 0.9 * MEMORY
            hours = [
                f"{warm_up / 3600:.2f}",
                f"{sampling / 3600:.2f}" if fits else "-",
                f"{epoch / 3600:.2f}",
            ]
            rows.append([proposal, aligner, *hours, shown(memory)])
    return rows


def shown(count: float) -> str:
    """Return bytes as GB with three digits."""
    value = count / 1e9
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "memory": memory_table,
    "budget": budget_table,
    "stages": stage_table,
    "step": step_table,
    "recipe": recipe_table,
}


def markdown(table: list[list[str]]) -> str:
    """Return a table as Markdown; its first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def tables() -> dict[str, Any]:
    """Print the tables as the pages have them, and return them."""
    found = {name: make() for name, make in TABLES.items()}
    for name, table in found.items():
        print(f"{(TABLES[name].__doc__ or '').strip()}\n\n{markdown(table)}\n")
    return found


if __name__ == "__main__":
    print(json.dumps(tables()))
