"""The training loop: batch -> micro-batches -> loss -> step -> evaluate -> save.

A step's loss is the sum of its examples' losses divided once by their number, so it does not depend on how
the batch is cut into micro-batches. Weights stay float32; only the forward pass computes in a narrower type.
"""

import contextlib
import csv
import math
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import checkpoints
import logps
import packing
from losses import LOSSES
from preference_datasets import get_batch_iterator
from tokenization import TokenizedDataset
from utils import UserError, log, naming, pick, pick_device, pick_dtype, progress

# Columns of metrics.csv; the README says what each one means.
COLUMNS = (
    "split",
    "updates",
    "examples",
    "epoch",
    "loss",
    "target_logp",
    "target_logp_per_token",
    "sampled_logp",
    "sampled_logp_per_token",
    "chosen_reward",
    "rejected_reward",
    "reward_margin",
    "reward_accuracy",
    "grad_norm",
    "lr",
    "tokens",
    "examples_per_second",
    "tokens_per_second",
)


class Diverged(UserError):
    """Training stopped itself; the last good weights stand in the run folder."""


class MetricsLog:
    """Writes every step to metrics.csv, and to the console and wandb at most every few seconds."""

    def __init__(self, run_dir: Path, settings) -> None:
        self.interval, self.last = settings.minimum_log_interval_secs, -math.inf
        # With debug the folder may be a finished run's: nothing in it is touched.
        self.path = Path(os.devnull) if settings.debug else run_dir / checkpoints.METRICS
        self.file = open(self.path, "w", newline="", encoding="utf-8")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, fieldnames=COLUMNS)
        self.writer.writeheader()
        self.wandb = None
        if settings.wandb.enabled and not settings.debug:
            import wandb

            self.wandb = wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                mode=settings.wandb.mode,
                name=run_dir.name,
                dir=str(run_dir),
            )

    def write(self, split: str, row: dict[str, float]) -> None:
        with naming(self.path):
            self.writer.writerow({"split": split} | {key: f"{value:.8g}" for key, value in row.items()})
            now = time.monotonic()
            if split == "train" and now - self.last < self.interval:
                return
            if split == "train":
                self.last = now
            self.file.flush()
        shown = (
            "loss",
            "target_logp_per_token",
            "sampled_logp_per_token",
            "reward_accuracy",
            "grad_norm",
            "lr",
        )
        figures = "  ".join(f"{key} {row[key]:.4g}" for key in shown if key in row)
        speed = f"  {row['examples_per_second']:.1f} examples/s" if "examples_per_second" in row else ""
        log.info(f"{split:<8} {int(row['examples']):>8,} examples  {figures}{speed}")
        if self.wandb is not None:
            self.wandb.log({f"{split}/{key}": value for key, value in row.items()}, step=int(row["updates"]))

    def close(self) -> None:
        with naming(self.path):
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


