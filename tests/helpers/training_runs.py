"""Training runs of a tiny model, shared by the tests of trainers, processes and damaged states."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from tiny import byte_tokenizer, tiny_model
from transformers import LlamaForCausalLM

from ram.data.tokenization import Example, TokenizedDataset, tokenize
from ram.models import lora
from ram.settings.schema import Settings
from ram.training import resume
from ram.training.frozen import FrozenProposal
from ram.training.metrics import MetricsLog
from trainers import BasicTrainer, Preempted

TOKENIZER = byte_tokenizer()
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "went",
    "away",
    "from",
    "here",
    "to",
    "there",
]
# Kinds of runs that many processes are tried with.
RUNS = {
    "ours_sft": ("loss=ours_sft",),
    "dpo": ("loss=dpo",),
    "ratio": ("loss=ratio",),
    "lora": ("loss=ratio", "lora={r: 2, alpha: 6}"),  # both in one: adapters beside a proposal
    "budget": ("loss=dpo", "tokens_per_pass=192"),
    # Some processes' passes have no negative at all.
    "padded": ("loss=ours_sft", "packed=false", "loss.sampled_fraction=0.3", "tokens_per_pass=192"),
}
# Settings of the runs that are stopped and resumed: a state every 8 examples, all of them kept.
RESUMABLE = ("lr=1e-3", "eval_every=16", "save_every=8", "n_epochs=2", "keep_states=3")


def examples(count: int, seed: int = 0) -> list[Example]:
    """Make examples of uneven lengths with two answers each."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))

    return [Example(i, f"Q: {text(1, 5)} A:", text(1, 6), text(1, 6)) for i in range(count)]


def dataset(count: int, seed: int = 0) -> TokenizedDataset:
    return tokenize(examples(count, seed), TOKENIZER, max_length=96, max_prompt_length=48)


def settings(*overrides: str) -> Settings:
    """Compose the shipped configuration with a few keys changed."""
    base = [
        "datasets=[uc]",
        "model.name_or_path=none",
        "max_length=96",
        "max_prompt_length=48",
        "batch_size=8",
        "warmup_steps=0",
        "do_first_eval=false",
        "model.fsdp_policy_mp=float32",
    ]
    return small.settings(*base, *overrides)


def model_of(config: Settings, seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Make the tiny model of a run, with its adapters if it has some."""
    model = tiny_model(len(TOKENIZER), seed=seed, layers=2, dtype=dtype)
    if config.lora is not None:
        lora.add_adapters(model, config.lora, config.seed)
    return model


def trainer(
    run_dir: Path,
    *overrides: str,
    n: int = 20,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    reference: torch.nn.Module | None = None,
    card: dict[str, Any] | None = None,
    proposal: FrozenProposal | None = None,
) -> BasicTrainer:
    """Make a trainer of a tiny model on `n` examples, with 6 held-out ones."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = settings(*overrides)
    model, heldout = model_of(config, seed, dtype), dataset(6, seed=99)
    parts = config, model, TOKENIZER, dataset(n), heldout, run_dir, card or {}, reference
    return BasicTrainer(*parts, proposal=proposal)


def frozen_proposal(dtype: torch.dtype = torch.float64) -> FrozenProposal:
    """Make the proposal of `loss=ratio` for a tiny model; its embedding has rows beyond the vocabulary."""
    proposal = tiny_model(len(TOKENIZER), seed=7, layers=2, dtype=dtype, extra_rows=2)
    return FrozenProposal(proposal, len(TOKENIZER), 0)


def recorded_path(run_dir: Path) -> list[tuple[float, float]]:
    """Read the loss and gradient norm of every update from metrics.csv."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    return [(float(row["loss"]), float(row["grad_norm"])) for row in rows]


def path_of(run: BasicTrainer) -> list[tuple[float, float]]:
    return recorded_path(run.run_dir)


def assert_same_path(actual: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    """Compare losses and gradient norms of two runs of float64 models.

    The tolerance is that of float32, to which transformers' norms and FSDP's sums of gradients round even
    here: 8 units of roundoff (2**-24). metrics.csv has eight digits.
    """
    actual_tensor, expected_tensor = (torch.tensor(path, dtype=torch.float64) for path in (actual, expected))
    torch.testing.assert_close(actual_tensor, expected_tensor, rtol=16 * 2**-24, atol=0)


def weights(run: BasicTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def stopped_run(run_dir: Path, after: int, *overrides: str, number: int = signal.SIGTERM) -> BasicTrainer:
    """Train a run that receives signal `number` after `after` updates."""

    class Interrupted(BasicTrainer):
        def after_update(self, metrics: MetricsLog, before: int) -> None:
            super().after_update(metrics, before)
            if self.updates == after:
                os.kill(os.getpid(), number)

    run_dir.mkdir(parents=True)
    config = settings(*overrides)
    model, heldout = model_of(config), dataset(6, seed=99)
    run = Interrupted(config, model, TOKENIZER, dataset(20), heldout, run_dir, {}, None, {"it": 1})
    with pytest.raises(Preempted) as error:
        run.train()
    assert error.value.args == (number,)
    return run


def resumed_run(
    run_dir: Path, *overrides: str, origin: dict[str, Any] | None = None
) -> tuple[BasicTrainer, dict[str, Any] | None]:
    """Resume a run from its newest usable state; return the finished run and that state."""
    run = trainer(run_dir, *overrides)
    state = resume.newest(run_dir, origin or {"it": 1})
    run.train(state)
    return run, state
