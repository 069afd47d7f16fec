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


def trl_step(loss: str, model, data, size: int) -> Callable[[np.ndarray], float]:
    """A function of a batch's rows that takes one optimizer step in TRL and gives its seconds.

    loss: sft (targets only) or dpo (target and negative, with a frozen reference). size: examples of a batch.
    Layout of the batch, loss, backward pass, clipping and update
    are TRL's and the optimizer's own; checkpointing is off, as in ours.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": size,
        "learning_rate": 1e-6,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
    }
    kinds = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}
    # What its trainer is made with is never used: the rows come as token ids, straight to its collator.
    unused = {"sft": {"input_ids": [0, 1]}, "dpo": {"prompt": "a", "chosen": "b", "rejected": "c"}}
    trainer_class, config_class = kinds[loss]
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config_class(**settings),
        train_dataset=Dataset.from_list([unused[loss]]),
        processing_class=tokenizer,
        **({"ref_model": copy.deepcopy(model)} if loss == "dpo" else {}),
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which its own loop would set

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


def example(loss: str, data, row: int) -> dict[str, list[int]]:
    prompt, target, negative = (data.part(part, row).tolist() for part in ("prompt", "target", "negative"))
    if loss == "dpo":
        return {"prompt_ids": prompt, "chosen_ids": target, "rejected_ids": negative}
    return {"input_ids": prompt + target, "labels": [-100] * len(prompt) + target}
