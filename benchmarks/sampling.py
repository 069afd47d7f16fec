"""Rows per second of sampling a whole file with the proposal, as train.py's sample stage does it.

    python benchmarks/sampling.py [--proposal FOLDER --aligner FOLDER --prompts FILE --new-tokens N]

`generate` is transformers' in fixed batches of the same size in the file's order; `sampled` is ours, where a
row that ends makes room for the next; `drafted` is ours with the aligner drafting. Contenders take turns;
figures are medians over the rounds. Rows should differ in length: benchmarks/larger_pair.py trains a model
whose answers do. Without arguments it takes the demo's pair (`bash bin/demo.sh` first). The last line is one
JSON object.
"""

import json
import statistics

from contenders import Bench, describe, load, parser

from ram.errors import run_entry_point


def compare(bench: Bench, batch: int, rounds: int) -> dict:
    """Medians of rows/s and tokens/s by contender, their ratios, and how answers differ in length."""
    contenders = {"generate": bench.generate, "sampled": bench.alone, "drafted": bench.drafted}
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):  # the first warms up
        for name, run in contenders.items():
            tokens, seconds, answers = run(batch)
            if turn:
                found[name].append((tokens, seconds))
            if answers:
                lengths = sorted(len(answer.token_ids) for answer in answers)
    rows = len(bench.prompts)
    rates = {name: statistics.median(rows / s for _, s in values) for name, values in found.items()}
    return {
        "batch": batch,
        "rows_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "tokens_per_second": {
            name: round(statistics.median(t / s for t, s in values), 1) for name, values in found.items()
        },
        "tokens": {name: statistics.median(t for t, _ in values) for name, values in found.items()},
        "to_generate": {name: round(rates[name] / rates["generate"], 2) for name in ("sampled", "drafted")},
        "answer_tokens_at_tenths": [lengths[rows * tenth // 10] for tenth in range(10)] + lengths[-1:],
    }


def main() -> None:
    args = parser(__doc__.split("\n")[0], new_tokens=16, rows=256, batches=[8, 32]).parse_args()
    bench = load(args)
    result = describe(bench, args) | {"by_batch": []}
    for batch in args.batches:
        result["by_batch"].append(compare(bench, batch, args.rounds))
        print(json.dumps(result["by_batch"][-1], indent=1), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    run_entry_point(main)
