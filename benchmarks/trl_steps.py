"""Training steps of TRL on the examples and the model of benchmarks/training.py. Needs `pip install trl`."""

import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ram.data.tokenization import TokenizedDataset


def trl_step(
    loss: str, model: PreTrainedModel, data: TokenizedDataset, size: int
) -> Callable[[np.ndarray], float]:
    """Make a function that takes one optimizer step in TRL on some rows, and returns its seconds.

    TRL lays out the batch and computes loss, backward pass, clipping and update. Activation checkpointing is
    off, as in our steps.

    Args:
        loss: "sft" (targets only) or "dpo" (target and negative, with a frozen reference).
        size: Examples of a batch.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": size,
        "learning_rate": 1e-6,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
    }
    kinds = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
    # The trainer needs a data set but never reads it, because the rows go to its collator as token ids.
    placeholder = {"sft": {"input_ids": [0, 1]}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    trainer_class, config_class = kinds[loss]
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config_class(**settings),
        train_dataset=Dataset.from_list([placeholder[loss]]),
        processing_class=tokenizer,
        **({"ref_model": copy.deepcopy(model)} if loss == "dpo" else {}),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # normally set by its training loop

    def step(batch: np.ndarray) -> float:
        start = time.perf_counter()
        inputs = trainer.data_collator([example(loss, data, int(row)) for row in batch])
        trainer.model.train()
        trainer.training_step(trainer.model, inputs)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 10.0)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return time.perf_counter() - start

    return step


def example(loss: str, data: TokenizedDataset, row: int) -> dict[str, list[int]]:
    """Return one example in the format of TRL's collator."""
    prompt, target, negative = (data.part(part, row).tolist() for part in ("prompt", "target", "negative"))
    if loss == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": target, "rejected_ids": negative}
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}
