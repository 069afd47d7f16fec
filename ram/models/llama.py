"""A forward of Llama-like models with few Python calls per layer. It re-points the model's parameters.

`joined` concatenates weights that read the same input (query, key and value; gate and up) and turns the
parameters into views of the result. No copy is kept: the model trains, saves and moves between devices as
before.

Shapes: N tokens of all rows, H heads, K key-value heads, D head size, E hidden size, V vocabulary; R rows of
T tokens that see S places.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ram.models import by_length

LLAMA_KIN = {"llama", "mistral", "qwen2", "qwen3"}  # one decoder layer, except for biases and norms of heads
STEADY_ROPE = {"default", "linear", "llama3", "yarn"}  # angles that depend on the position alone
Weights = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias of a linear layer
Attend = Callable[[int, torch.Tensor], torch.Tensor]


def is_plain_llama(model: Any) -> bool:
    """Return whether `LlamaForward` computes this model: the family's own classes, unchanged."""
    config = model.config
    name = config.model_type
    if name not in LLAMA_KIN or type(model).__module__ != f"transformers.models.{name}.modeling_{name}":
        return False
    parts, weights = list(model.modules()), list(model.parameters())
    linears = [part for layer in model.model.layers for part in layer.modules() if _has_matrix(part)]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return (
        not (hooked or model.training)
        and rope in STEADY_ROPE
        and config.hidden_act == "silu"
        and len(linears) == 7 * len(model.model.layers)
        and all(type(part) is nn.Linear for part in [*linears, model.lm_head])
        and all(type(weight) is nn.Parameter for weight in weights)
        and len({(weight.dtype, weight.device) for weight in weights}) == 1
    )


