"""The training loop: batch -> micro-batches -> losses -> update -> evaluation -> checkpoint.

The loss of an update does not depend on how its batch is cut into micro-batches or processes. Weights stay in
float32. Random choices depend only on (seed, position), so a resumed run equals an uninterrupted one.
"""

import contextlib
import functools
import itertools
import math
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from preference_datasets import get_batch_iterator
from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.errors import Preempted, UserError, pick
from ram.log import log, pick_device, pick_dtype, progress
from ram.models import checkpoints, run_folder
from ram.training import budget, early_stopping, frozen, logps, packing, passes, resume, sharding
from ram.training.losses import LOSSES
from ram.training.metrics import MetricsLog, averages, show_samples
from ram.training.optimizers import batch_factor, lr_factor, make_optimizer, run_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ram.settings.schema import Settings


class Diverged(UserError):
    """Training stopped by itself. The run folder holds the last good weights, if any were saved."""


class BasicTrainer:
    """Trains one model on one process.

    Args:
        settings: A resolved run configuration (config/config.yaml).
        card: Facts to store beside exported weights.
        reference, proposal: The frozen model of dpo and ipo; the frozen proposal of ratio.
        origin: The settings, data and weights that the run is made from; stored in its training states.

    Raises:
        Diverged: The loss is not finite, or the sampled term runs away.
        Preempted: The process got SIGTERM or Ctrl-C; a training state is saved.
    """

    distributed = False  # whether the trainer supports more than one process

    def __init__(
        self,
        settings: "Settings",
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        train_data: TokenizedDataset,
        eval_data: TokenizedDataset,
        run_dir: Path,
        card: dict[str, Any],
        reference: Any = None,
        origin: dict[str, Any] | None = None,
        proposal: frozen.FrozenProposal | None = None,
    ) -> None:
        if processes.count() > 1 and not self.distributed:
            raise UserError(
                f"trainer={type(self).__name__} runs on one process, but {processes.count()} were started; "
                "use trainer=FSDPTrainer"
            )
        self.settings = settings
        self.model, self.reference, self.proposal, self.tokenizer = model, reference, proposal, tokenizer
        self.train_data, self.eval_data = train_data, eval_data
        passes.check_labels(model, train_data, eval_data)
        self.run_dir, self.card, self.origin = run_dir, card, origin or {}
        self.loss = LOSSES[settings.loss.name]
        self.answers = ("target", "negative") if self.loss.needs_negative else ("target",)
        self.fraction = getattr(settings.loss, "sampled_fraction", 1.0)  # share of computed negatives
        self.pad_id = checkpoints.pad_id(tokenizer)
        self.is_writer = processes.is_rank0() and not settings.debug  # whether it changes the run folder
        self.device = pick_device()
        dtype = pick_dtype(settings.model.fsdp_policy_mp or "float32", self.device)
        self.compute_dtype = None if dtype == torch.float32 else dtype
        if settings.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        self.place()
        if settings.compile:
            self.model.base_model.compile(dynamic=True)

        self.total_examples, self.total_updates, self.warmup = run_length(settings, len(train_data))
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = make_optimizer(settings, trained)
        self.n_heldout = len(range(len(eval_data))[: settings.n_eval_examples])
        early_stopping.check(settings, self.n_heldout)
        self.updates = self.examples = self.tokens = 0  # tokens: those of answers
        self.heldout: tuple[int, dict[str, float]] = (-1, {})  # examples and averages of the last evaluation
        self.best: list | None = None  # examples and held-out loss of the best step-N so far
        self.last_state: int | None = None  # updates at the newest training state
        self.began = time.monotonic()  # when the run began, less the pauses between its sessions

    @functools.cached_property
    def saver(self) -> resume.Saver:
        # Made on first use: all processes get there together, which they must to create its group.
        return resume.Saver(self.run_dir, self.settings.keep_states)

    # ---- forward and backward passes -----------------------------------------------------------------------

    def place(self) -> None:
        """Move the models to the device and choose their forward pass."""
        self.model = self.model.to(self.device)
        if self.reference is not None:
            self.reference = self.reference.to(self.device).eval()
        self.logps = self.pick_forward()

    def pick_forward(self):
        """Return the fastest forward pass that is right for the models."""
        forward = passes.prepare(self.model, self.reference, self.settings)
        self.is_packed = forward is logps.packed_logps
        return frozen.joined(forward, self.proposal, self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.compute_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def forward(
        self, model: Any, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None
    ) -> logps.Answers:
        """Compute the sequence log-probabilities (B,) of each answer and the number of tokens in each."""
        with self.autocast():
            return self.logps(model, data, rows, self.answers, self.pad_id, drawn)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def losses(
        self, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute the losses (B,) of some examples, and sums of all metrics over the examples.

        Args:
            drawn: (B,) bool, the examples whose negative is computed, weighted to stand for all negatives.
                None computes all.
        """
        policy, counts = self.forward(self.model, data, rows, drawn)
        router_loss = policy.pop(logps.ROUTER_LOSS, 0.0)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference, _ = self.forward(self.reference, data, rows, drawn)
        weights = {}
        if drawn is not None:
            # Dividing by the fraction keeps the expectation of the loss (inverse probability weighting).
            weights["negative_weight"] = torch.from_numpy(drawn).to(policy["target"]) / self.fraction
        losses, metrics = self.loss.function(policy | weights, reference, self.settings.loss)
        losses = losses + router_loss
        assert losses.shape == (len(rows),)
        sums = {key: value.detach().double().sum().item() for key, value in metrics.items()}
        sums["loss"] = losses.detach().double().sum().item()
        names = {"target": "target_logp", "negative": "sampled_logp"}
        for answer, values in policy.items():
            sums[names[answer]] = values.detach().double().sum().item()
            sums[f"{answer}_tokens"] = sum(counts[answer])
            n_computed = len(rows) if drawn is None or answer == "target" else int(drawn.sum())
            sums[f"{answer}_examples"] = n_computed
        return losses, sums

    def losses_of_share(
        self, data: TokenizedDataset, rows: np.ndarray, drawn: np.ndarray | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Compute `losses`. Without rows, still run one example, with losses of 0 and no sums.

        All processes must run the same number of forward and backward passes, because a sharded model is
        gathered by all of them together.
        """
        if len(rows):
            return self.losses(data, rows, drawn)
        losses, _ = self.losses(data, np.array([0]), None if drawn is None else np.array([True]))
        return losses * 0.0, {}

    def micro_batches(self, rows: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
        """Return this process's micro-batches of a batch, as indices into `rows`. Some may be empty."""
        return budget.micro_batches(self.settings, self.train_data, rows, self.answers, drawn, self.is_packed)

    # ---- one update ----------------------------------------------------------------------------------------

    def update(self, rows: np.ndarray) -> dict[str, float]:
        """Take one optimizer step on a global batch; return its averages. Raise Diverged before a bad one."""
        self.model.train()
        torch.manual_seed(hash((self.settings.seed, self.updates, processes.rank())))  # for dropout
        local_sums: dict[str, float] = defaultdict(float)
        drawn = packing.draw_negatives(self.settings.seed, self.examples, len(rows), self.fraction)
        for micro_batch in self.micro_batches(rows, drawn):
            losses, parts = self.losses_of_share(self.train_data, rows[micro_batch], drawn[micro_batch])
            self.backward(losses.sum() / len(rows))
            for key, value in parts.items():
                local_sums[key] += value
        sums = processes.all_sum(local_sums)
        row = averages(sums, len(rows))
        row["grad_norm"] = sharding.clip_grad_norm(self.model, self.settings.max_grad_norm)
        self.check(row)
        factor = lr_factor(self.updates, self.warmup, self.total_updates, self.settings.lr_schedule)
        lr = self.settings.lr * factor * batch_factor(self.settings, len(rows))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        self.examples += len(rows)
        self.tokens += int(sum(value for key, value in sums.items() if key.endswith("_tokens")))
        return row | {"lr": lr, "tokens": self.tokens}

    def check(self, row: dict[str, float]) -> None:
        """Raise Diverged if the coming update would spoil the weights.

        The weights before the update are saved first, if they are finite and give a finite held-out loss.
        """
        floor = self.settings.divergence.min_sampled_logp_per_token
        sampled_logp = row.get("sampled_logp_per_token", 0.0)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            reason = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
            remedy = "lower lr, or look for a broken row in this batch"
        elif floor is not None and sampled_logp < floor:
            reason = f"the sampled term runs away: {sampled_logp:.2f} nats per token, floor {floor}"
            remedy = "lower loss.alpha or lr, or lower divergence.min_sampled_logp_per_token"
        else:
            return
        step = f"step-{self.examples}"
        is_good = sharding.all_finite(self.model) and math.isfinite(self.heldout_averages().get("loss", 0.0))
        if not is_good and self.is_writer:
            # The previous update ruined the weights, so its saved step must not be taken for a good one.
            shutil.rmtree(self.run_dir / step, ignore_errors=True)
        elif is_good and self.examples:
            self.save(step)
        raise self.diverged(reason, remedy)

    def diverged(self, reason: str, remedy: str) -> Diverged:
        """Return the error to raise. It names the last good weights of this run."""
        steps = run_folder.saved_steps(self.run_dir) if not self.settings.debug else []
        saved = f"the last good weights are in {steps[-1]}" if steps else "no good weights were saved"
        return Diverged(f"diverged after {self.examples} examples: {reason}; {saved}; {remedy}")

    # ---- the loop ------------------------------------------------------------------------------------------

    def train(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Run all updates, with evaluations and checkpoints, and return the last evaluation.

        Args:
            state: The training state to resume from (see `resume.newest`); None starts from the beginning.
        """
        settings = self.settings
        bar = None
        if state is not None:
            self.recall(state)
        at_end = self.examples >= self.total_examples
        at_end |= early_stopping.is_over(settings, self.examples, self.best, quiet=True)
        metrics = MetricsLog(self.run_dir, settings, None if state is None else self.updates, at_end)
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
        heldout: dict[str, float] = {}
        try:
            if settings.do_first_eval and not self.updates:
                self.evaluate(metrics)
            shown = {"total": self.total_examples, "initial": self.examples, "desc": self.run_dir.name}
            bar = progress(main=True, unit="ex", **shown)
            with processes.stop_signals() as signals:
                for rows in itertools.islice(batches, self.updates, None):
                    if early_stopping.is_over(settings, self.examples, self.best):
                        break
                    start = time.monotonic()
                    before, tokens_before = self.examples, self.tokens
                    row = self.update(rows)
                    seconds = max(time.monotonic() - start, 1e-9)
                    row["examples_per_second"] = len(rows) / seconds
                    row["tokens_per_second"] = (self.tokens - tokens_before) / seconds
                    metrics.write("train", self.counters() | row)
                    bar.set_postfix_str(f"loss {row['loss']:.3g}", refresh=False)
                    bar.update(len(rows))
                    self.after_update(metrics, before)
                    self.saver.check()
                    if processes.any_rank(bool(signals)):
                        self.remember()
                        self.saver.wait()
                        raise Preempted(signals[0] if signals else None)
                # A run that is stopped or killed during the last evaluation or export repeats no update.
                self.remember()
                self.saver.wait()
            at, heldout = self.heldout  # a run that stops early has just evaluated
            heldout = heldout if at == self.examples else self.evaluate(metrics)
            self.save(run_folder.LATEST)
            heldout = heldout | early_stopping.keep_best(
                settings, self.best, heldout.get("loss", math.nan), self.run_dir, self.is_writer
            )
        except Diverged:
            self.saver.wait()
            if not settings.debug:
                resume.clear(self.run_dir)  # a resumed run would diverge again
            raise
        finally:
            if bar is not None:
                bar.close()
            metrics.close()
        best = {"best_step": self.best[0], "best_loss": self.best[1]} if self.best else {}
        return self.counters() | heldout | best

    def after_update(self, metrics: MetricsLog, before: int) -> None:
        """Evaluate and save if due since `before` examples; a run ends with both anyway."""
        if self.examples >= self.total_examples:
            return
        if self.examples // self.settings.eval_every > before // self.settings.eval_every:
            self.evaluate(metrics)
        if (every := self.settings.save_every) and self.examples // every > before // every:
            self.save(f"step-{self.examples}")
            self.prune()
            self.remember()

    def counters(self) -> dict[str, float]:
        epoch = self.examples / max(len(self.train_data), 1)
        return {"updates": self.updates, "examples": self.examples, "epoch": epoch}

    def evaluate(self, metrics: MetricsLog) -> dict[str, float]:
        """Log and return the held-out averages; raise Diverged if their loss is not finite."""
        row = self.heldout_averages()
        if not row:
            return {}
        metrics.write("heldout", self.counters() | row)
        if not math.isfinite(row["loss"]):
            raise self.diverged(f"held-out loss {row['loss']}", "lower lr, or look for a broken held-out row")
        self.heldout = (self.examples, row)
        if self.settings.sample_during_eval:
            n = min(self.n_heldout, self.settings.n_eval_model_samples)
            show_samples(self.model, self.tokenizer, self.eval_data, n, self.settings)
        return row

    @torch.no_grad()
    def heldout_averages(self) -> dict[str, float]:
        """Return averages over the first n_eval_examples held-out examples; empty if there are none."""
        if not (n := self.n_heldout):
            return {}
        self.model.eval()
        sums: dict[str, float] = defaultdict(float)
        shares = budget.heldout_passes(self.settings, self.eval_data, n, self.answers, self.is_packed)
        for rows in progress(shares, desc="evaluate"):
            _, parts = self.losses_of_share(self.eval_data, rows)
            for key, value in parts.items():
                sums[key] += value
        return averages(processes.all_sum(sums), n)

    # ---- weights and training states -----------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Export the weights as a transformers folder run_dir/`name`; raise Diverged if one is not finite."""
        if not sharding.all_finite(self.model):
            raise self.diverged("the last update made weights that are not finite", "lower lr")
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
        """Return all weights by name if the model holds only shards of them, else None."""
        return None

    def prune(self) -> None:
        """Delete old steps, but keep the newest ones and the one with the lowest held-out loss."""
        examples, row = self.heldout
        if examples == self.examples and (self.best is None or row["loss"] < self.best[1]):
            self.best = [examples, row["loss"]]
        if self.settings.keep_steps is not None and self.is_writer:
            best_step = f"step-{self.best[0]}" if self.best else None
            run_folder.prune_steps(self.run_dir, self.settings.keep_steps, best_step)

    COUNTERS = ("updates", "examples", "tokens", "best")

    def remember(self) -> None:
        """Save a training state, unless there is one of this update."""
        if self.settings.debug or self.last_state == self.updates:
            return
        self.last_state = self.updates
        facts = {key: getattr(self, key) for key in self.COUNTERS}
        facts |= {"seconds": time.monotonic() - self.began, "origin": self.origin}
        self.saver.save(self.model, self.optimizer, facts)

    def recall(self, state: dict[str, Any]) -> None:
        """Load a training state."""
        resume.load(state["folder"], self.model, self.optimizer)
        for key in self.COUNTERS:
            setattr(self, key, state[key])
        self.began -= state.get("seconds", 0.0)  # states of earlier versions do not have it
        log.info(f"resuming after {self.examples:,} of {self.total_examples:,} examples: {state['folder']}")


class FSDPTrainer(BasicTrainer):
    """Trains one model that is sharded over any number of processes."""

    distributed = True

    def place(self) -> None:
        settings = self.settings
        processes.start(alone=True)
        forward = self.pick_forward()
        block_name, offload = settings.model.block_name, settings.cpu_offload
        for model in filter(None, (self.model, self.reference)):
            sharding.shard(model, block_name, self.device, self.compute_dtype, forward, offload)
        self.compute_dtype = None  # no autocast, because the gathered weights have this dtype already
        if self.reference is not None:
            self.reference.eval().requires_grad_(False)
        self.logps = lambda model, *args: getattr(model, sharding.FORWARD)(*args)

    def backward(self, loss: torch.Tensor) -> None:
        # FSDP averages gradients over the processes, but the loss is a sum over them.
        (loss * processes.count()).backward()

    def whole_state(self) -> dict[str, torch.Tensor]:
        return sharding.whole_state(self.model)


TRAINERS = {"BasicTrainer": BasicTrainer, "FSDPTrainer": FSDPTrainer}


def pick_trainer(name: str) -> type[BasicTrainer]:
    """Return the trainer class of a name; raise UserError if it does not exist."""
    if name == "TensorParallelTrainer":
        raise UserError("trainer=TensorParallelTrainer was removed: use trainer=FSDPTrainer")
    return pick(TRAINERS, name, "trainer")