class BasicTrainer:
    """Trains one model on one process.

    settings: a resolved run configuration (config/config.yaml). reference: the frozen model of dpo and ipo.
    card: what to record beside exported weights. Raises Diverged where the loss stops being a number or the
    sampled term runs away.
    """

    def __init__(
        self,
        settings,
        model,
        tokenizer,
        train_data: TokenizedDataset,
        eval_data: TokenizedDataset,
        run_dir: Path,
        card: dict,
        reference=None,
    ) -> None:
        self.settings, self.tokenizer, self.run_dir, self.card = settings, tokenizer, run_dir, card
        self.train_data, self.eval_data = train_data, eval_data
        self.loss = LOSSES[settings.loss.name]
        self.answers = ("target", "negative") if self.loss.needs_negative else ("target",)
        self.pad_id = checkpoints.pad_id(tokenizer)
        self.device = pick_device()
        self.model = model.to(self.device)
        self.reference = reference.to(self.device).eval() if reference is not None else None
        if settings.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        wanted = pick_dtype(settings.model.fsdp_policy_mp or "float32", self.device)
        self.compute_dtype = wanted if wanted != torch.float32 else None
        self.fraction = settings.loss.get("sampled_fraction", 1.0)
        self.logps = self.pick_forward()
        if settings.compile:
            self.model.base_model.compile(dynamic=True)

        n = settings.n_examples if settings.n_examples is not None else len(train_data) * settings.n_epochs
        self.total_examples = int(n)
        epochs, rest = divmod(self.total_examples, len(train_data))
        self.total_updates = epochs * math.ceil(len(train_data) / settings.batch_size)
        self.total_updates += math.ceil(rest / settings.batch_size)
        self.optimizer = pick_optimizer(settings.optimizer)(self.model.parameters(), lr=settings.lr)
        warmup = settings.warmup_steps
        self.warmup = round(warmup * self.total_updates) if 0 < warmup < 1 else int(warmup)
        limit = settings.n_eval_examples
        self.n_heldout = len(eval_data) if limit is None else min(limit, len(eval_data))
        self.updates = self.examples = self.tokens = 0

    # ---- forward -------------------------------------------------------------------------------------------

    def pick_forward(self):
        """The packed forward pass; the padded reference where it is asked for or a model cannot be packed."""
        if not self.settings.packed:
            return logps.padded_logps
        for model in filter(None, (self.model, self.reference)):
            reason = logps.prepare(model, self.settings.max_length, self.autocast)
            if reason is not None:
                log.info(f"packed=true cannot be had of this model: {reason}; padded forward passes instead")
                return logps.padded_logps
        return logps.packed_logps

    def forward(
        self, model, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None
    ) -> logps.Answers:
        """Sequence log-probabilities (B,) of each answer, and the response tokens that each of them sums."""
        with self.autocast():
            return self.logps(model, data, rows, self.answers, self.pad_id, drawn)

    def autocast(self):
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def losses(
        self, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Losses (B,) of some examples with gradient, and sums over them of everything that is logged.

        drawn: (B,) bool, the examples whose sampled answer stands for those of all; None computes all.
        """
        policy, counts = self.forward(self.model, data, rows, drawn)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self.forward(self.reference, data, rows, drawn)
        weights = {}
        if drawn is not None:
            weights["negative_weight"] = torch.from_numpy(drawn).to(policy["target"]) / self.fraction
        losses, metrics = self.loss.function(policy | weights, reference, self.settings.loss)
        sums = {key: value.detach().double().sum().item() for key, value in metrics.items()}
        sums["loss"] = losses.detach().double().sum().item()
        names = {"target": "target_logp", "negative": "sampled_logp"}
        for answer, values in policy.items():
            sums[names[answer]] = values.detach().double().sum().item()
            sums[f"{answer}_tokens"] = sum(counts[answer])
            everyone = answer == "target" or drawn is None
            sums[f"{answer}_examples"] = len(rows) if everyone else int(drawn.sum())
        return losses, sums

    @staticmethod
    def averages(sums: dict[str, float], n: int) -> dict[str, float]:
        """Means per example, and log-probabilities per token too; none of an answer that was never drawn."""
        row = {key: value / n for key, value in sums.items() if not key.endswith(("_tokens", "_examples"))}
        for answer, name in (("target", "target_logp"), ("negative", "sampled_logp")):
            if not sums.get(f"{answer}_examples"):
                row.pop(name, None)
                continue
            row[name] = sums[name] / sums[f"{answer}_examples"]
            row[f"{name}_per_token"] = sums[name] / max(sums[f"{answer}_tokens"], 1)
        return row

    def micro_batches(self, rows: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
        """Positions in `rows` of each micro-batch, cut so that all hold about equally many tokens."""
        size = self.settings.batch_size // self.settings.gradient_accumulation_steps
        lengths = packing.lengths(self.train_data, rows, self.answers, drawn)
        return packing.cut_evenly(lengths, math.ceil(len(rows) / size))

    # ---- one update ----------------------------------------------------------------------------------------

    def update(self, rows: np.ndarray) -> dict[str, float]:
        """One optimizer step on a global batch; returns its averages. Raises Diverged before harm is done."""
        self.model.train()
        sums: dict[str, float] = defaultdict(float)
        drawn = packing.draw(self.settings.seed, self.examples, len(rows), self.fraction)
        for micro in self.micro_batches(rows, drawn):
            losses, parts = self.losses(self.train_data, rows[micro], drawn[micro])
            (losses.sum() / len(rows)).backward()
            for key, value in parts.items():
                sums[key] += value
        row = self.averages(sums, len(rows))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        row["grad_norm"] = norm.item()
        self.check(row)
        lr = self.settings.lr * self.lr_factor(self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.examples += len(rows)
        tokens = int(sum(value for key, value in sums.items() if key.endswith("_tokens")))
        self.tokens += tokens
        return row | {"lr": lr, "tokens": self.tokens}

    def lr_factor(self, update: int) -> float:
        """Linear warm-up to 1, then constant, or a cosine to a tenth with lr_schedule=cosine."""
        if update < self.warmup:
            return (update + 1) / (self.warmup + 1)
        if self.settings.lr_schedule == "constant":
            return 1.0
        done = (update - self.warmup) / max(1, self.total_updates - self.warmup)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    def check(self, row: dict[str, float]) -> None:
        """Raises Diverged before an update that would spoil the weights; those before it are saved if they
        still give a held-out loss.
        """
        floor = self.settings.divergence.min_sampled_logp_per_token
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            reason = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            remedy = "lower lr, or look for a broken row in this batch"
        elif floor is not None and row.get("sampled_logp_per_token", 0.0) < floor:
            found = row["sampled_logp_per_token"]
            reason = f"the sampled term runs away: {found:.2f} nats per token, floor {floor}"
            remedy = "lower loss.alpha or lr, or lower divergence.min_sampled_logp_per_token"
        else:
            return
        now = f"step-{self.examples}"
        if not (self.finite() and math.isfinite(self.heldout_averages().get("loss", 0.0))):
            if not self.settings.debug:  # the last update, not this batch, is to blame
                shutil.rmtree(self.run_dir / now, ignore_errors=True)
        elif self.examples:
            self.save(now)
        raise self.diverged(reason, remedy)

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def diverged(self, reason: str, remedy: str) -> Diverged:
        """The error to raise; it names the last good weights of this run."""
        good = checkpoints.saved_steps(self.run_dir) if not self.settings.debug else []
        kept = f"the last good weights are in {good[-1]}" if good else "no good weights were saved"
        return Diverged(f"diverged after {self.examples} examples: {reason}; {kept}; {remedy}")

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Runs all updates, evaluating and saving on the way; returns the last evaluation."""
        settings = self.settings
        metrics, bar = MetricsLog(self.run_dir, settings), None
        batches = get_batch_iterator(
            len(self.train_data),
            settings.batch_size,
            n_epochs=settings.n_epochs,
            n_examples=settings.n_examples,
            seed=settings.seed,
        )
        log.info(
            f"{self.total_examples:,} examples in {self.total_updates:,} updates of {settings.batch_size}, "
            f"lr {settings.lr:g} after {self.warmup} warm-up updates, on {self.device}"
        )
        final: dict[str, float] = {}
        try:
            if settings.do_first_eval:
                self.evaluate(metrics)
            next_eval, next_save = settings.eval_every, settings.save_every
            bar = progress(total=self.total_examples, desc=self.run_dir.name, unit="ex")
            for rows in batches:
                start = time.monotonic()
                before = self.tokens
                row = self.update(rows)
                seconds = max(time.monotonic() - start, 1e-9)
                row["examples_per_second"] = len(rows) / seconds
                row["tokens_per_second"] = (self.tokens - before) / seconds
                metrics.write("train", self.counters() | row)
                bar.update(len(rows))
                done = self.examples >= self.total_examples
                if self.examples >= next_eval and not done:
                    self.evaluate(metrics)
                    next_eval = (self.examples // settings.eval_every + 1) * settings.eval_every
                if next_save and self.examples >= next_save and not done:
                    self.save(f"step-{self.examples}")
                    next_save = (self.examples // settings.save_every + 1) * settings.save_every
            final = self.evaluate(metrics)
            self.save(checkpoints.LATEST)
        finally:
            if bar is not None:
                bar.close()
            metrics.close()
        return self.counters() | final

    def counters(self) -> dict[str, float]:
        epoch = self.examples / max(len(self.train_data), 1)
        return {"updates": self.updates, "examples": self.examples, "epoch": epoch}

    def evaluate(self, metrics: MetricsLog) -> dict[str, float]:
        """Logs the held-out averages, and some sampled answers where asked; raises Diverged where the loss is
        no number.
        """
        row = self.heldout_averages()
        if not row:
            return {}
        metrics.write("heldout", self.counters() | row)
        if not math.isfinite(row["loss"]):
            raise self.diverged(f"held-out loss {row['loss']}", "lower lr, or look for a broken held-out row")
        if self.settings.sample_during_eval:
            self.show_samples(min(self.n_heldout, self.settings.n_eval_model_samples))
        return row

    @torch.no_grad()
    def heldout_averages(self) -> dict[str, float]:
        """Averages over the first n_eval_examples held-out examples; empty where there are none."""
        n = self.n_heldout
        if n == 0:
            return {}
        self.model.eval()
        sums: dict[str, float] = defaultdict(float)
        size = self.settings.eval_batch_size
        for start in progress(range(0, n, size), desc="evaluate"):
            _, parts = self.losses(self.eval_data, np.arange(start, min(start + size, n)))
            for key, value in parts.items():
                sums[key] += value
        return self.averages(sums, n)

    def show_samples(self, n: int) -> None:
        """Logs answers of the model as it stands to the first held-out prompts."""
        import decoding
        from par import PARParams

        s = self.settings.sampling
        params = PARParams(
            temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, repetition_penalty=s.repetition_penalty
        )
        ids = [self.eval_data.part("prompt", i).tolist() for i in range(n)]
        answers = decoding.generate(
            None,
            self.model,
            self.tokenizer,
            ids,
            params,
            seed=self.settings.seed,
            stop=[s.stop_str],
            max_new_tokens=self.settings.max_length - self.settings.max_prompt_length,
        )
        for prompt, answer in zip(ids, answers, strict=True):
            log.info(f"sample   {self.tokenizer.decode(prompt)!r} -> {answer.text!r}")

    def save(self, name: str) -> None:
        """Exports the weights as a transformers folder run_dir/`name`; raises Diverged where one is no
        number.
        """
        if not self.finite():
            raise self.diverged("the last update made weights that are no numbers", "lower lr")
        if self.settings.debug:
            return
        card = self.card | {"examples": self.examples, "updates": self.updates}
        folder = self.run_dir / name
        checkpoints.export_model(self.model, self.tokenizer, folder, self.settings.export_dtype, card)
        log.info(f"saved    {folder}")


TRAINERS = {"BasicTrainer": BasicTrainer}
# What torch.optim has beside optimizers for a whole model: the base class, one that wants a closure, one for
# sparse gradients only, one for matrices only.
UNFIT = ("Optimizer", "LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in UNFIT
}


def pick_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of a config; raises UserError for one that cannot train a model by default."""
    return pick(OPTIMIZERS, name, "optimizer")


def pick_trainer(name: str):
    """The trainer class of a config; raises UserError for one that does not exist."""
    if name == "TensorParallelTrainer":
        raise UserError("trainer=TensorParallelTrainer was dropped: use FSDPTrainer")
    if name == "FSDPTrainer":
        raise UserError("trainer=FSDPTrainer: training on many devices is not built yet; use BasicTrainer")
    return pick(TRAINERS, name, "trainer")
