"""Low-rank adapters: train small factors beside frozen linear layers, and merge them into exported weights.

Method: Hu et al. 2021, LoRA (arXiv 2106.09685). A layer W gets W + (alpha / r) B A, with A (r, in) random and
B (out, r) zero. Implementation: peft's layers, injected into the model, whose class stays the same.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from ram.errors import UserError

ADAPTER = "default"  # peft's name for the only adapter of a layer
FACTOR = re.compile(r"(.+)\.lora_(A|B)\." + ADAPTER + r"\.weight")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The adapters of a training run.

    Args:
        r: The rank of the factors.
        alpha: Their product is scaled by alpha / r.
        targets: Ends of the names of the adapted layers, e.g. ["q_proj", "v_proj"]; "all-linear" adapts all
            but the LM head.
        base_dtype: Of the frozen weights.
    """

    r: int
    alpha: float
    targets: Literal["all-linear"] | list[str] = "all-linear"
    base_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r}: expected a number of at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: expected a number above 0")


def add_adapters(model: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Freeze a model and give its linear layers trainable low-rank factors, in float32 or wider.

    Args:
        seed: The factors depend on it alone; the global random state is not changed.

    Raises:
        UserError: If peft is not installed, or the targets are no layers that can be adapted.
    """
    targets = settings.targets
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "lora needs the package peft, which is not installed: pip install peft==0.21.2"
        ) from None
    head = cast(Any, model).get_output_embeddings()
    model.requires_grad_(False)
    config = LoraConfig(r=settings.r, lora_alpha=cast(int, settings.alpha), target_modules=targets)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        layers = {
            name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)
        }
        raise UserError(
            f"lora.targets={targets}: {str(error).splitlines()[0]} Known: {', '.join(sorted(layers))}"
        ) from None
    if cast(Any, model).get_output_embeddings() is not head:
        raise UserError(f"lora.targets={targets}: the LM head cannot be adapted; leave it out")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def plain_name(name: str) -> str:
    """Return the name that a weight has without adapters."""
    return name.replace(".base_layer.", ".")


def merged_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and weights of the plain model, whose layers are the sums of frozen weights and adapters.

    Args:
        model: Tells the adapters' scales. The weights of a model without adapters are yielded as they are.
        state: All its weights by name, e.g. gathered from shards. It is emptied on the way, so that no more
            than one merged weight exists at a time.
    """
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for name in list(state):
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = state.pop(name)
    for name in list(state):
        weight, plain = state.pop(name), plain_name(name)
        layer = plain.removesuffix(".weight")
        if plain != layer and layer in factors:
            adapted, factor = cast(Any, model.get_submodule(layer)), factors[layer]
            added = adapted.scaling[ADAPTER] * (factor["B"] @ factor["A"])
            # GPT-2's layers keep their weight as (in, out).
            weight = weight + (added.T if adapted.fan_in_fan_out else added)
        yield plain, weight
