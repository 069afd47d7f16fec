"""The forward pass that a model may use in training, and parts of it that make a loss depend on chance.

The fastest pass that is right for all models of a run is taken; a model that has none, or could not decode,
is refused before it is trained.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.errors import UserError
from ram.log import log, pick_device, pick_dtype
from ram.models.abilities import (
    ALONE,
    SIZES,
    Truth,
    check_decodable,
    distance,
    fall_back,
    objection,
    text_config,
    window,
)
from ram.models.vocabulary import check_ids
from ram.training.logps import (
    Answers,
    alone_logps,
    asks_for_router_loss,
    attend,
    attend_at_once,
    has_linear_head,
    packed_logps,
    padded_logps,
    use_packed,
)
from ram.training.packing import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASSES: list[tuple[str, Callable[..., Answers]]] = [
    ("packed training", packed_logps),
    ("padded training", padded_logps),
    (ALONE, alone_logps),
]


def prepare(
    model: "PreTrainedModel", reference: "PreTrainedModel | None", settings: Any
) -> Callable[..., Answers]:
    """Settle a model's dropout; return the fastest forward pass that is right for it and for its reference.

    Args:
        settings: has dropout, max_length and packed.

    Raises:
        UserError: see `pick`.
    """
    settle_dropout(model, keep=settings.dropout == "config")
    if asks_for_router_loss(model):
        log.info("the router loss of the model's configuration is added; it depends on the micro-batches")
    models = [model] if reference is None else [model, reference]
    forward = pick(models, settings.max_length, settings.packed)
    if forward is alone_logps and processes.count() > 1:
        raise UserError(f"{type(model).__name__} trains row by row, which needs one process; set NPROC=1")
    return forward


def check_device(settings: Any) -> None:
    """Raise UserError if this process's GPU cannot train a run as its settings say; call it before loading.

    Args:
        settings: has model.fsdp_policy_mp, packed and dropout.
    """
    device = pick_device()
    dtype = pick_dtype(settings.model.fsdp_policy_mp or "float32", device)
    if device.type != "cuda" or dtype == torch.float32:
        return
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"model.fsdp_policy_mp={settings.model.fsdp_policy_mp}: this GPU only emulates bfloat16, slowly; "
            "set it to auto, which takes float32 here"
        )
    if settings.packed and (reason := kernel_fault(device, dtype)) is not None:
        raise UserError(
            f"the attention kernel of packed training fails on this GPU ({reason}): set packed=false, or "
            "model.fsdp_policy_mp=float32"
        )


def kernel_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run the packed pass's one-call attention on a few tokens; return what is wrong with it, or None."""
    segments = Segments(lengths=(9, 5, 4), prefixes=(0, 6, 0))
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 18, 64), (2, 18, 64), (2, 18, 64)  # two query heads share the keys of one head
    inputs = [torch.randn(1, *shape, generator=generator).to(device, dtype) for shape in shapes]
    try:
        results = []
        for attention in (attend, attend_at_once):
            query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
            output = attention(query, key, value, segments)
            gradients = torch.autograd.grad(output.float().square().sum(), [query, key, value])
            results.append([output.detach(), *gradients])
    except (RuntimeError, ImportError, NotImplementedError) as error:
        return str(error).strip().split("\n")[0]
    worst = max((one - other).abs().max().item() for one, other in zip(*results, strict=True))
    return None if worst < 0.5 else f"it is wrong by {worst:.2g}"  # outputs are below 4, gradients below 40


def check_labels(model: "PreTrainedModel", *datasets: TokenizedDataset) -> None:
    """Raise UserError if data have token ids beyond a model's rows; the packed pass would take 0 for them."""
    used = [int(ids.max()) for data in datasets for ids in data.ids.values() if len(ids)]
    check_ids(used, text_config(model.config).vocab_size, type(model).__name__, "the training data")


