"""FSDP2 around an unmodified model: its blocks are sharded from outside, whole weights come back for export.

Zhao et al. 2023 (arXiv 2304.11277) describe the method; torch's `fully_shard` is what does it.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ram.distributed import processes
from ram.errors import UserError

FORWARD = "answer_logps"  # the method that runs inside the root's forward hooks


def shard(
    model: nn.Module,
    block_name: str | None,
    device: torch.device,
    compute_dtype: torch.dtype | None,
    forward: Callable,
    offload: bool = False,
) -> None:
    """Spreads a model's weights over all processes and gives it the method FORWARD = `forward(model, ...)`.

    block_name: class of the repeated block; each is gathered when its turn comes. compute_dtype: of the
    gathered weights (gradients are summed in float32); None = as stored. offload: shards wait in the host's
    memory. The LM head belongs to the root, so what needs it must run inside FORWARD. Raises UserError where
    no layer is of that class.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    blocks = [part for part in model.modules() if type(part).__name__ == block_name]
    if not blocks:
        kinds = Counter(type(part).__name__ for part in model.modules())
        likely = [name for name, times in kinds.items() if times > 1 and name.endswith(("Layer", "Block"))]
        raise UserError(
            f"model.block_name={block_name!r}: no part of {type(model).__name__} is of this class; expected "
            f"its repeated block ({', '.join(likely) or 'none found'})"
        )
    options = {
        "mesh": init_device_mesh(device.type, (processes.count(),)),
        "mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
    }
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy()
    for block in blocks:
        fsdp.fully_shard(block, **options)
    fsdp.fully_shard(model, **options)

    def answer_logps(*args):
        sums, counts = forward(model, *args)
        return {answer: values.clone() for answer, values in sums.items()}, counts  # FSDP hooks no views

    setattr(model, FORWARD, answer_logps)
    fsdp.register_fsdp_forward_method(model, FORWARD)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights on the first process's CPU, one after the other; nothing on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
