"""Metrics of a training run: metrics.csv with every step, and the console and wandb every few seconds."""

import csv
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ram.data.text import text_of
from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.log import log
from ram.models import run_folder
from ram.storage.files import path_in_errors, replacing
from ram.training.losses import LOSSES, REWARD_METRICS, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ram.settings.schema import Settings

PROGRESS = ("split", "updates", "examples", "epoch")
LOGPS = ("target_logp", "target_logp_per_token", "sampled_logp", "sampled_logp_per_token")
SPEED = ("grad_norm", "lr", "tokens", "examples_per_second", "tokens_per_second")


def columns_of(loss: Loss) -> tuple[str, ...]:
    """Return the columns of metrics.csv, which the documentation explains."""
    # Every file has the reward columns, as files of earlier versions do, whatever the loss.
    return (*PROGRESS, "loss", *LOGPS, *dict.fromkeys([*REWARD_METRICS, *loss.metrics]), *SPEED)


class MetricsLog:
    """Writes every step to metrics.csv, and to the console and wandb at most every few seconds.

    Only the first of several processes writes.

    Args:
        after: Number of updates after which the run resumes. Rows of later updates, written by an earlier
            attempt, are dropped. None starts a new file.
        at_end: Whether no update is left, so that the last evaluation comes next; its row is dropped, too.
    """

    def __init__(
        self, run_dir: Path, settings: "Settings", after: int | None = None, at_end: bool = False
    ) -> None:
        self.interval: float = settings.minimum_log_interval_secs
        self.last = -math.inf  # time of the last training row on the console
        # With debug=true the folder may belong to a finished run, so nothing in it is changed.
        is_writer = processes.is_rank0() and not settings.debug
        self.path = run_dir / run_folder.METRICS if is_writer else Path(os.devnull)
        self.loss = LOSSES[settings.loss.name]
        columns = columns_of(self.loss)
        if is_writer:
            rows = [] if after is None else rows_until(self.path, after)
            if at_end:
                rows = [row for row in rows if (row["split"], row["updates"]) != ("heldout", str(after))]
            with (
                replacing(self.path) as temporary,
                open(temporary, "w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
        self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, fieldnames=columns)
        self.wandb = None
        if settings.wandb.enabled and is_writer:
            import wandb

            self.wandb = wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                mode=settings.wandb.mode,
                name=run_dir.name,
                dir=str(run_dir),
            )

    def write(self, split: str, row: dict[str, float]) -> None:
        """Write one row. `split` is "train" or "heldout"; held-out rows are always shown on the console."""
        with path_in_errors(self.path):
            self.writer.writerow({"split": split} | {key: f"{value:.8g}" for key, value in row.items()})
            self.file.flush()  # so that no saved state is ahead of this file
        now = time.monotonic()
        if split == "train":
            if now - self.last < self.interval:
                return
            self.last = now
        per_token = ("target_logp_per_token", "sampled_logp_per_token")
        shown = ("loss", *per_token, *self.loss.metrics, "grad_norm", "lr")
        figures = "  ".join(f"{key} {row[key]:.4g}" for key in shown if key in row)
        speed = f"  {row['examples_per_second']:.1f} examples/s" if "examples_per_second" in row else ""
        log.info(f"{split:<8} {int(row['examples']):>8,} examples  {figures}{speed}")
        if self.wandb is not None:
            self.wandb.log({f"{split}/{key}": value for key, value in row.items()}, step=int(row["updates"]))

    def close(self) -> None:
        with path_in_errors(self.path):
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def averages(sums: dict[str, float], n: int) -> dict[str, float]:
    """Turn sums over n examples into means per example, and log-probabilities also into means per token.

    The log-probability of the negatives is left out if none was computed.
    """
    row = {key: value / n for key, value in sums.items() if not key.endswith(("_tokens", "_examples"))}
    for answer, name in (("target", "target_logp"), ("negative", "sampled_logp")):
        if not sums.get(f"{answer}_examples"):
            row.pop(name, None)
            continue
        row[name] = sums[name] / sums[f"{answer}_examples"]
        row[f"{name}_per_token"] = sums[name] / max(sums[f"{answer}_tokens"], 1)
    return row


def rows_until(path: Path, updates: int) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv up to an update count. Stop at the first damaged row."""
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            is_whole = None not in row and None not in row.values()
            if not is_whole or not row.get("updates", "").isdigit():
                break
            if int(row["updates"]) <= updates:
                rows.append(row)
    return rows


def show_samples(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: TokenizedDataset,
    n: int,
    settings: "Settings",
) -> None:
    """Log the model's answers to the first n prompts, decoded with the aligner's `sampling` keys."""
    from ram.decoding import generation
    from ram.decoding.par import PARParams

    sampling = settings.sampling
    params = PARParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
    )
    prompts = [data.part("prompt", i).tolist() for i in range(n)]
    answers = generation.generate(
        None,
        model,
        tokenizer,
        prompts,
        params,
        seed=settings.seed,
        stop=[sampling.stop_str],
        max_new_tokens=settings.max_length - settings.max_prompt_length,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        log.info(f"sample   {text_of(tokenizer, prompt)!r} -> {answer.text!r}")
