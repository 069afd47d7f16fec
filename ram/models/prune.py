"""Cut an aligner out of a proposal, for model families that have no small member.

    python -m ram.models.prune MODEL layers=7 out=FOLDER         # seven layers at equal distances
    python -m ram.models.prune MODEL layers=0,4,9 out=FOLDER     # these layers

The result has the proposal's vocabulary and tokenizer. Before it is trained it is worse than a uniform
distribution: the remaining layers do not fit together. Train it as a language model first, then as an
aligner.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ram.errors import UserError, run_entry_point
from ram.log import log, setup_logging
from ram.models import checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def chosen_layers(text: str, count: int) -> list[int]:
    """Return the layers to keep, ascending: the listed ones, or a number of them at equal distances.

    The first and the last layer are among those that a number chooses, if it is above 1.

    Args:
        text: `7`, or `0,4,9`.
        count: layers of the model.

    Raises:
        UserError: a layer does not exist or appears twice.
    """
    try:
        numbers = [int(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise UserError(f"layers={text}: expected a number of layers, or indices such as 0,4,9") from None
    if len(numbers) == 1 and "," not in text and not text.startswith("["):
        (kept,) = numbers
        if not 1 <= kept < count:
            raise UserError(f"layers={kept}: the model has {count} layers, keep fewer and at least 1")
        return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]
    if sorted(set(numbers)) != numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise UserError(f"layers={text}: expected ascending indices from 0 to {count - 1}, each once")
    return numbers


def prune(model: "PreTrainedModel", layers: Sequence[int]) -> "PreTrainedModel":
    """Keep only some layers of a decoder, in place; return the model.

    Raises:
        UserError: the model's layers are not one list of blocks.
    """
    config: Any = model.config.get_text_config()
    count = config.num_hidden_layers
    lists = [
        (parent, name, part)
        for parent in model.base_model.modules()
        for name, part in parent.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers; expected a decoder with one"
        )
    parent, name, blocks = lists[0]
    for key, values in list(vars(config).items()):
        if not isinstance(values, list) or key.endswith("token_id"):
            continue
        if key.endswith(("_layers", "_idxs")) and values == [i for i in range(count) if i in values]:
            # The indices of some layers, such as mlp_only_layers.
            setattr(config, key, [place for place, index in enumerate(layers) if index in values])
        elif len(values) == count:  # an entry for each layer, such as layer_types
            setattr(config, key, [values[index] for index in layers])
    kept = nn.ModuleList(blocks[index] for index in layers)
    for place, block in enumerate(kept):
        for part in block.modules():  # attention finds its keys and values in the cache by this number
            if "layer_idx" in vars(part):
                vars(part)["layer_idx"] = place
    setattr(parent, name, kept)
    config.num_hidden_layers = len(kept)
    return model


@torch.no_grad()
def _logits(model: "PreTrainedModel") -> torch.Tensor:
    return model(torch.arange(8)[None] % model.config.get_text_config().vocab_size).logits.float()


def _check_reload(folder: Path, expected: torch.Tensor) -> None:
    """Remove a folder whose model has other logits than the one in memory had; raise UserError."""
    try:
        found = _logits(checkpoints.load_model(str(folder)))
        wrong = bool((found - expected).abs().max() > 1e-3 * expected.abs().max())
    except Exception as error:
        shutil.rmtree(folder)
        raise UserError(f"the pruned model cannot be loaded ({error}); choose other layers") from None
    if wrong:
        shutil.rmtree(folder)
        raise UserError(
            "the pruned model changes when it is loaded again: its config.json ties something to the number "
            "of a layer, e.g. to every fourth; keep layers at that distance"
        )


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    values = {key: value for key, equals, value in (a.partition("=") for a in arguments) if equals}
    sources = [argument for argument in arguments if "=" not in argument]
    if len(sources) != 1 or set(values) != {"layers", "out"}:
        raise UserError("expected: python -m ram.models.prune MODEL layers=7 (or 0,4,9) out=FOLDER")
    source, out = sources[0], Path(values["out"])
    if out.exists():
        raise UserError(f"out={out} exists: give a folder that does not")
    source = checkpoints.find_model(source, source)
    model = checkpoints.load_model(source)
    layers = chosen_layers(values["layers"], model.config.get_text_config().num_hidden_layers)
    before = sum(weight.numel() for weight in model.parameters())
    prune(model, layers)
    after = sum(weight.numel() for weight in model.parameters())
    card = {"pruned_from": source, "layers": layers}
    trained = checkpoints.read_card(source)
    card |= {key: trained[key] for key in ("add_bos", "template") if trained.get(key) is not None}
    dtype = str(model.dtype).removeprefix("torch.")
    expected = _logits(model)
    checkpoints.export_model(model, checkpoints.load_tokenizer(source), out, dtype, card)
    del model
    _check_reload(out, expected)
    log.info(
        f"saved    {out}: layers {', '.join(map(str, layers))}, {after / 1e6:,.1f} of {before / 1e6:,.1f} M "
        "weights; train it as a language model before it becomes an aligner"
    )


if __name__ == "__main__":
    setup_logging()
    run_entry_point(lambda: main(sys.argv[1:]))
