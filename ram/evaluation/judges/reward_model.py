"""A reward model as judge: the answer with the higher reward is better.

The preference is sigmoid(reward of the answer - reward of the reference), as Bradley and Terry (1952) model
it. The model is a transformers sequence classifier with one label.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ram.evaluation.judges.base import Cache, Judge, Judgement, Rows, Texts
from ram.log import pick_device, progress
from ram.models import checkpoints
from ram.settings.checks import Count, Dtype
from ram.storage.files import file_sha256, fingerprint


@dataclass(frozen=True)
class RewardModelJudge(Judge):
    """See config/judge/reward_model.yaml."""

    name: str = "reward_model"
    model: str | None = None
    hub_id: str | None = None
    instruction_key: str = "instruction"
    max_length: Count = 2048
    batch_size: Count = 16
    dtype: Dtype = "auto"

    def check(self) -> None:
        checkpoints.find_model(self.model, self.hub_id)

    def identity(self) -> dict[str, Any]:
        source = checkpoints.find_model(self.model, self.hub_id, quiet=True)
        template = Path(source) / "chat_template.jinja"  # it makes the text that the model reads
        more = {"chat_template": file_sha256(template)} if template.is_file() else {}
        return self._identity(checkpoints.weights_fingerprint(source)) | more

    def earlier_identity(self) -> dict[str, Any]:
        source = checkpoints.find_model(self.model, self.hub_id, quiet=True)
        if "chat_template" in self.identity():  # earlier versions did not look at it: unknown
            return self.identity()
        return self._identity(checkpoints.earlier_fingerprint(source))

    def _identity(self, model: str) -> dict[str, Any]:
        return super().identity() | {"model": model, "max_length": self.max_length, "dtype": self.dtype}

    def describe(self) -> str:
        return f"model {self.model or self.hub_id}"

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        source = checkpoints.find_model(self.model, self.hub_id)
        identity, saved = self.identity(), Cache(cache)
        pairs = [
            [(row[self.instruction_key], text) for text in texts]
            for row, *texts in zip(rows, answers, references, strict=True)
        ]
        keys = {pair: fingerprint([identity, *pair]) for both in pairs for pair in both}
        missing = [pair for pair, key in keys.items() if saved.known.get(key) is None]
        if missing:
            for pair, reward in self.rewards(source, missing):
                if math.isfinite(reward):
                    saved.add(keys[pair], reward)
        judgements: list[Judgement] = []
        for own, other in pairs:
            if any(saved.known.get(keys[pair]) is None for pair in (own, other)):
                judgements.append({"failed": "its reward is not a number: try dtype=float32"})
                continue
            margin = saved.known[keys[own]] - saved.known[keys[other]]
            preference = 1 / (1 + math.exp(-max(min(margin, 700), -700)))
            judgements.append({"preference": preference, "margin": margin})
        return judgements

    def rewards(self, source: str, pairs: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], float]]:
        """Yield each (instruction, answer) with its reward, in batches of about equal length.

        A text that is longer than `max_length` loses its beginning.
        """
        tokenizer, model = checkpoints.load_reward_model(source, self.dtype, pick_device())
        ids = [reward_ids(tokenizer, *pair)[-self.max_length :] for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda index: -len(ids[index]))
        pad = model.config.pad_token_id
        for start in progress(range(0, len(order), self.batch_size), desc="judge", unit="batch"):
            batch = order[start : start + self.batch_size]
            longest = len(ids[batch[0]])
            input_ids = torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in batch])
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
            with torch.inference_mode():
                logits = model(input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
            assert logits.shape == (len(batch), 1)
            yield from ((pairs[i], score) for i, score in zip(batch, logits[:, 0].tolist(), strict=True))


def reward_ids(tokenizer: Any, instruction: str, answer: str) -> list[int]:
    """Return a dialogue's token ids, by the tokenizer's chat template if it has one."""
    if not tokenizer.chat_template:
        return tokenizer(instruction + answer).input_ids
    turns = [("user", instruction), ("assistant", answer)]
    if "\n\nHuman: " in instruction:  # a whole dialogue, as in the rows of HH
        turns = dialogue_turns(instruction + answer)
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def dialogue_turns(text: str) -> list[tuple[str, str]]:
    """Split a dialogue in Anthropic's format into (role, text); adjacent turns of one role are joined."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    turns: list[tuple[str, str]] = []
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if name == "Human" else "assistant"
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{content.strip()}")
        else:
            turns.append((role, content.strip()))
    return turns


JUDGE = RewardModelJudge
