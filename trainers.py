"""The training loop: batch -> micro-batches -> loss -> step -> evaluate -> save.

A step's loss is the sum of its examples' losses divided once by their number, so it does not depend on how
the batch is cut into micro-batches and processes. Weights stay float32; only the forward pass computes in a
narrower type. What is drawn hangs on (seed, position), so a run that stopped goes on as if it had not.
"""

import contextlib
import functools
import itertools
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from preference_datasets import get_batch_iterator
from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.errors import Preempted, UserError, pick
from ram.log import log, pick_device, pick_dtype, progress
from ram.models import checkpoints, run_folder
from ram.training import logps, packing, resume, sharding
from ram.training.losses import LOSSES
from ram.training.metrics import MetricsLog, show_samples
from ram.training.optimizers import lr_factor, pick_optimizer, run_length


class Diverged(UserError):
    """Training stopped itself; the last good weights stand in the run folder."""


class BasicTrainer:
    """Trains one model on one process.

    settings: a resolved run configuration (config/config.yaml). reference: the frozen model of dpo and ipo.
    card: what to record beside exported weights. origin: what the run is made from, kept with its states.
    Raises Diverged where the loss stops being a number or the sampled term runs away, and Preempted where it
    was told to stop.
    """

    many = False  # whether it runs on more than one process

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
        origin: dict | None = None,
    ) -> None:
        self.settings, self.tokenizer, self.run_dir, self.card = settings, tokenizer, run_dir, card
        self.train_data, self.eval_data = train_data, eval_data
        self.loss = LOSSES[settings.loss.name]
        self.answers = ("target", "negative") if self.loss.needs_negative else ("target",)
        self.pad_id = checkpoints.pad_id(tokenizer)
        self.device, self.origin = pick_device(), origin or {}
        self.writes = (
            processes.is_rank0() and not settings.debug
        )  # whether it changes what lies in the folder
        if processes.count() > 1 and not self.many:
            raise UserError(
                f"trainer={type(self).__name__} runs on one process, {processes.count()} were started; use "
                "trainer=FSDPTrainer"
            )
        self.model, self.reference = model, reference
        if settings.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        wanted = pick_dtype(settings.model.fsdp_policy_mp or "float32", self.device)
        self.compute_dtype = wanted if wanted != torch.float32 else None
        self.fraction = getattr(settings.loss, "sampled_fraction", 1.0)
        self.place()
        if settings.compile:
            self.model.base_model.compile(dynamic=True)

        self.total_examples, self.total_updates, self.warmup = run_length(settings, len(train_data))
        self.optimizer = pick_optimizer(settings.optimizer)(self.model.parameters(), lr=settings.lr)
        limit = settings.n_eval_examples
        self.n_heldout = len(eval_data) if limit is None else min(limit, len(eval_data))
        self.updates = self.examples = self.tokens = 0
        self.next_eval, self.next_save = settings.eval_every, settings.save_every
        self.heldout: tuple[int, float] = (-1, math.nan)  # examples and loss of the last evaluation
        self.best: list | None = None  # the same of the step-N with the lowest loss
        self.remembered: int | None = None  # the update after which a state was saved last

    @functools.cached_property
    def saver(self) -> resume.Saver:
        """Made when all processes first need it: they make its group together."""
        return resume.Saver(self.run_dir, self.settings.keep_states)

    # ---- forward -------------------------------------------------------------------------------------------

    def place(self) -> None:
        """Brings the models to the device and decides how they compute log-probabilities."""
        self.model = self.model.to(self.device)
        self.reference = self.reference.to(self.device).eval() if self.reference is not None else None
        self.logps = self.pick_forward()

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

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

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
        """Positions in `rows` of this process's micro-batches, cut so that all hold about equally many
        tokens.

        Every process has equally many, since a model that is spread over them is gathered by all at once; one
        that is left over is empty.
        """
        size = self.settings.batch_size // self.settings.gradient_accumulation_steps
        lengths = packing.lengths(self.train_data, rows, self.answers, drawn)
        each = math.ceil(len(rows) / size)
        if self.many:
            each = math.ceil(each / processes.count())
        pieces = packing.cut_evenly(lengths, each * processes.count())
        pieces += [np.array([], dtype=np.int64)] * (each * processes.count() - len(pieces))
        return pieces[processes.rank() :: processes.count()]

    def computed(self, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None = None):
        """`losses`; of no rows a zero that takes part in what all processes do together."""
        if len(rows):
            return self.losses(data, rows, drawn)
        losses, _ = self.losses(data, np.array([0]), None if drawn is None else np.array([True]))
        return losses * 0.0, {}

    # ---- one update ----------------------------------------------------------------------------------------

    def update(self, rows: np.ndarray) -> dict[str, float]:
        """One optimizer step on a global batch; returns its averages. Raises Diverged before harm is done."""
        self.model.train()
        torch.manual_seed(hash((self.settings.seed, self.updates, processes.rank())))  # of dropout
        sums: dict[str, float] = defaultdict(float)
        drawn = packing.draw(self.settings.seed, self.examples, len(rows), self.fraction)
        for micro in self.micro_batches(rows, drawn):
            losses, parts = self.computed(self.train_data, rows[micro], drawn[micro])
            self.backward(losses.sum() / len(rows))
            for key, value in parts.items():
                sums[key] += value
        sums = processes.all_sum(sums)
        row = self.averages(sums, len(rows))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        row["grad_norm"] = getattr(norm, "full_tensor", lambda: norm)().item()
        self.check(row)
        lr = self.settings.lr * lr_factor(
            self.updates, self.warmup, self.total_updates, self.settings.lr_schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.examples += len(rows)
        tokens = int(sum(value for key, value in sums.items() if key.endswith("_tokens")))
        self.tokens += tokens
        return row | {"lr": lr, "tokens": self.tokens}

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
            if self.writes:  # the last update, not this batch, is to blame
                shutil.rmtree(self.run_dir / now, ignore_errors=True)
        elif self.examples:
            self.save(now)
        raise self.diverged(reason, remedy)

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        parts = (getattr(p, "to_local", lambda p=p: p)() for p in self.model.parameters())
        return not processes.any_rank(not all(bool(torch.isfinite(part).all()) for part in parts))

    def diverged(self, reason: str, remedy: str) -> Diverged:
        """The error to raise; it names the last good weights of this run."""
        good = run_folder.saved_steps(self.run_dir) if not self.settings.debug else []
        kept = f"the last good weights are in {good[-1]}" if good else "no good weights were saved"
        return Diverged(f"diverged after {self.examples} examples: {reason}; {kept}; {remedy}")

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(self, state: dict | None = None) -> dict[str, float]:
        """Runs all updates, or those that are left after `state` (`resume.newest`), evaluating and saving on
        the way; returns the last evaluation.
        """
        settings, bar = self.settings, None
        if state is not None:
            self.recall(state)
        metrics = MetricsLog(self.run_dir, settings, self.updates if state is not None else None)
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
            + (f", {processes.count()} processes" if processes.count() > 1 else "")
        )
        final: dict[str, float] = {}
        try:
            if settings.do_first_eval and not self.updates:
                self.evaluate(metrics)
            bar = progress(
                total=self.total_examples, initial=self.examples, desc=self.run_dir.name, unit="ex"
            )
            with processes.stop_signals() as asked:
                for rows in itertools.islice(batches, self.updates, None):
                    start, before = time.monotonic(), self.tokens
                    row = self.update(rows)
                    seconds = max(time.monotonic() - start, 1e-9)
                    row["examples_per_second"] = len(rows) / seconds
                    row["tokens_per_second"] = (self.tokens - before) / seconds
                    metrics.write("train", self.counters() | row)
                    bar.update(len(rows))
                    self.after_update(metrics)
                    self.saver.check()
                    if processes.any_rank(asked):
                        self.remember()
                        self.saver.wait()
                        raise Preempted(asked[0] if asked else None)
                self.remember()  # who is stopped or killed from here on has no update to do again
                self.saver.wait()
            final = self.evaluate(metrics)
            self.save(run_folder.LATEST)
        except Diverged:
            self.saver.wait()
            if not settings.debug:
                resume.clear(self.run_dir)  # it would only diverge again
            raise
        finally:
            if bar is not None:
                bar.close()
            metrics.close()
        best = {"best_step": self.best[0], "best_loss": self.best[1]} if self.best else {}
        return self.counters() | final | best

    def after_update(self, metrics: MetricsLog) -> None:
        """Evaluates and saves where it is time to; the end of training does both anyway."""
        if self.examples >= self.total_examples:
            return
        if self.examples >= self.next_eval:
            self.evaluate(metrics)
            self.next_eval = (self.examples // self.settings.eval_every + 1) * self.settings.eval_every
        if self.next_save and self.examples >= self.next_save:
            self.next_save = (self.examples // self.settings.save_every + 1) * self.settings.save_every
            self.save(f"step-{self.examples}")
            self.prune()
            self.remember()

    def prune(self) -> None:
        """Keeps the newest weights, and those with the lowest held-out loss so far."""
        examples, loss = self.heldout
        if examples == self.examples and (self.best is None or loss < self.best[1]):
            self.best = [examples, loss]
        if self.settings.keep_steps is not None and self.writes:
            best = self.best and f"step-{self.best[0]}"
            run_folder.prune_steps(self.run_dir, self.settings.keep_steps, best)

    COUNTERS = ("updates", "examples", "tokens", "next_eval", "next_save", "best")

    def remember(self) -> None:
        """Saves what the run can go on from."""
        if self.settings.debug or self.remembered == self.updates:
            return
        self.remembered = self.updates
        facts = {key: getattr(self, key) for key in self.COUNTERS} | {"origin": self.origin}
        self.saver.save(self.model, self.optimizer, facts)

    def recall(self, state: dict) -> None:
        """Goes back to where a state was saved."""
        resume.load(state["folder"], self.model, self.optimizer)
        for key in self.COUNTERS:
            setattr(self, key, state[key])
        log.info(f"going on after {self.examples:,} of {self.total_examples:,} examples: {state['folder']}")

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
        self.heldout = (self.examples, row["loss"])
        if self.settings.sample_during_eval:
            n = min(self.n_heldout, self.settings.n_eval_model_samples)
            show_samples(self.model, self.tokenizer, self.eval_data, n, self.settings)
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
        for start in progress(range(0, n, size * processes.count()), desc="evaluate"):
            first = start + size * processes.rank()
            _, parts = self.computed(self.eval_data, np.arange(first, max(first, min(first + size, n))))
            for key, value in parts.items():
                sums[key] += value
        return self.averages(processes.all_sum(sums), n)

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
        state = self.whole_state()
        if processes.is_rank0():
            dtype = self.settings.export_dtype
            checkpoints.export_model(self.model, self.tokenizer, folder, dtype, card, state)
        processes.barrier()
        log.info(f"saved    {folder}")

    def whole_state(self) -> dict[str, torch.Tensor] | None:
        """The weights by name, where the model does not hold them whole."""
        return None


class FSDPTrainer(BasicTrainer):
    """Trains one model that is spread over all processes, on any number of them."""

    many = True

    def place(self) -> None:
        settings = self.settings
        if settings.sample_during_eval:
            raise UserError("sample_during_eval=true: FSDPTrainer holds no whole model to decode with")
        processes.start(alone=True)
        forward, dtype = self.pick_forward(), self.compute_dtype
        for model in filter(None, (self.model, self.reference)):
            block, offload = settings.model.block_name, settings.cpu_offload
            sharding.shard(model, block, self.device, dtype, forward, offload)
        self.compute_dtype = None  # the gathered weights have it already
        if self.reference is not None:
            self.reference.eval().requires_grad_(False)
        self.logps = lambda model, *args: getattr(model, sharding.FORWARD)(*args)

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages gradients over the processes; ours are parts of one sum.
        (loss * processes.count()).backward()

    def whole_state(self) -> dict[str, torch.Tensor]:
        return sharding.whole_state(self.model)


TRAINERS = {"BasicTrainer": BasicTrainer, "FSDPTrainer": FSDPTrainer}


def pick_trainer(name: str):
    """The trainer class of a config; raises UserError for one that does not exist."""
    if name == "TensorParallelTrainer":
        raise UserError("trainer=TensorParallelTrainer was dropped: use FSDPTrainer")
    return pick(TRAINERS, name, "trainer")
