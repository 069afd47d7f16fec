"""A small sample stage: models, a data set, fixtures that run and interrupt it, and a record of decoding."""

import functools
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer, save_model_folder, tiny_model

import train
from ram.decoding import generation
from ram.settings import recipes
from ram.storage.files import write_json
from utils import TABLES

TOKENIZER = byte_tokenizer()
# The longest prompts are in the middle of the file, so that decoding order differs from file order.
ROWS = [
    {"instruction": "why? " * (7 * i % 10), "output": f"answer {i}", "id": i, "tags": ["é", None]}
    for i in range(10)
]
LONGEST_PROMPT = 60
NEW_TOKENS = 12
write_rows = functools.partial(write_json, "train/ultrachat_round_one.json")


# ---- fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders with one tokenizer: two sizes that form a pair, and other weights of the large one."""
    root = tmp_path_factory.mktemp("models")
    models = {"large": (1, 2), "small": (2, 1), "other": (3, 2)}
    for name, (seed, layers) in models.items():
        save_model_folder(root / name, tiny_model(len(TOKENIZER), seed, layers), TOKENIZER)
        os.utime(root / name / "model.safetensors", (seed, seed))  # every file has its own time
    return {name: str(root / name) for name in models}


@functools.cache
def resolved(*overrides: str) -> recipes.Stage:
    (stage,) = recipes.resolve(overrides, TABLES)
    return stage


@pytest.fixture
def resolve(
    tmp_path: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., recipes.Stage]:
    """A function that returns the sample stage for some overrides, over its own copy of the data set."""
    monkeypatch.chdir(tmp_path)
    write_rows(ROWS)

    def stage(*overrides: str, proposal: str = folders["large"]) -> recipes.Stage:
        return resolved(
            f"+stage.sample={{kind: sample, proposal: {proposal}, dataset: uc}}",
            "data_dir=.",
            f"sampling.max_prompt_length={LONGEST_PROMPT}",
            f"sampling.max_length={LONGEST_PROMPT + NEW_TOKENS}",
            "sampling.batch_size=3",
            "sampling.base_temperature=1.0",
            "sampling.dtype=float32",
            *overrides,
        )

    return stage


class DecodingCalls(list):
    """The calls of `generation.generate_iter`, with their arguments and the order of their answers."""

    stop_after: int | None = None  # raise KeyboardInterrupt after this many answers

    @property
    def counts(self) -> list[int]:
        """Number of prompts of each call."""
        return [len(call.prompts) for call in self]


@pytest.fixture
def decoding_calls(monkeypatch: pytest.MonkeyPatch) -> DecodingCalls:
    """Record the calls of the decoder, and interrupt them if `stop_after` is set."""
    calls = DecodingCalls()
    original = generation.generate_iter

    def generate_iter(proposal, aligner, tokenizer, prompts, params, **kwargs) -> Iterator:
        models = (proposal, aligner)
        calls.append(SimpleNamespace(models=models, prompts=prompts, params=params, order=[], **kwargs))
        answers = original(*models, tokenizer, prompts, params, **kwargs)
        for index, answer in islice(answers, calls.stop_after):
            calls[-1].order.append(index)
            yield index, answer
        if calls.stop_after is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate_iter", generate_iter)
    return calls


# ---- running a stage ---------------------------------------------------------------------------------------


def sample(stage: recipes.Stage, overwrite: bool = False) -> bytes:
    """Run the stage and return the contents of its file."""
    train.sample_stage(stage, overwrite)
    return stage.output.read_bytes()


def interrupt(
    stage: recipes.Stage, decoding_calls: DecodingCalls, after: int, overwrite: bool = False
) -> SimpleNamespace:
    """Run the stage, interrupt it after `after` answers, and return the recorded call of the decoder."""
    decoding_calls.stop_after = after
    with pytest.raises(KeyboardInterrupt):
        sample(stage, overwrite)
    decoding_calls.stop_after = None
    return decoding_calls[-1]


def part_file(stage: recipes.Stage) -> Path:
    """The file that holds the answers of an unfinished stage."""
    return stage.output.with_name(stage.output.name + ".part")
