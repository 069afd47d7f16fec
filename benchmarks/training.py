"""Time and memory of training steps with the two-term loss: as published, padded, and packed.

    python benchmarks/training.py [--data FOLDER_OR_FILE] [--vocabularies 32000 128256] [--batch 8]

A small Llama with random weights trains on random ids. The lengths of the examples are those of HH rows if
--data is given (four characters per token), else log-normal with parameters fitted to HH. The contenders
alternate on the same batches, and times are medians. Peak memory is measured in a separate process, above
weights and optimizer state (Linux only). The last line is one JSON object. Contenders:

    published      two padded forward passes, float32 logits, log_softmax of all of them, gather
    padded         packed=false: two padded forward passes, cross entropy of all logits
    packed, kept   packed, but the logits of all response tokens are kept for the backward pass
    packed         packed=true, the default of training
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from contenders import measured_in_a_process, memory_status
from transformers import LlamaConfig, LlamaForCausalLM
from trl_steps import trl_step

from preference_datasets import get_batch_iterator
from ram.data.prompts import split_dialogue
from ram.data.tokenization import TokenizedDataset
from ram.errors import UserError, run_entry_point
from ram.settings import compose
from ram.settings.schema import settings_of
from ram.storage.files import read_rows
from ram.training import logps, losses, packing
from ram.training.packing import collate
from trainers import BasicTrainer
from utils import TABLES

PARTS = ("prompt", "target", "negative")
# Mean and standard deviation of the logarithm of HH lengths in tokens, by part.
FITTED = {"prompt": (4.36, 1.08), "target": (3.48, 1.03), "negative": (3.44, 1.03)}
CHARACTERS = 4  # per token


# ---- contenders --------------------------------------------------------------------------------------------


def published_logps(
    model: LlamaForCausalLM,
    data: TokenizedDataset,
    rows: np.ndarray,
    answers: Sequence[str],
    pad_id: int,
    drawn: np.ndarray | None = None,
) -> logps.Answers:
    """Compute `padded_logps` as published: float32 log-probabilities of the whole vocabulary, then gather."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, list[int]] = {}
    for answer in answers:
        batch = collate(data, rows, answer, pad_id)
        labels = batch.pop("labels")[:, 1:]
        mask = labels != -100
        logits = model(**batch, use_cache=False).logits.to(torch.float32)[:, :-1]
        token_logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        sums[answer] = (token_logps * mask).sum(-1)
        counts[answer] = mask.sum(-1).tolist()
    return sums, counts


def kept_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: int | None = None,
    added: None = None,
) -> torch.Tensor:
    """Compute `head_logps` without tiles and without recomputing the logits in the backward pass."""
    return -F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="none")


# name -> (forward pass, replacement for `head_logps`)
CONTENDERS = {
    "published": (published_logps, None),
    "padded": (logps.padded_logps, None),
    "packed, kept": (logps.packed_logps, kept_logits),
    "packed": (logps.packed_logps, None),
}


# ---- data and model ----------------------------------------------------------------------------------------


