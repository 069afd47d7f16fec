"""Script for torchrun in test_processes.py: train the tiny model with FSDPTrainer, once for each loss.

    fsdp_run.py FOLDER STOP LOSS,LOSS [key=value ...]

FOLDER: the runs are written to FOLDER/LOSS. STOP: updates after which the run is stopped; 0 for never.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny import tiny_model
from training_runs import TOKENIZER, dataset, settings

import trainers
import utils
from ram.distributed import processes
from ram.training import resume
from ram.training.metrics import MetricsLog


class StoppedTrainer(trainers.FSDPTrainer):
    stop_after = 0  # updates; 0 for never

    def after_update(self, metrics: MetricsLog) -> None:
        super().after_update(metrics)
        if self.updates == self.stop_after and processes.rank() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # a signal to one process stops all of them


def main() -> None:
    folder, stop, losses, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    utils.setup_logging()
    utils.quiet_transformers()
    processes.start(alone=True)
    StoppedTrainer.stop_after = int(stop)
    for loss in losses.split(","):
        train(Path(folder) / loss, f"loss={loss}", *overrides)


def train(folder: Path, *overrides: str) -> None:
    config = settings("trainer=FSDPTrainer", "model.block_name=LlamaDecoderLayer", *overrides)
    reference = tiny_model(len(TOKENIZER), seed=7, layers=2) if config.loss.name == "dpo" else None
    model = tiny_model(len(TOKENIZER), seed=0, layers=2)
    if processes.is_rank0():
        folder.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    run = StoppedTrainer(
        config, model, TOKENIZER, dataset(18), dataset(6, seed=99), folder, {}, reference, {"it": 1}
    )
    try:
        run.train(resume.newest(folder, {"it": 1}))
    except trainers.Preempted:
        assert StoppedTrainer.stop_after
    processes.barrier()


if __name__ == "__main__":
    processes.run(main)
