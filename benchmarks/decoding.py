"""Tokens per second of a pair, against its proposal alone in transformers and against a published-style loop.

    python benchmarks/decoding.py [--proposal FOLDER --aligner FOLDER --prompts FILE --new-tokens N]

Contenders take turns in one process; figures are medians over the rounds. `generate` is transformers' with
the proposal alone, in fixed batches; `published` decodes one row at a time, sorts the whole vocabulary of
both models and waits for every token; `plain` and `speculative` are ours and give the same tokens. Without
arguments it takes the demo's pair (`bash bin/demo.sh` first). The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch  # noqa: E402
from batch_invariance import DEMO, demo_run  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import checkpoints  # noqa: E402
import decoding  # noqa: E402
from par import PARParams  # noqa: E402
from prompts import render  # noqa: E402
from utils import pick_device, read_rows, run_entry_point  # noqa: E402


class Bench:
    """A pair, prompts and settings; every contender returns (tokens, seconds, its generations or None)."""

    def __init__(self, proposal, aligner, tokenizer, prompts, params: PARParams, new_tokens: int) -> None:
        self.proposal, self.aligner, self.tokenizer = proposal, aligner, tokenizer
        self.prompts, self.params, self.new_tokens = prompts, params, new_tokens
        tokenizer.padding_side = "left"

    def generate(self, batch: int):
        p, tokens, start = self.params, 0, time.perf_counter()
        eos, pad = self.tokenizer.eos_token_id, checkpoints.pad_id(self.tokenizer)
        for i in range(0, len(self.prompts), batch):
            given = self.tokenizer.pad({"input_ids": self.prompts[i : i + batch]}, return_tensors="pt")
            given = given.to(self.proposal.device)
            output = self.proposal.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                max_new_tokens=self.new_tokens,
                do_sample=True,
                temperature=p.base_temperature,
                top_p=p.base_top_p,
                top_k=0,
                pad_token_id=pad,
                eos_token_id=eos,
            )
            for row in output[:, given["input_ids"].shape[1] :].tolist():
                tokens += row.index(eos) + 1 if eos in row else len(row)
        return tokens, time.perf_counter() - start, None

    @torch.inference_mode()
    def published(self, batch: int):
        """One row at a time: two forwards, two full sorts and a host synchronisation per token."""
        p, tokens, start = self.params, 0, time.perf_counter()
        for prompt in self.prompts:
            caches = [DynamicCache(), DynamicCache()]
            ids, output = torch.tensor([prompt], device=self.proposal.device), []
            while len(output) < self.new_tokens:
                z_p, z_q = (
                    m(input_ids=ids, past_key_values=c, use_cache=True).logits[0, -1].float()
                    for m, c in zip((self.proposal, self.aligner), caches, strict=True)
                )
                nucleus = self.top_p(z_p / p.base_temperature, p.base_top_p)
                law = self.top_p(
                    (z_q / p.temperature).masked_fill(nucleus == float("-inf"), float("-inf")), p.top_p
                )
                output.append(int(torch.multinomial(torch.softmax(law, dim=-1), 1)))
                if output[-1] == self.tokenizer.eos_token_id:
                    break
                ids = torch.tensor([output[-1:]], device=self.proposal.device)
            tokens += len(output)
        return tokens, time.perf_counter() - start, None

    @staticmethod
    def top_p(logits: torch.Tensor, mass: float) -> torch.Tensor:
        ranked, order = torch.sort(logits, descending=True)
        drop = torch.softmax(ranked, dim=-1).cumsum(dim=-1) > mass
        drop[1:], drop[0] = drop[:-1].clone(), False
        return logits.masked_fill(torch.zeros_like(drop).scatter(0, order, drop), float("-inf"))

    def ours(self, batch: int, **settings):
        start = time.perf_counter()
        found = decoding.generate(
            self.proposal,
            self.aligner,
            self.tokenizer,
            self.prompts,
            self.params,
            max_new_tokens=self.new_tokens,
            batch_size=batch,
            **settings,
        )
        return sum(len(g.token_ids) for g in found), time.perf_counter() - start, found

    def plain(self, batch: int):
        return self.ours(batch, speculative=False)

    def speculative(self, batch: int):
        return self.ours(batch)


CONTENDERS = ("generate", "published", "plain", "speculative")


def compare(bench: Bench, batch: int, rounds: int) -> dict:
    """Medians of tokens/s by contender, what they are to each other, and how the drafts fared."""
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    texts: dict[str, list] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name in CONTENDERS:
            tokens, seconds, found = getattr(bench, name)(batch)
            if turn:
                speeds[name].append(tokens / seconds)
            texts[name] = found
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    drafted, stats = medians["speculative"], [g.stats for g in texts["speculative"]]
    tokens = sum(len(g.token_ids) for g in texts["speculative"])
    same = [a.token_ids == b.token_ids for a, b in zip(texts["plain"], texts["speculative"], strict=True)]
    return {
        "batch": batch,
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "speculative_to": {name: round(drafted / medians[name], 2) for name in CONTENDERS[:3]},
        "agreement": round(sum(s["accepted"] for s in stats) / tokens, 3),
        "proposal_forwards_per_token": round(sum(s["proposal_forwards"] for s in stats) / tokens, 3),
        "aligner_forwards_per_token": round(sum(s["aligner_forwards"] for s in stats) / tokens, 3),
        "rows_identical_to_plain": f"{sum(same)} of {len(same)}",
    }


def first_token(bench: Bench, rounds: int) -> dict[str, float]:
    """Milliseconds until one row's first token is there, by contender."""
    whole, found = (bench.prompts, bench.new_tokens), {name: [] for name in CONTENDERS}
    bench.prompts, bench.new_tokens = whole[0][:1], 1
    for _ in range(rounds + 1):
        for name in CONTENDERS:
            found[name].append(1000 * getattr(bench, name)(1)[1])
    bench.prompts, bench.new_tokens = whole
    return {name: round(statistics.median(values[1:]), 2) for name, values in found.items()}


