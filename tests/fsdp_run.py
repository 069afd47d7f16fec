"""Run by torchrun in test_processes.py: trains the tests' tiny model with FSDPTrainer and leaves its files.

    fsdp_run.py FOLDER STOP [key=value ...]

STOP: the number of updates after which every process is told to stop; 0 = never.
"""

import sys
from pathlib import Path

import torch
from test_trainers import TOKENIZER, dataset, settings
from tiny import tiny_model

import processes
import resume
import trainers
import utils


class Told(trainers.FSDPTrainer):
    stop_after = 0

    def after_update(self, metrics):
        super().after_update(metrics)
        if self.updates == self.stop_after and processes.rank() == processes.count() - 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)  # one process is told, all of them stop


def main():
    folder, stop, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    utils.setup_logging()
    utils.quiet_transformers()
    processes.start(alone=True)
    Told.stop_after = stop
    config = settings("trainer=FSDPTrainer", "model.block_name=LlamaDecoderLayer", *overrides)
    reference = tiny_model(len(TOKENIZER), seed=7, layers=2) if config.loss.name == "dpo" else None
    model = tiny_model(len(TOKENIZER), seed=0, layers=2)
    if processes.is_first():
        folder.mkdir(parents=True, exist_ok=True)
    processes.wait()
    run = Told(config, model, TOKENIZER, dataset(20), dataset(6, seed=99), folder, {}, reference, {"it": 1})
    try:
        run.train(resume.newest(folder, {"it": 1}))
    except trainers.Preempted:
        assert stop
    processes.wait()


if __name__ == "__main__":
    processes.run(main)
