"""Shared by the benchmarks of decoding: the pair, the contenders, the measurement of memory."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from exactness import DEMO, demo_run
from transformers import DynamicCache

from ram.data.prompts import render
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.log import pick_device
from ram.models import checkpoints
from ram.storage.files import read_rows


class Bench:
    """A pair, prompts and settings; every contender returns (tokens, seconds, its generations or None)."""

    def __init__(self, proposal, aligner, tokenizer, prompts, params: PARParams, new_tokens: int) -> None:
        self.proposal, self.aligner, self.tokenizer = proposal, aligner, tokenizer
        self.prompts, self.params, self.new_tokens = prompts, params, new_tokens
        self.compiled_forward = None
        tokenizer.padding_side = "left"

    def generate(self, batch: int, longest: int | None = None, **settings):
        """transformers' generate with the proposal alone, in fixed batches.

        Args:
            batch: rows of a batch.
            longest: the length to pad every prompt to; None pads to the longest of its batch.
            settings: further ones of generate.
        """
        p, tokens, start = self.params, 0, time.perf_counter()
        eos, pad = self.tokenizer.eos_token_id, checkpoints.pad_id(self.tokenizer)
        how = {"padding": "max_length", "max_length": longest} if longest else {"padding": True}
        for i in range(0, len(self.prompts), batch):
            prompts = {"input_ids": self.prompts[i : i + batch]}
            given = self.tokenizer.pad(prompts, return_tensors="pt", **how).to(self.proposal.device)
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
                **settings,
            )
            for row in output[:, given["input_ids"].shape[1] :].tolist():
                tokens += row.index(eos) + 1 if eos in row else len(row)
        return tokens, time.perf_counter() - start, None

    def compiled(self, batch: int):
        """generate with a static cache and a compiled forward. All shapes are equal: a warm-up compiles."""
        if self.compiled_forward is None:
            self.compiled_forward = torch.compile(self.proposal.forward)
        self.proposal.forward = self.compiled_forward
        try:
            longest = max(map(len, self.prompts))
            return self.generate(batch, longest, cache_implementation="static", disable_compile=True)
        finally:
            del self.proposal.forward

    def assisted(self, batch: int):
        """Assisted generation with the aligner as assistant, which takes one row at a time."""
        return self.generate(1, assistant_model=self.aligner)

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

    def ours(self, batch: int, pair: bool = True, **settings):
        start = time.perf_counter()
        found = generation.generate(
            self.proposal,
            self.aligner if pair else None,
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

    def alone(self, batch: int):
        return self.ours(batch, pair=False)

    def drafted(self, batch: int):
        return self.ours(batch, pair=False, drafter=self.aligner)


def parser(description: str, new_tokens: int, rows: int, batches: list[int]) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--proposal")
    found.add_argument("--aligner")
    found.add_argument(
        "--prompts", default=str(DEMO / "data/seed0/test/toy_test.json"), help="with `instruction`"
    )
    found.add_argument("--rows", type=int, default=rows)
    found.add_argument("--new-tokens", type=int, default=new_tokens)
    found.add_argument("--batches", type=int, nargs="+", default=batches)
    found.add_argument("--rounds", type=int, default=5)
    found.add_argument("--temperatures", type=float, nargs=2, default=[1.0, 0.5], metavar=("Q", "P"))
    return found


def load(args) -> Bench:
    proposal, aligner = args.proposal or demo_run("wu_sft_toy_"), args.aligner or demo_run("ours_sft_toy_")
    tokenizer, _ = checkpoints.load_pair(proposal, aligner)
    models = [checkpoints.load_model(path, "auto", pick_device()) for path in (proposal, aligner)]
    rows = read_rows(args.prompts, ["instruction"])[: args.rows]
    prompts = [tokenizer(render(row["instruction"])).input_ids for _, row in rows]
    t_q, t_p = args.temperatures
    params = PARParams("par", temperature=t_q, top_p=0.95, repetition_penalty=1.0, base_temperature=t_p)
    return Bench(*models, tokenizer, prompts, params, args.new_tokens)


def describe(bench: Bench, args) -> dict:
    return {
        "proposal_parameters": sum(p.numel() for p in bench.proposal.parameters()),
        "aligner_parameters": sum(p.numel() for p in bench.aligner.parameters()),
        "vocabulary": len(bench.tokenizer),
        "rows": len(bench.prompts),
        "new_tokens": args.new_tokens,
        "temperatures": args.temperatures,
        "threads": torch.get_num_threads(),
        "device": str(bench.proposal.device),
        "torch": torch.__version__,
    }


def memory_status(field: str) -> float:
    """A size in /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measured_in_a_process(arguments: list[str]) -> float:
    """The number that this script prints last when it is called with these arguments."""
    # Blocks above 64 kB go back to the system when they are freed, so that the peak is what was held at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, sys.argv[0], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