def growth(bench: Bench, lengths: list[int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per token at batch 1 as answers grow, by contender; answers that end early count less."""
    whole, found = (bench.prompts, bench.new_tokens), {name: [] for name in CONTENDERS}
    bench.prompts = whole[0][:8]
    for bench.new_tokens in lengths:
        taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(rounds):
            for name in CONTENDERS:
                tokens, seconds, _ = getattr(bench, name)(1)
                taken[name].append(1000 * seconds / tokens)
        for name, values in taken.items():
            found[name].append(round(statistics.median(values), 2))
    bench.prompts, bench.new_tokens = whole
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--proposal")
    parser.add_argument("--aligner")
    parser.add_argument(
        "--prompts", default=str(DEMO / "data/seed0/test/toy_test.json"), help="with `instruction`"
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs=2, default=[1.0, 0.5], metavar=("Q", "P"))
    args = parser.parse_args()
    proposal, aligner = args.proposal or demo_run("wu_sft_toy_"), args.aligner or demo_run("ours_sft_toy_")
    device = pick_device()
    tokenizer, _ = checkpoints.load_pair(proposal, aligner)
    models = [checkpoints.load_model(path, "auto", device) for path in (proposal, aligner)]
    rows = read_rows(args.prompts, ["instruction"])[: args.rows]
    prompts = [tokenizer(render(row["instruction"])).input_ids for _, row in rows]
    t_q, t_p = args.temperatures
    params = PARParams("par", temperature=t_q, top_p=0.95, repetition_penalty=1.0, base_temperature=t_p)
    bench = Bench(*models, tokenizer, prompts, params, args.new_tokens)
    result = {
        "proposal_parameters": sum(p.numel() for p in models[0].parameters()),
        "aligner_parameters": sum(p.numel() for p in models[1].parameters()),
        "vocabulary": len(tokenizer),
        "rows": len(prompts),
        "new_tokens": args.new_tokens,
        "temperatures": [t_q, t_p],
        "by_batch": [],
    }
    for batch in args.batches:
        result["by_batch"].append(compare(bench, batch, args.rounds))
        print(json.dumps(result["by_batch"][-1], indent=1))
    result["first_token_ms"] = first_token(bench, args.rounds)
    lengths = sorted({max(2, args.new_tokens // share) for share in (8, 4, 2, 1)})
    result["ms_per_token_by_length"] = {"lengths": lengths} | growth(bench, lengths, 3)
    machine = {"threads": torch.get_num_threads(), "device": str(device), "torch": torch.__version__}
    print(json.dumps(result | {"machine": machine | {"python": platform.python_version()}}))


if __name__ == "__main__":
    run_entry_point(main)