def lengths_of(source: str | None, count: int, seed: int = 0) -> np.ndarray:
    """Return the tokens of prompt, target and negative of at most `count` examples: (count, 3)."""
    rng = np.random.default_rng(seed)
    if source is None:
        samples = [np.exp(rng.normal(*FITTED[part], size=count)) for part in PARTS]
        return np.maximum(np.stack(samples, axis=1).astype(int), 1)
    path = Path(source)
    files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"no *.jsonl* files in {path}: give a file or folder of rows with chosen and rejected"
        )
    lengths = []
    for file in files:
        for _, row in read_rows(file, ("chosen", "rejected")):
            chosen, rejected = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
            if chosen and rejected and chosen[0] == rejected[0]:
                lengths.append([len(text) // CHARACTERS + 1 for text in (*chosen, rejected[1])])
    return np.array(lengths)[rng.permutation(len(lengths))[:count]]


def dataset(lengths: np.ndarray, vocabulary: int, max_length: int) -> TokenizedDataset:
    """Make examples of random ids. Prompts are cut to max_length / 2, answers to the remaining length."""
    rng = np.random.default_rng(0)
    prompts = np.minimum(lengths[:, 0], max_length // 2)
    sizes = {"prompt": prompts}
    for i, part in enumerate(PARTS[1:], start=1):
        sizes[part] = np.minimum(lengths[:, i], max_length - prompts)
    return TokenizedDataset(
        {part: rng.integers(vocabulary, size=size.sum(), dtype=np.int32) for part, size in sizes.items()},
        {part: np.cumsum([0, *size]) for part, size in sizes.items()},
        {},
    )


def make_run(args: argparse.Namespace, vocabulary: int, *overrides: str) -> BasicTrainer:
    """Make a trainer of the benchmark's model and data. It writes no files."""
    composed = compose.compose(
        [
            "datasets=[hh]",
            "model.name_or_path=none",
            "loss=ours_sft",
            f"batch_size={args.batch}",
            f"max_length={args.max_length}",
            f"max_prompt_length={args.max_length // 2}",
            "warmup_steps=0",
            "lr=1e-6",
            "debug=true",
            *overrides,
        ]
    )
    settings = settings_of(composed, TABLES)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.max_length,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    data = dataset(lengths_of(args.data, 4096), vocabulary, args.max_length)
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    model = LlamaForCausalLM(config)
    reference = copy.deepcopy(model) if settings.loss.name == "dpo" else None
    return BasicTrainer(settings, model, tokenizer, data, data, Path("unused"), {}, reference)


def batches_of(run: BasicTrainer, count: int) -> list[np.ndarray]:
    """Return the first batches of a run, as row indices."""
    batches = get_batch_iterator(len(run.train_data), run.settings.batch_size, n_epochs=1)
    return list(itertools.islice(batches, count))


# ---- measuring ---------------------------------------------------------------------------------------------


def choose(run: BasicTrainer, contender: str) -> None:
    """Make the trainer use the forward pass of a contender."""
    run.logps, head = CONTENDERS[contender]
    logps.head_logps = head or losses.head_logps  # `packed_logps` looks it up there


def step(run: BasicTrainer, contender: str, rows: np.ndarray) -> float:
    """Run one update and return its seconds."""
    choose(run, contender)
    start = time.perf_counter()
    run.update(rows)
    return time.perf_counter() - start


def times(runs: dict[str, tuple[BasicTrainer, str]], repeats: int) -> dict[str, dict[str, Any]]:
    """Measure named (trainer, contender) pairs, alternating on the same batches. Returns medians."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts = {name: [0, 0] for name in runs}
    first = next(iter(runs.values()))[0]
    for i, rows in enumerate(batches_of(first, repeats + 1)):
        for name, (run, contender) in runs.items():
            tokens_before = run.tokens
            duration = step(run, contender, rows)
            if i:  # the first batch is a warm-up
                seconds[name].append(duration)
                counts[name][0] += len(rows)
                counts[name][1] += run.tokens - tokens_before
    results = {}
    for name, durations in seconds.items():
        examples, tokens = (count / len(durations) for count in counts[name])
        median = statistics.median(durations)
        results[name] = {
            "seconds": median,
            "spread": [min(durations), max(durations)],
            "examples_per_second": examples / median,
            "response_tokens_per_second": tokens / median,
        }
    return results


def check_equal(run: BasicTrainer) -> None:
    """Check that all contenders compute the same losses."""
    values = {}
    for name in CONTENDERS:
        choose(run, name)
        with torch.no_grad():
            values[name], _ = run.losses(run.train_data, np.arange(4))
    for name, value in values.items():
        torch.testing.assert_close(value, values["published"], rtol=1e-5, atol=0, msg=f"{name} differs")


def probe(args: argparse.Namespace) -> None:
    """Print the peak memory of an update in MB, above weights and optimizer state. Needs its own process.

    The update uses the batch with the most tokens among the first eight.
    """
    run = make_run(args, args.probe_vocabulary)
    for weight in run.model.parameters():
        weight.grad = torch.zeros_like(weight)
    run.optimizer.step()  # with zero gradients, to allocate its state
    run.optimizer.zero_grad(set_to_none=True)
    batches = batches_of(run, 8)
    before = memory_status("VmRSS")
    longest = max(batches, key=lambda rows: packing.lengths(run.train_data, rows, run.answers).sum())
    step(run, args.probe, longest)
    print(json.dumps(memory_status("VmHWM") - before))


def peak(args: argparse.Namespace, contender: str, vocabulary: int, **changes: int) -> float:
    """Run `probe` in a process with the arguments `args`, some of them changed. Returns MB."""
    values = vars(args) | changes | {"probe": contender, "probe_vocabulary": vocabulary}
    names = ("data", "batch", "max_length", "hidden", "layers", "probe", "probe_vocabulary")
    options = [f"--{name.replace('_', '-')}={values[name]}" for name in names if values[name] is not None]
    return measured_in_a_process(options)


# ---- the tables --------------------------------------------------------------------------------------------


def against_published(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Measure time and memory of all contenders, and the share of laying out the tokens."""
    run = make_run(args, vocabulary)
    check_equal(run)
    results: dict[str, Any] = times({name: (run, name) for name in CONTENDERS}, args.repeats)
    rows = batches_of(run, args.repeats)
    start = time.perf_counter()
    for batch in rows:
        packing.pack(run.train_data, batch, run.answers)
    packing_seconds = (time.perf_counter() - start) / len(rows)
    base = results["published"]
    print(f"\nvocabulary {vocabulary:,}, batch {args.batch}, up to {args.max_length} tokens")
    for name, row in results.items():
        row["peak_mb"] = peak(args, name, vocabulary)
        row["speedup"] = row["examples_per_second"] / base["examples_per_second"]
        row["memory_share"] = row["peak_mb"] / base["peak_mb"]
        print(
            f"  {name:<13} {row['seconds']:>7.2f} s  {row['examples_per_second']:>6.2f} examples/s  "
            f"{row['response_tokens_per_second']:>6.0f} tokens/s  {row['speedup']:>5.2f}x  "
            f"{row['peak_mb']:>7,.0f} MB  {row['memory_share']:.2f} of published",
            flush=True,
        )
    results["collation_share"] = packing_seconds / results["packed"]["seconds"]
    print(f"  laying out the tokens: {results['collation_share']:.2%} of a packed step")
    return results


def by_size(args: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """Measure the packed and the published step for several batch sizes and lengths."""
    print(f"\nvocabulary {vocabulary:,}: seconds (and MB) of one step, published -> packed")
    cells = []
    for max_length in (args.max_length // 4, args.max_length // 2, args.max_length):
        for batch in (args.batch // 4, args.batch // 2, args.batch):
            sizes = {"batch": batch, "max_length": max_length}
            run = make_run(argparse.Namespace(**vars(args) | sizes), vocabulary)
            names = ("published", "packed")
            results = times({name: (run, name) for name in names}, args.repeats)
            seconds = {name: results[name]["seconds"] for name in names}
            memory = {name: peak(args, name, vocabulary, **sizes) for name in names}
            cells.append(sizes | {"seconds": seconds, "peak_mb": memory})
            print(
                f"  up to {max_length:>4} tokens, batch {batch:>2}: {seconds['published']:>6.2f} -> "
                f"{seconds['packed']:>5.2f} s ({memory['published']:>6,.0f} -> {memory['packed']:>5,.0f} MB)",
                flush=True,
            )
    return cells


def sampled_term(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Measure the cost of the sampled term, relative to plain SFT on the same targets."""
    runs = {"sft": make_run(args, vocabulary, "loss=sft")}
    for fraction in (1.0, 0.1):
        runs[f"two terms, {fraction}"] = make_run(args, vocabulary, f"loss.sampled_fraction={fraction}")
    results = times({name: (run, "packed") for name, run in runs.items()}, args.repeats)
    print(f"\nvocabulary {vocabulary:,}: cost of the sampled term")
    for name, row in results.items():
        row["over_sft"] = row["seconds"] / results["sft"]["seconds"]
        print(f"  {name:<15} {row['seconds']:>6.2f} s  {row['over_sft']:.2f} x plain SFT", flush=True)
    return results


def against_trl(args: argparse.Namespace, vocabulary: int) -> dict[str, Any] | str:
    """Compare our steps with TRL's, for the losses that both have, alternating on the same rows."""
    try:
        import trl  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "not measured: trl is not installed"
    print(f"\nvocabulary {vocabulary:,}: against TRL {trl.__version__}")
    results: dict[str, Any] = {"version": trl.__version__}
    for loss in ("sft", "dpo"):
        run = make_run(args, vocabulary, f"loss={loss}")
        rows = batches_of(run, args.repeats + 1)
        run_trl_step = trl_step(loss, run.model, run.train_data, args.batch)
        our_seconds, trl_seconds = [], []
        for batch in rows:
            our_seconds.append(step(run, "packed", batch))
            trl_seconds.append(run_trl_step(batch))
        # The first step of both is a warm-up.
        seconds = {"ours": statistics.median(our_seconds[1:]), "trl": statistics.median(trl_seconds[1:])}
        results[loss] = {"seconds": seconds, "speedup": seconds["trl"] / seconds["ours"]}
        print(
            f"  {loss}: {seconds['trl']:.2f} -> {seconds['ours']:.2f} s, {results[loss]['speedup']:.2f} x",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", help="a file, or a folder of files, with rows {chosen, rejected}")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--probe", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--probe-vocabulary", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args)
        return
    results: dict[str, Any] = {"published_step": {v: against_published(args, v) for v in args.vocabularies}}
    results["by_size"] = by_size(args, args.vocabularies[0])
    results["sampled_term"] = {v: sampled_term(args, v) for v in args.vocabularies}
    results["trl"] = against_trl(args, args.vocabularies[0])
    settings = {key: value for key, value in vars(args).items() if not key.startswith("probe")}
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(results | {"settings": settings, "environment": environment}))


if __name__ == "__main__":
    run_entry_point(main)
