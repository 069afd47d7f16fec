"""Log-probabilities of answers under a model: a packed forward pass, and padded ones as its reference.

The packed pass has no padding, computes every prompt once for both of its answers, and never holds all logits
at once. The linear layers see one row of T tokens. Attention runs segment by segment, so nothing is computed
only to be masked.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ram.data.tokenization import TokenizedDataset
from ram.distributed import processes
from ram.models.abilities import text_config
from ram.training.losses import IGNORE_INDEX, head_logps, sequence_logps
from ram.training.packing import Segments, collate, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ram.training.frozen import FrozenProposal

ATTENTION = "packed"  # name under which transformers knows `attention`
ROUTER_LOSS = "router_loss"
# Configuration keys of models whose logits are more than a linear function of the last hidden state.
NONLINEAR = ("final_logit_softcapping", "logit_scale", "logits_scaling")
BLOCK = 128  # tokens; examples below this size are cheaper in one masked call than in one call per segment

# Per answer name: sums of log-probabilities (B,), and the number of tokens in each sum (0 if left out).
Answers = tuple[dict[str, torch.Tensor], dict[str, list[int]]]


def has_linear_head(model: Any) -> bool:
    """Return whether the logits are a linear function of the last hidden state."""
    config = text_config(model.config)
    is_nonlinear = any(getattr(config, key, None) not in (None, 1) for key in NONLINEAR)
    return type(model.get_output_embeddings()) is torch.nn.Linear and not is_nonlinear


# ---- attention ---------------------------------------------------------------------------------------------


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention inside the segments and to their prefixes.

    Args:
        query: (1, heads, T, D).
        key, value: (1, key heads, T, D). `heads` is a multiple of `key heads`.

    Returns:
        (1, heads, T, D).
    """
    assert query.shape[0] == 1 and query.shape[2] == sum(segments.lengths)
    assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape, "keys and values of two sizes"
    calls = _calls(segments, query.device, query.dtype)
    # `split` instead of slices: the backward pass of every slice fills a tensor of all T tokens.
    lengths = [length for length, _, _ in calls]
    queries = query.split(lengths, dim=2)
    keys = key.split(lengths, dim=2)
    values = value.split(lengths, dim=2)
    use_gqa = query.shape[1] != key.shape[1]
    outputs = []
    for i, (_, prefix, mask) in enumerate(calls):
        k, v = keys[i], values[i]
        if prefix:
            k = torch.cat([keys[i - 1][:, :, :prefix], k], dim=2)
            v = torch.cat([values[i - 1][:, :, :prefix], v], dim=2)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                mask,
                is_causal=mask is None,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=use_gqa,
            )
        )
    return torch.cat(outputs, dim=2)


@functools.lru_cache(maxsize=2)  # all layers of a forward pass use the same calls
def _calls(
    segments: Segments, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, int, torch.Tensor | None]]:
    """Plan the attention calls of `attend`, as (length, prefix, mask). No mask means causal attention.

    Segments of large examples have a call of their own. Small examples share a call with a mask, as long as
    they have at most BLOCK tokens together. Masks are 0 or -inf, to be added: torch makes that of a mask of
    booleans in every layer, and keeps each for the backward pass.
    """
    # A segment without a prefix starts a new example.
    examples: list[list[tuple[int, int]]] = []
    for length, prefix in zip(segments.lengths, segments.prefixes, strict=True):
        if not prefix:
            examples.append([])
        examples[-1].append((length, prefix))
    calls: list[tuple[int, int, torch.Tensor | None]] = []
    block: list[tuple[int, int]] = []  # segments of small examples that wait for their shared call

    def add_call(length: int, prefix: int, mask: np.ndarray | None) -> None:
        added = None
        if mask is not None:
            forbidden = torch.from_numpy(~mask).to(device)
            added = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(forbidden, float("-inf"))
        calls.append((length, prefix, added))

    def close_block() -> None:
        if block:
            size = sum(length for length, _ in block)
            add_call(size, 0, _block_mask(block) if len(block) > 1 else None)
            block.clear()

    for example in examples:
        size = sum(length for length, _ in example)
        if sum(length for length, _ in block) + size > BLOCK:
            close_block()
        if size <= BLOCK:
            block += example
            continue
        for length, prefix in example:
            # Token i of a segment sees its whole prefix and the segment's tokens up to i.
            add_call(length, prefix, np.tri(length, prefix + length, prefix, dtype=bool) if prefix else None)
    close_block()
    return calls


