"""Show that kernels, decoding and training are right on this machine's GPU, and how fast they are.

    bash bin/gpu_check.sh [--sizes Llama-3.1-8B Llama-3.2-1B] [--training Llama-3.2-1B]

Weights are random and nothing is downloaded. Each check compares with float64 on the CPU, or with the plain
loop. The figures are of models of the given shapes; without a GPU everything runs in tiny shapes, which
says nothing about speed. Drafts of random models agree by chance, so decoding is timed per round, at width 1
and at width 4. The last line is one JSON object; the exit status is 1 if a check fails.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from scaling import SIZES, Size, peak_bytes
from training import batches_of, dataset
from transformers import LlamaConfig, LlamaForCausalLM

from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.log import pick_device
from ram.models import by_length, checkpoints
from ram.models.small import id_tokenizer
from ram.settings import compose
from ram.settings.schema import settings_of
from ram.training import logps, losses, packing
from trainers import BasicTrainer
from utils import TABLES

TINY = {
    "tiny 8B": Size(2, 64, 128, 4, 2, 512, head_size=16),
    "tiny 1B": Size(1, 32, 64, 2, 1, 512, head_size=16),
}
TOKENIZER: Any = SimpleNamespace(eos_token_id=None, pad_token_id=0, padding_side="left")


class Report:
    """Prints a line per check or figure, and keeps all of them for the JSON object."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.failed: list[str] = []

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        self.figures[name] = value
        text = value if isinstance(value, str) else f"{value:,.4g}"
        print(f"  {name:<58} {text} {unit}", flush=True)

    def check(self, name: str, error: float, bound: float) -> None:
        """A check passes if its error is at most the bound."""
        self.figures[name] = error
        passed = error <= bound
        if not passed:
            self.failed.append(name)
        print(f"  {name:<58} {error:.2g}, at most {bound:.2g}: {'right' if passed else 'WRONG'}", flush=True)


