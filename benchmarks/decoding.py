"""Tokens per second of a pair, and of the other ways to decode with its proposal.

    python benchmarks/decoding.py [--proposal FOLDER --aligner FOLDER --prompts FILE --new-tokens N]

Contenders take turns in one process; figures are medians over the rounds, and compilation is not timed.

- The proposal alone in transformers: `generate` in fixed batches; `compiled` with a static cache and
  torch.compile; `assisted` by the aligner, at batch 1.
- The proposal alone in our loop: `alone`, and `drafted` by the aligner.
- The pair: `published` decodes one row at a time, sorts the whole vocabulary of both models and waits for
  every token; `plain` and `speculative` are ours and give the same tokens.

Peak memory is that of a process of its own, above its weights (Linux only). Without arguments it takes the
demo's pair (`bash bin/demo.sh` first). The table is followed by one JSON object in the last line.
"""

import json
import statistics
import sys

from contenders import Bench, describe, load, measured_in_a_process, memory_status, parser

from ram.errors import run_entry_point

CONTENDERS = ("generate", "compiled", "assisted", "alone", "drafted", "published", "plain", "speculative")
ONE_ROW = ("assisted", "published")  # they decode one row at a time, and are compared at batch 1 only
LOOPS = (
    "generate",
    "alone",
    "drafted",
    "published",
    "plain",
    "speculative",
)  # whose memory and growth matter


def compare(bench: Bench, batch: int, rounds: int) -> dict:
    """Medians of tokens/s by contender, what they are to each other, and how the drafts fared.

    One row at a time takes an eighth of the rows: they are as many tokens a second.
    """
    names = [name for name in CONTENDERS if batch == 1 or name not in ONE_ROW]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    whole, texts = bench.prompts, {}
    bench.prompts = whole[:: 1 if batch > 1 else 8]
    for turn in range(rounds + 1):  # the first warms up and compiles
        for name in names:
            tokens, seconds, found = getattr(bench, name)(batch)
            if turn:
                speeds[name].append(tokens / seconds)
            texts[name] = found
    bench.prompts = whole
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    pair, stats = medians["speculative"], [g.stats for g in texts["speculative"]]
    tokens = sum(len(g.token_ids) for g in texts["speculative"])
    same = [a.token_ids == b.token_ids for a, b in zip(texts["plain"], texts["speculative"], strict=True)]
    return {
        "batch": batch,
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "speculative_to": {name: round(pair / value, 2) for name, value in medians.items()},
        "agreement": round(sum(s["accepted"] for s in stats) / tokens, 3),
        "proposal_forwards_per_token": round(sum(s["proposal_forwards"] for s in stats) / tokens, 3),
        "aligner_forwards_per_token": round(sum(s["aligner_forwards"] for s in stats) / tokens, 3),
        "rows_identical_to_plain": f"{sum(same)} of {len(same)}",
    }


def table(by_batch: list[dict]) -> str:
    """Return tokens/s by contender and batch; in parentheses the pair's as a multiple of them."""
    lines = ["| contender | " + " | ".join(f"batch {found['batch']}" for found in by_batch) + " |"]
    lines.append("| --- |" + " --: |" * len(by_batch))
    for name in CONTENDERS:
        cells = [
            f"{found['tokens_per_second'][name]:,.0f} ({found['speculative_to'][name]:.2f})"
            if name in found["tokens_per_second"]
            else "–"
            for found in by_batch
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_token(bench: Bench, rounds: int) -> dict[str, float]:
    """Milliseconds until one row's first token is there, by contender."""
    whole, found = (bench.prompts, bench.new_tokens), {name: [] for name in LOOPS}
    bench.prompts, bench.new_tokens = whole[0][:1], 1
    for _ in range(rounds + 1):
        for name in LOOPS:
            found[name].append(1000 * getattr(bench, name)(1)[1])
    bench.prompts, bench.new_tokens = whole
    return {name: round(statistics.median(values[1:]), 2) for name, values in found.items()}


def growth(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Measure milliseconds per token at batch 1, for each contender and several prompt lengths.

    Returns:
        The prompt lengths, of which the longest fills the context, and one list for each contender.
    """
    whole, found = (bench.prompts, bench.new_tokens), {name: [] for name in LOOPS}
    bench.new_tokens = min(16, whole[1])
    limit = bench.proposal.config.max_position_embeddings - bench.new_tokens
    text = [token for prompt in whole[0] for token in prompt] * limit
    lengths = [limit // share for share in (8, 4, 2, 1)]
    for length in lengths:
        bench.prompts = [text[start : start + length] for start in range(0, 8 * length, length)]
        taken: dict[str, list[float]] = {name: [] for name in LOOPS}
        for _ in range(rounds + 1):
            for name in LOOPS:
                tokens, seconds, _ = getattr(bench, name)(1)
                taken[name].append(1000 * seconds / tokens)
        for name, values in taken.items():
            found[name].append(round(statistics.median(values[1:]), 2))
    bench.prompts, bench.new_tokens = whole
    return {"prompt_tokens": lengths} | found


def peaks(batch: int) -> dict[str, float]:
    """MB above the weights at each contender's worst moment."""
    given = [*sys.argv[1:], f"--batches={batch}"]
    return {name: round(measured_in_a_process([*given, f"--probe={name}"]), 1) for name in LOOPS}


def probe(bench: Bench, contender: str, batch: int) -> float:
    """MB above the weights at the contender's worst moment, over two batches."""
    prompts, bench.prompts = bench.prompts[: 2 * batch], bench.prompts[:1]
    getattr(bench, contender)(1)  # what every process loads once
    bench.prompts, before = prompts, memory_status("VmRSS")
    getattr(bench, contender)(batch)
    return memory_status("VmHWM") - before


def main() -> None:
    arguments = parser(__doc__.split("\n")[0], new_tokens=16, rows=64, batches=[1, 8, 32])
    arguments.add_argument("--probe", choices=LOOPS, help="only this contender's peak memory, in MB")
    args = arguments.parse_args()
    bench = load(args)
    if args.probe:
        print(json.dumps(probe(bench, args.probe, args.batches[0])))
        return
    result = describe(bench, args) | {"by_batch": []}
    for batch in args.batches:
        result["by_batch"].append(compare(bench, batch, args.rounds) | {"peak_mb": peaks(batch)})
        print(json.dumps(result["by_batch"][-1], indent=1), flush=True)
    print(table(result["by_batch"]))
    result["first_token_ms"] = first_token(bench, args.rounds)
    result["ms_per_token_by_prompt"] = growth(bench, min(3, args.rounds))
    print(json.dumps(result))


if __name__ == "__main__":
    run_entry_point(main)
