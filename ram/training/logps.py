"""Log-probabilities of answers under a model: one packed forward pass, and the padded ones it must equal.

Packed: no padding, every prompt once for both of its answers, no tensor of logits. The linear layers see one
row of T tokens; attention goes segment by segment, so that nothing is computed only to be masked.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ram.data.tokenization import TokenizedDataset
from ram.training.losses import IGNORE_INDEX, head_logps, sequence_logps
from ram.training.packing import Segments, collate, pack

ATTENTION = "packed"  # its name in transformers
# Configuration keys of models whose logits are more than a linear function of the last hidden state, and of
# those whose attention does not reach back to the first token.
BENT = ("final_logit_softcapping", "logit_scale", "logits_scaling")
WINDOWS = ("sliding_window", "attention_chunk_size")
BLOCK = 128  # tokens; below it a masked call is cheaper than one call per segment

# answer -> (B,) sums over its tokens, and answer -> number of tokens in each sum; 0 where it is left out
Answers = tuple[dict[str, torch.Tensor], dict[str, list[int]]]


# ---- attention ---------------------------------------------------------------------------------------------


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention inside the segments and to their prefixes. (1, heads, T, D)

    query: (1, heads, T, D). key, value: (1, key heads, T, D); heads is a multiple of key heads.
    """
    calls = _calls(segments, query.device)
    # split, not slices: the backward pass of a slice fills a tensor of all T tokens, that of a split none
    lengths = [length for length, _, _ in calls]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    options = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    found = []
    for i, (_, prefix, mask) in enumerate(calls):
        k, v = keys[i], values[i]
        if prefix:
            k, v = (torch.cat([part[i - 1][:, :, :prefix], part[i]], dim=2) for part in (keys, values))
        found.append(
            F.scaled_dot_product_attention(queries[i], k, v, mask, is_causal=mask is None, **options)
        )
    return torch.cat(found, dim=2)


@functools.lru_cache(maxsize=2)  # the same for all layers of a forward pass
def _calls(segments: Segments, device: torch.device) -> list[tuple[int, int, torch.Tensor | None]]:
    """How `attend` goes about it: (length, prefix, mask) of each call; no mask means a causal one.

    A long segment has a call of its own; examples of up to BLOCK tokens together share one under a mask.
    """
    examples: list[list[tuple[int, int]]] = []  # the segments of each
    for length, prefix in zip(segments.lengths, segments.prefixes, strict=True):
        if not prefix:
            examples.append([])
        examples[-1].append((length, prefix))
    calls, block = [], []

    def add(length: int, prefix: int, mask: np.ndarray | None) -> None:
        calls.append((length, prefix, None if mask is None else torch.from_numpy(mask).to(device)))

    for example in [*examples, None]:
        size = sum(length for length, _ in example or ())
        held = sum(length for length, _ in block)
        if block and (example is None or held + size > BLOCK):
            add(held, 0, _block_mask(block) if len(block) > 1 else None)
            block = []
        if size <= BLOCK:
            block += example or ()
            continue
        for length, prefix in example:
            add(length, prefix, np.tri(length, prefix + length, prefix, dtype=bool) if prefix else None)
    return calls