def model_of(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A model of a shape with random weights, made on its device."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        max_position_embeddings=4096,
        tie_word_embeddings=size.tied,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def worst(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error, relative to the largest exact value."""
    exact = exact.double().cpu()
    return ((actual.double().cpu() - exact).abs().max() / exact.abs().max()).item()


# ---- checks ------------------------------------------------------------------------------------------------


def check_kernels(report: Report, device: torch.device) -> None:
    """The packed pass's attention and the LM head in the types of training, against float64."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, width = 8, 2, 64
    segments = packing.Segments(lengths=(70, 33, 25, 40, 12), prefixes=(0, 50, 0, 5, 0))
    total = sum(segments.lengths)
    query, key, value = (
        torch.randn(1, count, total, width, generator=generator) for count in (heads, kv_heads, kv_heads)
    )
    exact = logps.attend(query.double(), key.double(), value.double(), segments)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        moved = [tensor.to(device, dtype) for tensor in (query, key, value)]
        report.check(f"attention with prefixes, {dtype}", worst(logps.attend(*moved, segments), exact), bound)
        if device.type == "cuda" and dtype == torch.bfloat16:
            at_once = logps.attend_at_once(*moved, segments)
            report.check("attention with prefixes, one call of varlen_attn", worst(at_once, exact), bound)
            fault = by_length.kernel_fault(device, dtype, heads, kv_heads, width)
            report.figure("attention of decoding", f"masked: {fault}" if fault else "by lengths")
        narrow = [tensor[..., :14].contiguous() for tensor in moved]  # no width that kernels like
        exact_14 = logps.attend(*(tensor[..., :14].double() for tensor in (query, key, value)), segments)
        found, _ = logps.attention(torch.nn.Identity(), *narrow, None, segments=segments)
        report.check(f"attention of heads of 14, {dtype}", worst(found.transpose(1, 2), exact_14), bound)
    vocabulary, hidden = (128256, 256) if device.type == "cuda" else (4099, 32)
    states = torch.randn(64, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    labels = torch.randint(vocabulary, (64,), generator=generator)
    exact = losses.head_logps(states.double(), weight.double(), labels)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        actual = losses.head_logps(states.to(device, dtype), weight.to(device, dtype), labels.to(device))
        report.check(f"LM head in tiles, {vocabulary} tokens, {dtype}", worst(actual, exact), bound)


def check_decoding(report: Report, device: torch.device) -> None:
    """Drafts change no token: the engine against the plain loop, in float32 in every mode."""
    pair = [model_of(size, device, torch.float32, seed) for seed, size in enumerate(TINY.values())]
    prompts = [list(range(1, 2 + length)) for length in (3, 9, 1, 30, 14, 6)]
    for mode in ("par", "par_kl", "product"):
        params = PARParams(sample_mode=mode, base_top_p=0.95, top_p=0.95)
        answers = [decoded(pair, prompts, params, 24, speculative=fast) for fast in (True, False)]
        wrong = sum(a.token_ids != b.token_ids for a, b in zip(*answers, strict=True))
        report.check(f"answers of {mode} that drafts change, of {len(prompts)}", wrong, 0)


def decoded(
    pair: list[LlamaForCausalLM],
    prompts: list[list[int]],
    params: PARParams,
    new_tokens: int,
    **settings: Any,
) -> list[generation.Generation]:
    """Answers of exactly `new_tokens` tokens; a pair of one model decodes with it alone."""
    proposal, aligner = (*pair, None)[:2]
    tokenizer = id_tokenizer(pair[0].config.vocab_size)
    settings = {"max_new_tokens": new_tokens, "batch_size": len(prompts)} | settings
    return generation.generate(proposal, aligner, tokenizer, prompts, params, **settings)


# ---- figures -----------------------------------------------------------------------------------------------


def measured(device: torch.device, work: Callable[[], Any]) -> tuple[float, float | None]:
    """Seconds of the better of two runs after a warm-up, and a GPU's peak of memory in GB."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return min(seconds), peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_decoding(report: Report, device: torch.device, sizes: dict[str, Size]) -> None:
    """Milliseconds of a round of the pair and of the proposal alone, at widths 1 and 4."""
    (large, big), (small, little) = itertools.islice(sizes.items(), 2)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    proposal, aligner = model_of(big, device, dtype), model_of(little, device, dtype, seed=1)
    params = PARParams(sample_mode="par", base_top_p=0.95)
    new_tokens, prompt = (64, 256) if device.type == "cuda" else (8, 8)
    for rows in (1, 8, 32) if device.type == "cuda" else (1, 4):
        prompts = [
            list(np.random.default_rng(row).integers(1, big.vocabulary, prompt)) for row in range(rows)
        ]
        prompts = [[int(token) for token in row] for row in prompts]
        contenders = {f"{large} alone": ([proposal], 0), f"{large} + {small}": ([proposal, aligner], 0)}
        contenders[f"{large} + {small}, 3 drafts"] = [proposal, aligner], 3
        for name, (pair, drafts) in contenders.items():
            found: list[Any] = []

            def work(pair=pair, drafts=drafts, prompts=prompts, found=found) -> None:
                found[:] = decoded(pair, prompts, params, new_tokens, draft_tokens=drafts)

            seconds, peak = measured(device, work)
            rounds = max(answer.stats["proposal_forwards"] for answer in found)
            report.figure(f"{name}, {rows} rows: a round", 1000 * seconds / rounds, "ms")
            if peak is not None:
                report.figure(f"{name}, {rows} rows: peak memory", peak, "GB")


def time_training(report: Report, device: torch.device, name: str, size: Size) -> None:
    """Tokens per second of updates with the two-term loss, and the peak of memory beside its estimate."""
    examples, max_length = (32, 512) if device.type == "cuda" else (4, 32)
    keys = ["datasets=[hh]", "model.name_or_path=none", "loss=ours_sft", f"batch_size={examples}"]
    keys += [f"max_length={max_length}", f"max_prompt_length={max_length // 2}", "warmup_steps=0", "lr=1e-6"]
    keys += ["debug=true", f"gradient_accumulation_steps={max(1, examples // 8)}"]
    keys += ["activation_checkpointing=true"] if device.type == "cuda" else []
    lengths = np.full((8 * examples, 3), max_length // 3)
    data = dataset(lengths, size.vocabulary, max_length)
    settings = settings_of(compose.compose(keys), TABLES)
    model = model_of(size, torch.device("cpu"), torch.float32)
    run = BasicTrainer(settings, model, TOKENIZER, data, data, Path("unused"), {})
    batches: Iterator[np.ndarray] = itertools.cycle(batches_of(run, 4))
    seconds, peak = measured(device, lambda: run.update(next(batches)))
    tokens = examples * int(lengths[0].sum())
    report.figure(f"{name}: training", tokens / seconds, "tokens/s")
    if peak is not None:
        pass_tokens = tokens // settings.gradient_accumulation_steps
        estimate = peak_bytes(size, 1, pass_tokens, settings.activation_checkpointing) / 1e9
        report.figure(f"{name}: peak memory of an update", peak, "GB")
        report.figure(f"{name}: the estimate of SCALING.md", estimate, "GB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs=2, default=["Llama-3.1-8B", "Llama-3.2-1B"], choices=list(SIZES))
    parser.add_argument("--training", default="Llama-3.2-1B", choices=list(SIZES))
    args = parser.parse_args()
    device, report = pick_device(), Report()
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        report.figure(
            "device", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {facts.major}.{facts.minor}"
        )
        report.figure("bfloat16", str(torch.cuda.is_bf16_supported(including_emulation=False)))
        sizes, (name, size) = {key: SIZES[key] for key in args.sizes}, (args.training, SIZES[args.training])
    else:
        torch.set_num_threads(1)
        report.figure("device", "a CPU: tiny shapes, whose speed says nothing about a GPU")
        sizes, (name, size) = TINY, list(TINY.items())[1]
    report.figure("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    with torch.inference_mode():
        check_kernels(report, device)
        check_decoding(report, device)
        time_decoding(report, device, sizes)
    time_training(report, device, name, size)
    print(json.dumps(report.figures | {"failed": report.failed}))
    return 1 if report.failed else 0


if __name__ == "__main__":
    checkpoints.quiet_transformers()
    sys.exit(main())
