"""Trains a larger pair than the demo's for benchmarks/decoding.py: 21 M and 0.2 M weights, ten minutes.

    python benchmarks/larger_pair.py --output /tmp/larger_pair

Texts are lists of facts of the toy data set, whose lengths spread as widely as those of HH's answers. Form is
easy, so both models learn it; which value a fact has is only for the larger one to remember. The weights are
not kept in the repository.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from ram.data import toy_world
from ram.log import setup_logging
from ram.settings import compose
from ram.storage.files import read_rows, write_json, write_jsonl

WORLD = {"entities": 60, "general_rows": 10, "aligned_rows": 10}
WORLD |= {"general_styles": {"terse": 1.0}, "mixture_styles": {"terse": 1.0}}
SIZES = {  # hidden, intermediate, layers, heads, updates, learning rate
    "larger": (384, 1024, 12, 6, 300, 6e-4),
    "smaller": (96, 256, 2, 4, 600, 3e-3),
}


SPREAD = 1.03  # standard deviation of the logarithm of HH's answer lengths, as in benchmarks/training.py
SENTENCES = 24  # at most


def write_texts(folder: Path, rows: int) -> None:
    """The general corpus and the test file: a request and a list of facts in random order."""
    toy_world.build_world(folder, WORLD, seed=0)
    facts = [row for _, row in read_rows(folder / "test" / "toy_test.json")]
    rng = random.Random(0)

    def text() -> dict[str, str]:
        told = [rng.choice(facts) for _ in range(min(SENTENCES, 1 + int(rng.lognormvariate(1.6, SPREAD))))]
        told = [f" the {fact['attribute']} of {fact['entity']} is {fact['value']}." for fact in told]
        return {
            "instruction": f"Tell me the dish of {rng.choice(facts)['entity']}.",
            "output": "Just" + "".join(told),
        }

    write_jsonl(folder / "train" / "toy_general.jsonl", [text() for _ in range(rows)])
    write_json(folder / "test" / "texts.json", [text() for _ in range(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for data and both models")
    parser.add_argument("--updates", type=float, default=1.0, help="share of the updates, for a quick try")
    arguments = parser.parse_args()
    setup_logging()
    data = arguments.output / "data"
    if not (data / "test" / "texts.json").is_file():
        write_texts(data, rows=6000)
    for name, (hidden, intermediate, layers, heads, updates, lr) in SIZES.items():
        architecture = (
            f"{{model_type: llama, hidden_size: {hidden}, intermediate_size: {intermediate}, "
            f"num_hidden_layers: {layers}, num_attention_heads: {heads}, num_key_value_heads: {heads}, "
            "max_position_embeddings: 256, initializer_range: 0.02, tie_word_embeddings: true}"
        )
        overrides = [
            f"output_dir={arguments.output}",
            f"data_dir={data}",
            f"exp_name={name}",
            f"model.name={name}",
            f"model.architecture={architecture}",
            f"model.tokenizer_name_or_path={data}/tokenizer",
            "datasets=[toy-general]",
            "optimizer=AdamW",
            f"lr={lr}",
            "lr_schedule=cosine",
            "warmup_steps=0.05",
            "max_grad_norm=1.0",
            "batch_size=16",
            f"n_examples={int(updates * arguments.updates) * 16}",
            "max_length=240",
            "max_prompt_length=24",
            "save_every=null",
            "n_eval_examples=32",
        ]
        train.run(compose.compose(overrides), overrides)


if __name__ == "__main__":
    main()