def _block_mask(block: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens of some segments (length, prefix) see which, true where they do."""
    ends = np.cumsum([length for length, _ in block])
    mask = np.zeros((ends[-1], ends[-1]), dtype=bool)
    for i, (length, prefix) in enumerate(block):
        start = ends[i] - length
        mask[start : ends[i], start : ends[i]] = np.tri(length, dtype=bool)
        if prefix:
            before = start - block[i - 1][0]
            mask[start : ends[i], before : before + prefix] = True
    return mask


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None = None,
) -> torch.Tensor:
    """`attend` in one call of a GPU's kernel for 16-bit types. Prefixes are gathered, not computed again."""
    from torch.nn.attention.varlen import varlen_attn

    index, query_ends, key_ends, longest = _key_layout(segments, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    gqa = q.shape[1] != k.shape[1]
    # window (-1, 0): causal, aligned at the segments' ends
    options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": gqa}
    found = varlen_attn(q, k[index], v[index], query_ends, key_ends, *longest, **options)
    return found.transpose(0, 1).unsqueeze(0)


@functools.lru_cache(maxsize=2)  # the same for all layers of a forward pass
def _key_layout(segments: Segments, device: torch.device):
    """Which tokens are the segments' keys, end to end; where they end in queries and keys; the longest."""
    lengths, prefixes = np.array(segments.lengths), np.array(segments.prefixes)
    starts = np.cumsum(lengths) - lengths
    spans = []
    for i, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        spans += [np.arange(prefix) + starts[i - 1], np.arange(length) + starts[i]]
    index = torch.from_numpy(np.concatenate(spans)).to(device)
    ends = [
        torch.from_numpy(np.append(0, np.cumsum(sizes)).astype(np.int32)).to(device)
        for sizes in (lengths, lengths + prefixes)
    ]
    return index, *ends, (int(lengths.max()), int((lengths + prefixes).max()))


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, segments=None, **kwargs):
    """What every layer of transformers calls: by segments where it gets some, else as "sdpa" does."""
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if device == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        found = attend_at_once(query, key, value, segments, scaling)
    else:
        found = attend(query, key, value, segments, scaling, dropout)
    return found.transpose(1, 2).contiguous(), None


# ---- forward passes ----------------------------------------------------------------------------------------


def packed_logps(
    model,
    data: TokenizedDataset,
    rows: Sequence[int],
    answers: Sequence[str],
    pad_id: int,
    drawn: Sequence[bool] | None = None,
) -> Answers:
    """Sums of the log-probabilities of the answers' tokens, from one forward pass over all of them.

    model: one that `prepare` accepted. drawn: (B,) whose "negative" is computed; None = all. pad_id: only for
    the reference below.
    """
    batch = pack(data, rows, answers, drawn).to(model.device)
    no_mask = batch.input_ids.new_empty(1, 1, 0, 0)  # transformers makes none where it gets four dimensions
    hidden = model.base_model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=no_mask,
        use_cache=False,
        segments=batch.segments,
    ).last_hidden_state
    head = model.get_output_embeddings()
    found = head_logps(hidden[0, batch.predictors], head.weight, batch.labels, head.bias)
    sizes = [size for counts in batch.counts.values() for size in counts]
    sums = torch.stack([part.sum() for part in found.split(sizes)])
    return dict(zip(answers, sums.chunk(len(answers)), strict=True)), batch.counts


def padded_logps(
    model,
    data: TokenizedDataset,
    rows: Sequence[int],
    answers: Sequence[str],
    pad_id: int,
    drawn: Sequence[bool] | None = None,
) -> Answers:
    """The reference: what `packed_logps` gives, from a padded forward pass and all its logits per answer."""
    sums, counts = {}, {}
    for answer in answers:
        kept = np.ones(len(rows), dtype=bool) if answer == "target" or drawn is None else np.asarray(drawn)
        size, found = np.zeros(len(rows), dtype=int), torch.zeros(len(rows), device=model.device)
        if kept.any():
            batch = collate(data, np.asarray(rows)[kept], answer, pad_id)
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            labels = batch.pop("labels")
            logps = sequence_logps(model(**batch, use_cache=False).logits, labels)
            found = found.to(logps.dtype).masked_scatter(torch.from_numpy(kept).to(model.device), logps)
            size[kept] = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1).tolist()
        sums[answer], counts[answer] = found, size.tolist()
    return sums, counts


def prepare(
    model, longest: int, autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
) -> str | None:
    """Makes `packed_logps` work on the model, or says why it cannot and leaves the model as it was.

    longest: tokens of prompt and answer. Whatever the configuration does not tell shows when both ways are
    run on a few tokens, under the autocast of training.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config, head = model.config, model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or any(getattr(config, key, None) not in (None, 1) for key in BENT):
        return "its logits are no linear function of its last hidden state"
    if any((getattr(config, key, None) or longest) < longest for key in WINDOWS):
        return f"its attention does not reach over max_length={longest} tokens"
    if not model.is_backend_compatible():
        return "its attention cannot be replaced"
    # Lengths differ from batch to batch: a compiled copy would serve for one.
    AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before, training = config._attn_implementation, model.training
    model.set_attn_implementation(ATTENTION)
    model.eval()
    try:
        with torch.no_grad(), autocast():
            reason = _difference(model)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"its packed forward pass fails ({str(error).strip().splitlines()[0][:100]})"
    model.train(training)
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def _difference(model) -> str | None:
    """How the packed forward pass differs from the padded ones on two short examples; None if it agrees."""
    sizes = {"prompt": (3, 6), "target": (4, 2), "negative": (2, 5)}
    rng = np.random.default_rng(0)
    data = TokenizedDataset(
        {name: rng.integers(model.config.vocab_size, size=sum(size)) for name, size in sizes.items()},
        {name: np.cumsum([0, *size]) for name, size in sizes.items()},
        {},
    )
    packed, padded = (
        torch.cat(list(way(model, data, [0, 1], ("target", "negative"), 0)[0].values()))
        for way in (packed_logps, padded_logps)
    )
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    if torch.allclose(packed, padded, rtol=1e-4 if exact else 5e-2):
        return None
    return f"a packed forward pass gives it {packed.tolist()} instead of {padded.tolist()}"
