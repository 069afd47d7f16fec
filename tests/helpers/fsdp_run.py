"""Train the tests' tiny model in float64 with FSDPTrainer, once for each kind; torchrun runs this file.

test_processes.py reads the files that it leaves in FOLDER/KIND.

    fsdp_run.py FOLDER STOP KIND,KIND [key=value ...]

STOP: the number of updates after which every process is told to stop; 0 = never.
"""

import sys
from pathlib import Path

import torch
from tiny import tiny_model
from training_runs import RUNS, TOKENIZER, dataset, frozen_proposal, model_of, settings

import trainers
import utils
from ram.distributed import processes
from ram.training import resume


class Told(trainers.FSDPTrainer):
    stop_after = 0

    def after_update(self, metrics, before):
        super().after_update(metrics, before)
        if self.updates == self.stop_after and processes.rank() == processes.count() - 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)  # one process is told, all of them stop


def main():
    folder, stop, kinds, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    utils.setup_logging()
    utils.quiet_transformers()
    processes.start(alone=True)
    Told.stop_after = int(stop)
    for kind in kinds.split(","):
        train(Path(folder) / kind, *RUNS[kind], *overrides)


def train(folder, *overrides):
    config = settings("trainer=FSDPTrainer", "model.block_name=LlamaDecoderLayer", *overrides)
    reference = None
    if config.loss.name == "dpo":
        reference = tiny_model(len(TOKENIZER), seed=7, layers=2, dtype=torch.float64)
    proposal = frozen_proposal() if config.loss.name == "ratio" else None
    model = model_of(config, dtype=torch.float64)
    if processes.is_rank0():
        folder.mkdir(parents=True, exist_ok=True)
    processes.barrier()
    data = dataset(18), dataset(6, seed=99)
    run = Told(config, model, TOKENIZER, *data, folder, {}, reference, {"it": 1}, proposal)
    try:
        run.train(resume.newest(folder, {"it": 1}))
    except trainers.Preempted:
        assert Told.stop_after
    processes.barrier()


if __name__ == "__main__":
    processes.run(main)
