"""Tokens per second of one engine by its clients and aligners, and how soon the first token comes.

    python benchmarks/engine.py [--proposal FOLDER --aligner FOLDER --prompts FILE --new-tokens N]

Clients ask one request after the other and never pause. `one`: a single client; `many`: 16; `mixed`: 16 that
ask for three aligners in turn (copies of the one, so that answers are as long); `alone`: 16 that ask for
the proposal alone, for which the aligner drafts; `offline`: the same rows by
`ram.decoding.generate`, 16 at once. First tokens are of a request in an idle engine: the pair's, and the
proposal's alone in an engine without aligners. Contenders take turns in one process; figures are medians over
the rounds. The engine keeps what it has read of earlier prompts, and `generate` reads them anew: compare the
two only if `share_of_prompts_reused` is near 0, as it is for prompts below 16 tokens. Without arguments it
takes the demo's pair (`bash bin/demo.sh` first). The last line is one JSON object.
"""

import copy
import json
import statistics
import threading
import time

from contenders import Bench, describe, load, parser

from ram.decoding import generation
from ram.decoding.requests import Request
from ram.errors import run_entry_point
from ram.serving.loop import Done, EngineThread

CLIENTS = 16


class Served:
    """An engine and what its clients ask; every run returns (tokens, seconds, answers' ids by request)."""

    def __init__(self, bench: Bench, aligners: list[str]) -> None:
        models = [bench.aligner] + [copy.deepcopy(bench.aligner) for _ in aligners[1:]]
        self.bench, self.prompts = bench, [tuple(ids) for ids in bench.prompts]
        sizes = {"max_rows": CLIENTS, "max_tokens": 8192}
        models = dict(zip(aligners, models, strict=True)) if aligners else {}
        self.engine = EngineThread(bench.proposal, bench.tokenizer, models, **sizes)

    def request(self, index: int, aligner: str | None) -> Request:
        prompt = self.prompts[index % len(self.prompts)]
        return Request(prompt, aligner, self.bench.params, self.bench.new_tokens, row_id=index)

    def run(self, count: int, clients: int, aligners: list[str | None]):
        """Every client asks again as soon as it is answered, until `count` requests were."""
        answers: list[list[int]] = [[] for _ in range(count)]
        waiting, ended, left = iter(range(count)), threading.Event(), count

        def ask() -> None:
            index = next(waiting, None)
            if index is not None:
                self.engine.submit(
                    self.request(index, aligners[index % len(aligners)]), lambda e: hear(index, e)
                )

        def hear(index: int, event) -> None:
            nonlocal left
            if not isinstance(event, Done):
                answers[index].extend(event.token_ids)
                return
            left -= 1
            ask()
            if not left:
                ended.set()

        start = time.perf_counter()
        for _ in range(clients):
            ask()
        ended.wait()
        return sum(map(len, answers)), time.perf_counter() - start, answers

    def first_token(self, index: int, aligner: str | None) -> float:
        """Milliseconds until a request's first tokens are there."""
        heard, times = threading.Event(), []

        def hear(event) -> None:
            times.append(time.perf_counter())
            if isinstance(event, Done):
                heard.set()

        start = time.perf_counter()
        self.engine.submit(self.request(index, aligner), hear)
        heard.wait()
        return 1000 * (times[0] - start)


def throughput(bench: Bench, served: Served, rows: int, rounds: int) -> dict:
    """Medians of tokens/s by contender, what they are to each other, and whether answers are the same."""
    contenders = {
        "one": lambda: served.run(max(rows // 8, 1), 1, ["a"]),
        "many": lambda: served.run(rows, CLIENTS, ["a"]),
        "mixed": lambda: served.run(rows, CLIENTS, ["a", "b", "c"]),
        "alone": lambda: served.run(rows, CLIENTS, [None]),
    }
    prompts = [served.prompts[i % len(served.prompts)] for i in range(rows)]
    settings = {"max_new_tokens": bench.new_tokens, "batch_size": CLIENTS}
    speeds: dict[str, list[float]] = {name: [] for name in [*contenders, "offline"]}
    found = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, contender in contenders.items():
            tokens, seconds, found[name] = contender()
            speeds[name] += [tokens / seconds] * bool(turn)
        start = time.perf_counter()
        offline = generation.generate(
            bench.proposal, bench.aligner, bench.tokenizer, prompts, bench.params, **settings
        )
        found["offline"] = [g.token_ids for g in offline]
        seconds = time.perf_counter() - start
        speeds["offline"] += [sum(map(len, found["offline"])) / seconds] * bool(turn)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    same = [
        a == b == c for a, b, c in zip(*(found[name] for name in ("many", "mixed", "offline")), strict=True)
    ]
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "many_to_one": round(medians["many"] / medians["one"], 2),
        "mixed_to_many": round(medians["mixed"] / medians["many"], 2),
        "many_to_offline": round(medians["many"] / medians["offline"], 2),
        "identical_answers": f"{sum(same)} of {len(same)}",
    }


def first_tokens(served: Served, alone: Served, rounds: int) -> dict:
    times: dict[str, list[float]] = {"pair": [], "alone": []}
    for index in range(16 * rounds):
        times["pair"].append(served.first_token(index, "a"))
        times["alone"].append(alone.first_token(index, None))
    medians = {name: statistics.median(values[16:] or values) for name, values in times.items()}
    return {name: round(value, 2) for name, value in medians.items()} | {
        "pair_to_alone": round(medians["pair"] / medians["alone"], 2)
    }


def main() -> None:
    args = parser(__doc__.split("\n")[0], new_tokens=16, rows=256, batches=[CLIENTS]).parse_args()
    bench = load(args)
    served, alone = Served(bench, ["a", "b", "c"]), Served(bench, [])
    result = describe(bench, args) | {"clients": CLIENTS}
    result |= throughput(bench, served, args.rows, args.rounds)
    result["first_token_ms"] = first_tokens(served, alone, args.rounds + 1)
    figures = served.engine.figures()
    result["acceptance"], result["bytes"] = round(figures["acceptance"], 3), figures["bytes"]
    reused = figures["prefix_hits"]["tokens"] / max(1, figures["prompt_tokens"])
    result["share_of_prompts_reused"] = round(reused, 3)
    for each in (served, alone):
        each.engine.close(wait=False)
    print(json.dumps(result, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    run_entry_point(main)