def _block_mask(block: list[tuple[int, int]]) -> np.ndarray:
    """Return the mask (tokens, tokens) of consecutive segments (length, prefix); true allows attention."""
    ends = np.cumsum([length for length, _ in block])
    mask = np.zeros((ends[-1], ends[-1]), dtype=bool)
    for i, (length, prefix) in enumerate(block):
        start = ends[i] - length
        mask[start : ends[i], start : ends[i]] = np.tri(length, dtype=bool)
        if prefix:
            previous = start - block[i - 1][0]
            mask[start : ends[i], previous : previous + prefix] = True
    return mask


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute `attend` in one call of the GPU kernel for 16-bit types.

    Keys and values of prefixes are gathered a second time, because the kernel needs the keys of each segment
    in a row.
    """
    from torch.nn.attention.varlen import varlen_attn

    index, query_ends, key_ends, longest_query, longest_key = _key_layout(segments, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    output = varlen_attn(
        q,
        k[index],
        v[index],
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale=scale,
        window_size=(-1, 0),  # causal, with queries and keys aligned at the end of each segment
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output.transpose(0, 1).unsqueeze(0)


@functools.lru_cache(maxsize=2)  # all layers of a forward pass use the same layout
def _key_layout(
    segments: Segments, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Lay out queries and keys for `varlen_attn`.

    Returns:
        The tokens that are the keys of all segments, end to end. The cumulative numbers of queries and of
        keys, int32 (segments + 1,). The largest number of queries and of keys of a segment.
    """
    lengths = np.array(segments.lengths)
    prefixes = np.array(segments.prefixes)
    starts = np.cumsum(lengths) - lengths
    spans = []
    for i, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        spans += [np.arange(prefix) + starts[i - 1], np.arange(length) + starts[i]]
    index = torch.from_numpy(np.concatenate(spans)).to(device)

    def cumulative(sizes: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.append(0, np.cumsum(sizes)).astype(np.int32)).to(device)

    key_lengths = lengths + prefixes
    return index, cumulative(lengths), cumulative(key_lengths), int(lengths.max()), int(key_lengths.max())


def runs_at_once(device: str, dtype: torch.dtype, head_size: int, dropout: float) -> bool:
    """Return whether `attend_at_once` has a kernel for tensors of this kind; it pads no heads."""
    has_type = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return has_type and not dropout and head_size % 8 == 0 and head_size <= 256


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers. Without `segments` it equals transformers' "sdpa"."""
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if runs_at_once(device, query.dtype, query.shape[-1], dropout):
        output = attend_at_once(query, key, value, segments, scaling)
    else:
        output = attend(query, key, value, segments, scaling, dropout)
    return output.transpose(1, 2).contiguous(), None