def _has_matrix(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return weight is not None and weight.dim() == 2


class LlamaForward:
    """Pre-norm layers of rotary attention and a gated MLP (Llama: arXiv 2302.13971, section 2.2).

    It works on a flat list of tokens; the caller stores keys and values and computes attention.

    Args:
        columns: positions for which rotary angles are tabulated.
        vocab_size: logits beyond it are cut off.
        unused: ids below it whose logits are -inf.
    """

    def __init__(self, model: Any, columns: int, vocab_size: int, unused: Sequence[int] = ()) -> None:
        config, base = model.config, model.model
        self.columns, self.vocab_size = columns, vocab_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = base.layers[0].self_attn.head_dim
        # GPUs compute grouped queries with a mask by their slowest kernel.
        self.folds = self.heads > self.kv_heads and model.device.type != "cpu"
        sizes = self.heads, self.kv_heads, self.head_size
        self.by_length = by_length.is_usable(model.device, model.dtype, *sizes)
        self.eps, self.hidden = config.rms_norm_eps, (config.hidden_size,)
        self.embedding, self.norm = base.embed_tokens.weight, base.norm.weight
        head_bias = model.lm_head.bias
        head_bias = None if head_bias is None else head_bias[:vocab_size]
        if unused:
            bias = self.embedding.new_zeros(vocab_size) if head_bias is None else head_bias.clone()
            head_bias = bias.index_fill(0, torch.tensor(unused, device=bias.device), float("-inf"))
        self.head = model.lm_head.weight[:vocab_size], head_bias
        self.layers = [self._layer(layer) for layer in base.layers]
        positions = torch.arange(columns, device=model.device).unsqueeze(0)
        cos, sin = (table[0].unsqueeze(1) for table in base.rotary_emb(self.embedding[:1], positions))
        # (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin): the minus sign goes into the table.
        half = self.head_size // 2
        self.cos, self.sin = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        # Models of equal kind can share a forward: every size and setting is equal, only the weights differ.
        tensors = [value for layer in self.layers for value in _flat(layer)]
        shapes = tuple(None if value is None else value.shape for value in (*tensors, *self.head))
        self.kind = (
            type(model),
            model.dtype,
            model.device,
            str(getattr(config, "rope_parameters", None)),
        ) + (self.embedding.shape, shapes, columns, self.head_size, self.heads, self.kv_heads, self.eps)

    def _layer(self, layer: Any) -> tuple:
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm.weight, attention.k_norm.weight
            head_norms = torch.stack([q] * self.heads + [k] * self.kv_heads)
        return (
            layer.input_layernorm.weight,
            joined(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms,
            (attention.o_proj.weight, attention.o_proj.bias),
            layer.post_attention_layernorm.weight,
            joined(mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def __call__(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        attend: Attend,
        select: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return logits (N, V) of N tokens, or (M, V) of those that `select` keeps.

        Args:
            ids, places: (N,) token ids and their positions.
            attend: (layer, queries, keys and values of the new tokens (N, H + 2 K, D)) -> the attention's
                output (N, H * D); it must store the keys and values.
            select: hidden states (N, E) -> (M, E).
        """
        half, rotated = self.head_size // 2, self.heads + self.kv_heads
        x = self.embed(ids)
        positions = places.clamp(max=self.columns - 1)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer, (before, qkv, head_norms, output, between, gates, down) in enumerate(self.layers):
            states = self.linear(self.normed(x, before), qkv).view(len(x), -1, self.head_size)
            qk = rotary = states[:, :rotated]
            if head_norms is not None:
                qk = F.rms_norm(qk, (self.head_size,), None, self.eps) * head_norms
            swapped = torch.cat([qk[..., half:], qk[..., :half]], dim=-1)
            torch.addcmul(qk * cos, swapped, sin, out=rotary)
            x = self.add_linear(x, attend(layer, states), output)
            gate, up = self.linear(self.normed(x, between), gates).chunk(2, dim=-1)
            x = self.add_linear(x, F.silu(gate).mul_(up), down)
        return self.logits(x if select is None else select(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.normed(x, self.norm), self.head)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embedding)

    def normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.hidden, gain, self.eps)

    def linear(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        return linear(x, *weights)

    def add_linear(self, x: torch.Tensor, y: torch.Tensor, weights: Weights) -> torch.Tensor:
        return add_linear(x, y, *weights)

    def attention(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Attention of R rows: queries (R, T, H, D), keys and values (R, S, K, D) -> (R * T, H * D)."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        group, count = self.heads // self.kv_heads, queries.shape[1]
        if self.folds:
            # (R, K, H / K * T, D): the heads that share a key-value head become more queries of it.
            queries = queries.unflatten(2, (self.kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
            output = output.unflatten(2, (group, count)).permute(0, 3, 1, 2, 4)
        else:
            output = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, attn_mask=bias, enable_gqa=group > 1
            ).transpose(1, 2)
        return output.reshape(-1, self.heads * self.head_size)

    def bias(self, mask: torch.Tensor) -> torch.Tensor:
        """The additive attention bias of a bool mask (..., T, S): 0 if visible, -inf if not."""
        if self.folds and mask.shape[-2] > 1:
            mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)
        return torch.zeros_like(mask, dtype=self.embedding.dtype).masked_fill_(~mask, float("-inf"))


class JointForward(LlamaForward):
    """One forward of several models of one shape, each for a part of the tokens.

    Only products with weights are computed model by model.

    Args:
        counts: tokens of each model, in the order of the members.
        selected: tokens of each model whose logits `select` keeps; `counts` by default.
    """

    def __init__(
        self, members: Sequence[LlamaForward], counts: Sequence[int], selected: Sequence[int] | None = None
    ) -> None:
        self.counts, self.selected = list(counts), list(selected or counts)
        shared = "columns heads kv_heads head_size folds by_length eps hidden cos sin embedding"
        for name in shared.split():
            setattr(self, name, getattr(members[0], name))
        self.embeddings = [member.embedding for member in members]
        self.heads_out = [member.head for member in members]
        self.norm = self._per_token([member.norm for member in members], self.selected)
        self.layers = []
        for layers in zip(*(member.layers for member in members), strict=True):
            before, qkv, head_norms, output, between, gates, down = zip(*layers, strict=True)
            spread = None if head_norms[0] is None else self._per_token(head_norms, self.counts)
            before, between = (self._per_token(gains, self.counts) for gains in (before, between))
            self.layers.append((before, qkv, spread, output, between, gates, down))

    @staticmethod
    def _per_token(gains: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
        """(N, ...) the gain of each token's model."""
        return torch.cat([gain.expand(n, *gain.shape) for gain, n in zip(gains, counts, strict=True)])

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.normed(x, self.norm).split(self.selected)
        return torch.cat([linear(part, *head) for part, head in zip(parts, self.heads_out, strict=True)])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = zip(ids.split(self.counts), self.embeddings, strict=True)
        return torch.cat([F.embedding(part, weight) for part, weight in pairs])

    def normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.hidden, None, self.eps) * gain

    def linear(self, x: torch.Tensor, weights: Any) -> torch.Tensor:
        pairs = zip(x.split(self.counts), weights, strict=True)
        return torch.cat([linear(part, *pair) for part, pair in pairs])

    def add_linear(self, x: torch.Tensor, y: torch.Tensor, weights: Any) -> torch.Tensor:
        parts = zip(x.split(self.counts), y.split(self.counts), weights, strict=True)
        return torch.cat([add_linear(x_part, y_part, *pair) for x_part, y_part, pair in parts])


def _flat(values: Any) -> Iterator[torch.Tensor | None]:
    for value in values:
        yield from _flat(value) if isinstance(value, tuple) else (value,)


# ---- linear layers -----------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of (N, in) and (out, in)."""
    if _uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_linear(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x + linear(y), of (N, out) and (N, in)."""
    if _uses_onednn(y, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(y, x, weight, bias, "add")
    return torch.addmm(x, y, weight.t()) if bias is None else x + F.linear(y, weight, bias)


def _uses_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN computes a product.

    For float32 on a CPU torch calls MKL, which takes twice as long on processors of other makers than Intel
    but starts faster; above this size oneDNN wins. torch has no public function that selects oneDNN for a
    plain weight: these two functions are the only users of the private one, and
    tests/models/test_llama.py fails if it changes.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.shape[0] * weight.numel() > 1_500_000 and torch.backends.mkldnn.is_available()


# ---- weights that read the same input ----------------------------------------------------------------------


def joined(*linears: nn.Linear) -> Weights:
    """Return one weight and bias for layers of the same input; their parameters become views of them."""
    biases = [layer.bias for layer in linears if layer.bias is not None]
    assert len(biases) in (0, len(linears)), "either all layers have a bias or none has"
    return _join([layer.weight for layer in linears]), _join(biases) if biases else None


def _join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    first = parts[0]
    # An earlier call may have joined them: then each part begins where the one before it ends.
    address, adjacent = first.data_ptr(), True
    for part in parts:
        same_storage = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent &= same_storage and part.data_ptr() == address and part.is_contiguous()
        address += part.numel() * part.element_size()
    if not adjacent:
        # Parameters made in inference mode must stay inference tensors, and the others ordinary ones.
        with torch.inference_mode(first.is_inference()), torch.no_grad():
            whole, start = torch.cat([part.detach() for part in parts]), 0
            for part in parts:
                part.data = whole[start : start + len(part)]
                start += len(part)
    rows = sum(len(part) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