def pick(models: Sequence["PreTrainedModel"], longest: int, packed: bool = True) -> Callable[..., Answers]:
    """Return the fastest forward pass that is right for all models, and make it work on them.

    Args:
        longest: Largest number of tokens of a prompt and its answer.
        packed: Whether the packed forward pass may be used.

    Raises:
        UserError: If no forward pass is right, or a model could not decode.
    """
    for model in models:
        check_decodable(model, longest)
    for (name, forward), (instead, _) in itertools.pairwise(PASSES):
        if forward is packed_logps and not packed:
            continue
        found = [(model, objection_to(forward, model, longest)) for model in models]
        wrong = next(((model, reason) for model, reason in found if reason is not None), None)
        if wrong is None:
            for model in models if forward is packed_logps else ():
                use_packed(model)
            return forward
        fall_back(wrong[0], name, instead, wrong[1])
    for model in models:
        if (reason := objection_to(alone_logps, model, longest)) is not None:
            raise UserError(f"{type(model).__name__} cannot be trained: {reason}; choose another model")
    return alone_logps


def objection_to(forward: Callable[..., Answers], model: "PreTrainedModel", longest: int) -> str | None:
    """Return why a forward pass is wrong for a model, or None if it is right."""
    name = next(name for name, other in PASSES if other is forward)
    if forward is packed_logps and (reason := _packed_refusal(model, longest)):
        return reason
    return objection(model, name, PROBES[forward], longest)


def _packed_refusal(model: "PreTrainedModel", longest: int) -> str | None:
    """Return the declarations of a model that rule the packed forward pass out."""
    config = text_config(model.config)
    if not has_linear_head(model):
        return "its logits are not a linear function of its last hidden state"
    if window(config, longest) is not None:
        return f"its attention does not reach over max_length={longest} tokens"
    if asks_for_router_loss(model):
        return "its configuration asks for a router loss, which needs whole forward passes"
    return None if model.is_backend_compatible() else "its attention cannot be replaced"


def _difference(forward: Callable[..., Answers], model: Any, truth: Truth) -> float:
    """How far a forward pass is from the truth, in nats per answer, over ragged examples."""
    rows = [np.array(row) for row in truth.rows]
    parts: dict[str, list[np.ndarray]] = {"prompt": [], "target": [], "negative": []}
    expected: dict[str, list[torch.Tensor]] = {"target": [], "negative": []}
    for index, (row, logprobs) in enumerate(zip(rows, truth.logprobs, strict=True)):
        answer, start = ("target", "negative")[index % 2], SIZES["prompt"][index // 2]
        parts[answer].append(row[start:])
        if answer == "target":
            parts["prompt"].append(row[:start])
        labels = torch.from_numpy(row[start:]).unsqueeze(1)
        expected[answer].append(logprobs[start - 1 : -1].gather(1, labels).sum())
    ids = {part: np.concatenate(values) for part, values in parts.items()}
    offsets = {part: np.cumsum([0, *map(len, values)]) for part, values in parts.items()}
    data, worst, before = TokenizedDataset(ids, offsets, {}), 0.0, model.config._attn_implementation
    _silence(model)
    try:
        if forward is packed_logps:
            use_packed(model)
        for training in (False, True):  # some models compute something else in training
            model.train(training)
            sums, _ = forward(model, data, range(len(SIZES["prompt"])), ("target", "negative"), 0)
            for answer, values in expected.items():
                worst = max(worst, distance(sums[answer], torch.stack(values)))
    finally:
        model.eval().set_attn_implementation(before)
    return worst


PROBES = {forward: functools.partial(_difference, forward) for _, forward in PASSES}


# ---- chance ------------------------------------------------------------------------------------------------


def settle_dropout(model: "PreTrainedModel", keep: bool) -> None:
    """Turn a model's dropout and other noise of training off, or say what it does to the result.

    Args:
        keep: Whether the noise that the configuration asks for stays.
    """
    values = vars(text_config(model.config))
    found = {key: value for key, value in values.items() if _is_noise(key.removeprefix("router_"), value)}
    asked = ", ".join(f"{key}={value}" for key, value in found.items())
    if asked and keep:
        log.info(f"dropout=config: {asked}; micro-batches and processes change the result")
    elif asked:
        log.info(
            f"dropout is off in training (the model's configuration has {asked}; dropout=config keeps it)"
        )
    if not keep:
        _silence(model)


def _silence(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key in [key for key, value in vars(module).items() if _is_noise(key, value)]:
            setattr(module, key, 0.0)


def _is_noise(key: str, value: Any) -> bool:
    """Return whether a setting makes training's forward pass random; classifiers' have no effect here."""
    named = re.search(r"drop|^(input_)?jitter_noise$", key) and not re.search(r"classifier|summary", key)
    return bool(named) and isinstance(value, float) and value > 0