def use_packed(model: "PreTrainedModel") -> None:
    """Replace a model's attention by that of `packed_logps`; without segments it computes as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # Lengths differ from batch to batch, so a compiled copy would be used only once.
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


# ---- forward passes ----------------------------------------------------------------------------------------


def packed_logps(
    model: Any,
    data: TokenizedDataset,
    rows: Sequence[int] | np.ndarray,
    answers: Sequence[str],
    pad_id: int,
    drawn: Sequence[bool] | np.ndarray | None = None,
    proposal: "FrozenProposal | None" = None,
) -> Answers:
    """Sum the log-probabilities of the answers' tokens, from one forward pass over all examples.

    Args:
        model: A model that `use_packed` prepared.
        answers: ("target",) or ("target", "negative").
        pad_id: Unused; `padded_logps` needs it.
        drawn: (B,) whether each example's negative is computed; None computes all.
        proposal: Its logits are added to `exponent` times the model's; only for `answers` ("target",).
    """
    batch = pack(data, rows, answers, drawn).to(model.device)
    # transformers leaves a mask of four dimensions alone, so this keeps it from making one of (T, T).
    no_mask = batch.input_ids.new_empty(1, 1, 0, 0)
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=no_mask,
        use_cache=False,
        segments=batch.segments,
    ).last_hidden_state
    head = model.get_output_embeddings()
    weight, bias, added = head.weight, head.bias, None
    if proposal is not None:
        assert tuple(answers) == ("target",)
        weight, bias = weight[: proposal.vocab_size], None if bias is None else bias[: proposal.vocab_size]
        added = proposal.added(data, rows)
        hidden, bias = hidden * proposal.exponent, None if bias is None else bias * proposal.exponent
    logps = head_logps(hidden[0, batch.predictors], weight, batch.labels, bias, added=added)
    sizes = [size for counts in batch.counts.values() for size in counts]
    sums = torch.stack([part.sum() for part in logps.split(sizes)])
    assert len(sums) == len(answers) * len(rows)
    return dict(zip(answers, sums.chunk(len(answers)), strict=True)), batch.counts


def padded_logps(
    model: Any,
    data: TokenizedDataset,
    rows: Sequence[int] | np.ndarray,
    answers: Sequence[str],
    pad_id: int,
    drawn: Sequence[bool] | np.ndarray | None = None,
    masked: bool = True,
    proposal: "FrozenProposal | None" = None,
) -> Answers:
    """Compute the same as `packed_logps` from a padded forward pass per answer, with all its logits.

    This is the reference, and the fallback for models that cannot be packed.

    Args:
        masked: Whether the model gets a mask of the padding; a single row needs none.

    Returns:
        As `packed_logps`. In training, the sums of a mixture of experts that asks for it also have its
        ROUTER_LOSS (B,), with its factor.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, list[int]] = {}
    router_losses: list[torch.Tensor] = []
    for answer in answers:
        if answer == "target" or drawn is None:
            computed = np.ones(len(rows), dtype=bool)
        else:
            computed = np.asarray(drawn)
        left_out = not computed.any() and processes.count() > 1
        if left_out:
            # Other processes may have drawn some, and a sharded model is gathered by all of them together.
            computed = np.arange(len(rows)) == 0
        sizes = np.zeros(len(rows), dtype=int)
        answer_sums = torch.zeros(len(rows), device=model.device)
        if computed.any():
            batch = collate(data, np.asarray(rows)[computed], answer, pad_id)
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            labels = batch.pop("labels")
            if not masked:
                del batch["attention_mask"]
            output = model(**batch, use_cache=False)
            logits = output.logits if proposal is None else proposal.add_to(output.logits, labels, data, rows)
            logps = sequence_logps(logits, labels)
            if model.training and asks_for_router_loss(model) and output.aux_loss is not None:
                router_losses.append(output.aux_loss * text_config(model.config).router_aux_loss_coef)
            mask = torch.from_numpy(computed).to(model.device)
            answer_sums = answer_sums.to(logps.dtype).masked_scatter(mask, logps)
            sizes[computed] = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
            if left_out:
                answer_sums, sizes = answer_sums * 0.0, sizes * 0
        sums[answer] = answer_sums
        counts[answer] = sizes.tolist()
    if router_losses:
        sums[ROUTER_LOSS] = torch.stack(router_losses).mean().expand(len(rows))
    return sums, counts


def asks_for_router_loss(model: Any) -> bool:
    """Return whether a mixture of experts asks for a loss that balances them in its own configuration."""
    config = text_config(model.config)
    asks = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0)
    return bool(asks)


def alone_logps(
    model: Any,
    data: TokenizedDataset,
    rows: Sequence[int] | np.ndarray,
    answers: Sequence[str],
    pad_id: int,
    drawn: Sequence[bool] | np.ndarray | None = None,
    proposal: "FrozenProposal | None" = None,
) -> Answers:
    """Compute the same as `padded_logps` from a forward pass per row, for models that padding changes."""
    negatives = [None if drawn is None else [drawn[index]] for index in range(len(rows))]
    parts = [
        padded_logps(model, data, [row], answers, pad_id, own, False, proposal)
        for row, own in zip(rows, negatives, strict=True)
    ]
    sums = {key: torch.cat([own[key] for own, _ in parts]) for key in parts[0][0]}
    return sums, {answer: [size for _, own in parts for size in own[answer]] for answer in answers}
