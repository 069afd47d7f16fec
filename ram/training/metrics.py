"""What a run says while it trains: metrics.csv with every step, the console and wandb every few seconds; and
what an evaluation sends to wandb.
"""

import csv
import math
import os
import time
from pathlib import Path

from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.log import log
from ram.models import run_folder
from ram.storage.files import path_in_errors, replacing
from ram.training.losses import LOSSES, REWARD_METRICS, Loss

PROGRESS = ("split", "updates", "examples", "epoch")
LOGPS = ("target_logp", "target_logp_per_token", "sampled_logp", "sampled_logp_per_token")
SPEED = ("grad_norm", "lr", "tokens", "examples_per_second", "tokens_per_second")


def columns_of(loss: Loss) -> tuple[str, ...]:
    """Return the columns of metrics.csv, which the documentation explains."""
    # Every file has the reward columns, as files of earlier versions do, whatever the loss.
    return (*PROGRESS, "loss", *LOGPS, *dict.fromkeys([*REWARD_METRICS, *loss.metrics]), *SPEED)


class MetricsLog:
    """Writes every step to metrics.csv, and to the console and wandb at most every few seconds.

    after: the updates after which the run goes on; what an earlier attempt wrote of later ones is dropped.
    Only the first of several processes writes.
    """

    def __init__(self, run_dir: Path, settings, after: int | None = None) -> None:
        self.interval, self.last = settings.minimum_log_interval_secs, -math.inf
        # With debug the folder may be a finished run's: nothing in it is touched.
        nowhere = settings.debug or not processes.is_rank0()
        self.path = Path(os.devnull) if nowhere else run_dir / run_folder.METRICS
        self.loss = LOSSES[settings.loss.name]
        columns = columns_of(self.loss)
        if not nowhere:
            kept = [] if after is None else rows_until(self.path, after)
            with replacing(self.path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(kept)
        self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, fieldnames=columns)
        self.wandb = None
        if settings.wandb.enabled and not nowhere:
            import wandb

            self.wandb = wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                mode=settings.wandb.mode,
                name=run_dir.name,
                dir=str(run_dir),
            )

    def write(self, split: str, row: dict[str, float]) -> None:
        with path_in_errors(self.path):
            self.writer.writerow({"split": split} | {key: f"{value:.8g}" for key, value in row.items()})
            self.file.flush()  # before the state that goes on from here is saved
        now = time.monotonic()
        if split == "train" and now - self.last < self.interval:
            return
        if split == "train":
            self.last = now
        logps = ("target_logp_per_token", "sampled_logp_per_token")
        shown = ("loss", *logps, *self.loss.metrics, "grad_norm", "lr")
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


def rows_until(path: Path, updates: int) -> list[dict[str, str]]:
    """The rows of a metrics.csv of up to so many updates; none from the first damaged one on."""
    if not path.is_file():
        return []
    kept = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            whole = None not in row and None not in row.values()
            if not whole or not row.get("updates", "").isdigit():
                break
            if int(row["updates"]) <= updates:
                kept.append(row)
    return kept


def show_samples(model, tokenizer, data: TokenizedDataset, n: int, settings) -> None:
    """Logs answers of a model as it stands to the first n prompts, by the `sampling` keys of an aligner."""
    from ram.decoding import generation
    from ram.decoding.par import PARParams

    s = settings.sampling
    params = PARParams(
        temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, repetition_penalty=s.repetition_penalty
    )
    ids = [data.part("prompt", i).tolist() for i in range(n)]
    answers = generation.generate(
        None,
        model,
        tokenizer,
        ids,
        params,
        seed=settings.seed,
        stop=[s.stop_str],
        max_new_tokens=settings.max_length - settings.max_prompt_length,
    )
    for prompt, answer in zip(ids, answers, strict=True):
        log.info(f"sample   {tokenizer.decode(prompt)!r} -> {answer.text!r}")
