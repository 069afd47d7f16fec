"""Steps of TRL's trainers on the rows and the model of benchmarks/training.py (`pip install trl` beside
us).
"""

import copy
import tempfile
import time
from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


def trl_step(loss: str, model, data, rows: list[np.ndarray]) -> Callable[[np.ndarray], float]:
    """A function of a batch's rows that takes one optimizer step in TRL and gives its seconds.

    loss: sft (targets only) or dpo (target and negative, with a frozen reference). rows: all batches to come;
    TRL is given their examples as token ids. Layout of the batch, loss, backward pass, clipping and update
    are TRL's and the optimizer's own; checkpointing is off, as in ours.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(rows[0]),
        "learning_rate": 1e-6,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
    }
    picked = [int(row) for batch in rows for row in batch]
    examples = [example(loss, data, row) for row in picked]
    kinds = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
    trainer_class, config_class = kinds[loss]
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config_class(**settings),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()
    at = {row: index for index, row in enumerate(picked)}

    def step(batch: np.ndarray) -> float:
        start = time.perf_counter()
        inputs = trainer.data_collator([trainer.train_dataset[at[int(row)]] for row in batch])
        trainer.model.train()
        trainer.training_step(trainer.model, inputs)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 10.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return time.perf_counter() - start

    return step


def example(loss: str, data, row: int) -> dict[str, list[int]]:
    prompt, target, negative = (data.part(part, row).tolist() for part in ("prompt", "target", "negative"))
    if loss == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": target, "rejected_ids": negative}
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}
