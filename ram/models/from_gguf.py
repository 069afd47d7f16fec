"""Turn a Llama model in a GGUF file into a folder of this project, for machines that reach no model hub.

    python -m ram.models.from_gguf FILE.gguf out=FOLDER

Needs the package gguf. The weights become float32, with the values that the file's quantisation left. The
tokenizer is built from the file's vocabulary and merges: the one that transformers reads out of the file
splits numbers otherwise than the model was trained with.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ram.errors import UserError, run_entry_point
from ram.log import log, setup_logging
from ram.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL = 3  # GGUF's type of tokens that are marks, not text
# GGUF names the rule that splits a text before the merges; "smollm": digits one by one, then GPT-2's.
SPLITS_DIGITS = {"smollm": True, "gpt-2": False}


def read_fields(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file.

    Raises:
        UserError: the package is missing, or the file is not a GGUF file.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF files needs the package gguf: pip install gguf") from None
    try:
        return {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}") from None


def make_tokenizer(fields: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """Build the byte-level tokenizer that a GGUF file describes.

    Args:
        fields: from `read_fields`.

    Raises:
        UserError: the file's tokenizer is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in SPLITS_DIGITS:
        raise UserError(
            f"the file's tokenizer is {kind!r} with the splitting rule {rule!r}; expected gpt2 with one of "
            f"{', '.join(SPLITS_DIGITS)}: get the model in the transformers format instead"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        if SPLITS_DIGITS[rule]
        else words
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    marks = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])

    def named(name: str) -> str | None:
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        pad_token=named("padding"),
        unk_token=named("unknown"),
        additional_special_tokens=marks,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    from transformers import AutoModelForCausalLM

    values = {key: value for key, equals, value in (a.partition("=") for a in arguments) if equals}
    sources = [argument for argument in arguments if "=" not in argument]
    if len(sources) != 1 or set(values) != {"out"}:
        raise UserError("expected: python -m ram.models.from_gguf FILE.gguf out=FOLDER")
    path, out = Path(sources[0]), Path(values["out"])
    if out.exists():
        raise UserError(f"out={out} exists: give a folder that does not")
    fields = read_fields(path)
    if (family := fields.get("general.architecture")) != "llama":
        raise UserError(f"{path} holds a model of type {family!r}; expected llama")
    tokenizer = make_tokenizer(fields)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    config = type(read.config)(**{**read.config.to_dict(), "quantization_config": None})
    vars(config).pop("quantization_config", None)  # the weights are ordinary numbers from here on
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    card = {"converted_from": path.name, "name": fields.get("general.name")}
    checkpoints.export_model(model, tokenizer, out, "float32", card)
    log.info(
        f"saved    {out}: {sum(w.numel() for w in model.parameters()):,} weights of {path.name}, dequantised"
    )


if __name__ == "__main__":
    setup_logging()
    run_entry_point(lambda: main(sys.argv[1:]))
