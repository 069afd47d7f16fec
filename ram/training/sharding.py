"""FSDP2 for an unmodified model: shard its blocks from outside, and gather the whole weights for an export.

Method: Zhao et al. 2023 (arXiv 2304.11277). Implementation: torch's `fully_shard`.
"""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ram.distributed import processes
from ram.errors import UserError

if TYPE_CHECKING:
    from ram.training.logps import Answers

FORWARD = "answer_logps"  # name of the method that runs inside the root module's forward hooks


def shard(
    model: nn.Module,
    block_name: str | None,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    forward: Callable[..., "Answers"],
    offload: bool = False,
) -> None:
    """Shard a model's weights over all processes, and give it the method FORWARD = `forward(model, ...)`.

    The LM head belongs to the root module, so every computation that needs it must run inside FORWARD.

    Args:
        block_name: Class name of the repeated block. A block's weights are gathered when it runs.
        compute_dtype: Dtype of the gathered weights; None keeps the stored dtype. Gradients are summed in
            float32.
        offload: Keep the shards in the host's memory.

    Raises:
        UserError: No module of the model has the class `block_name`.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    blocks = [module for module in model.modules() if type(module).__name__ == block_name]
    if not blocks:
        counts = Counter(type(module).__name__ for module in model.modules())
        likely = [name for name, count in counts.items() if count > 1 and name.endswith(("Layer", "Block"))]
        raise UserError(
            f"model.block_name={block_name!r}: no part of {type(model).__name__} is of this class; expected "
            f"the class of its repeated block ({', '.join(likely) or 'none found'})"
        )
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes.count(),)),
        "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
    }
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy()
    for block in blocks:
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options)

    def answer_logps(*args: Any) -> "Answers":
        sums, counts = forward(model, *args)
        # FSDP cannot hook views, so the sums are copied.
        return {answer: values.clone() for answer, values in sums.items()}, counts

    setattr(model, FORWARD, answer_logps)
    fsdp.register_fsdp_forward_method(model, FORWARD)


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to a total norm of at most `max_norm`. Return the norm before that."""
    from torch.distributed.tensor import DTensor  # takes most of a second

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def all_finite(model: nn.Module) -> bool:
    """Return whether all weights are finite, on all processes."""
    from torch.distributed.tensor import DTensor  # takes most of a second

    shards = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return not processes.any_rank(not all(bool(torch.isfinite(shard).all()) for shard in shards))


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Gather all weights on the first process's CPU, one by one. Other processes get an empty dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
