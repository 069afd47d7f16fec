"""A stand-in for torch's `varlen_attn`, which runs on GPUs only, written after its documentation."""

import torch
import torch.nn.functional as F

from ram.models import by_length


def varlen_attn(
    q, k, v, q_ends, k_ends, longest_q, longest_k, *, scale=None, window_size, enable_gqa, seqused_k=None
):
    """Attention of each segment's queries to its first `seqused_k` keys, aligned at the end."""
    assert window_size == (-1, 0) and q_ends.dtype == k_ends.dtype == torch.int32
    assert enable_gqa == (q.shape[1] != k.shape[1])
    counts = (k_ends[1:] - k_ends[:-1] if seqused_k is None else seqused_k).tolist()
    assert max(counts) <= longest_k and int((q_ends[1:] - q_ends[:-1]).max()) <= longest_q
    outputs = []
    for i, count in enumerate(counts):
        start = int(k_ends[i])
        assert count > 0 and start + count <= len(k), "the kernel would read beyond the tensor"
        own = q[q_ends[i] : q_ends[i + 1]].transpose(0, 1)
        keys, values = (states[start : start + count].transpose(0, 1) for states in (k, v))
        mask = torch.ones(own.shape[1], count, dtype=torch.bool, device=q.device).tril(count - own.shape[1])
        output = F.scaled_dot_product_attention(
            own[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output[0])
    return torch.cat(outputs, dim=1).transpose(0, 1)


def pretend(monkeypatch):
    """Let decoding attend by lengths on the CPU; return the list of numbers of queries per row, by call."""
    calls = []

    def counted(*args, **settings):
        calls.append(args[5])
        return varlen_attn(*args, **settings)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(by_length, "is_usable", lambda *sizes: True)
    return calls
