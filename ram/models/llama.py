"""Our forward of Llama and its kin: fewer Python calls per layer than transformers makes.

The parameters of query, key and value, and of gate and up, are re-pointed to views of one joined weight; no
copy is kept, and a model trains, saves and moves between devices as before.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

LLAMA_KIN = {"llama", "mistral", "qwen2", "qwen3"}  # one decoder layer, but for biases and norms of heads
STEADY_ROPE = {"default", "linear", "llama3", "yarn"}  # angles depend on the position alone


def is_plain_llama(model) -> bool:
    """Whether a model is one that `LlamaSlots` computes: the family's own classes, nothing put into them."""
    name, config = model.config.model_type, model.config
    if name not in LLAMA_KIN or type(model).__module__ != f"transformers.models.{name}.modeling_{name}":
        return False
    parts, weights = list(model.modules()), list(model.parameters())
    linears = [part for layer in model.model.layers for part in layer.modules() if _linear_like(part)]
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


def _linear_like(part: nn.Module) -> bool:
    return getattr(part, "weight", None) is not None and part.weight.dim() == 2


class LlamaForward:
    """Pre-norm layers of rotary attention and a gated MLP (Llama: arXiv 2302.13971, section 2.2), over a flat
    list of tokens; where keys and values lie is for the caller to say.

    Weights that read the same input are joined: query, key and value; gate and up.
    """

    def __init__(self, model, columns: int, vocab_size: int) -> None:
        config, base = model.config, model.model
        self.model, self.columns, self.vocab_size = model, columns, vocab_size
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = base.layers[0].self_attn.head_dim
        self.eps, self.hidden = config.rms_norm_eps, (config.hidden_size,)
        self.embedding, self.norm = base.embed_tokens.weight, base.norm.weight
        self.head = model.lm_head.weight[:vocab_size], _cut(model.lm_head.bias, vocab_size)
        self.layers = [self._layer(layer) for layer in base.layers]
        positions = torch.arange(columns, device=model.device).unsqueeze(0)
        cos, sin = (each[0].unsqueeze(1) for each in base.rotary_emb(self.embedding[:1], positions))
        # (x1, x2) turns into (x1 cos - x2 sin, x2 cos + x1 sin): the sign goes into the table.
        self.cos, self.sin = cos, torch.cat([-sin[..., : self.size // 2], sin[..., self.size // 2 :]], dim=-1)
        shapes = (*(weight.shape for weight in (self.embedding, self.head[0])), columns, len(self.layers))
        kind = (self.heads, self.kv_heads, self.eps, str(getattr(config, "rope_parameters", None)))
        # Models of equal kind can share a forward.
        self.kind = (type(model), model.dtype, model.device, *shapes, *kind, config.intermediate_size)

    def _layer(self, layer) -> tuple:
        attention, mlp = layer.self_attn, layer.mlp
        norms = None
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm.weight, attention.k_norm.weight
            norms = torch.stack([q] * self.heads + [k] * self.kv_heads)
        return (
            layer.input_layernorm.weight,
            joined(attention.q_proj, attention.k_proj, attention.v_proj),
            norms,
            (attention.o_proj.weight, attention.o_proj.bias),
            layer.post_attention_layernorm.weight,
            joined(mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj.weight, mlp.down_proj.bias),
        )

    def __call__(self, ids, places, attend, wanted=None) -> torch.Tensor:
        """Logits (N, V) of N tokens, or (M, V) of those that are wanted.

        ids, places: (N,). attend: (layer, queries, keys and values of the new tokens (N, H + 2 KV, D)) ->
        what the queries hear (N, H * D). wanted: hidden states (N, hidden) -> (M, hidden).
        """
        size, half, rotated = self.size, self.size // 2, self.heads + self.kv_heads
        x = self.embed(ids)
        positions = places.clamp(max=self.columns - 1)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer, (before, qkv, norms, output, between, gates, down) in enumerate(self.layers):
            found = self.linear(self.normed(x, before), qkv).view(len(x), -1, size)
            qk = turned = found[:, :rotated]
            if norms is not None:
                qk = F.rms_norm(qk, (size,), None, self.eps) * norms
            swapped = torch.cat([qk[..., half:], qk[..., :half]], dim=-1)
            torch.addcmul(qk * cos, swapped, sin, out=turned)
            x = self.add_linear(x, attend(layer, found), output)
            gate, up = self.linear(self.normed(x, between), gates).chunk(2, dim=-1)
            x = self.add_linear(x, F.silu(gate).mul_(up), down)
        return self.logits(x if wanted is None else wanted(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.normed(x, self.norm), self.head)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embedding)

    def normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.hidden, gain, self.eps)

    def linear(self, x: torch.Tensor, weights: tuple) -> torch.Tensor:
        return linear(x, *weights)

    def add_linear(self, x: torch.Tensor, y: torch.Tensor, weights: tuple) -> torch.Tensor:
        return add_linear(x, y, *weights)

    def hear(self, queries, keys, values, bias) -> torch.Tensor:
        """Attention of R rows: queries (R, T, H, D), keys and values (R, S, KV, D) -> (R * T, H * D)."""
        heard = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=bias,
            enable_gqa=self.heads != self.kv_heads,
        )
        return heard.transpose(1, 2).reshape(-1, self.heads * self.size)

    def bias(self, mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(mask, dtype=self.embedding.dtype).masked_fill_(~mask, float("-inf"))


class JointForward(LlamaForward):
    """Several models of one shape in one forward, each for some of the tokens: only products with weights are
    computed model by model.
    """

    def __init__(
        self, members: Sequence[LlamaForward], counts: Sequence[int], wanted: Sequence[int] | None = None
    ) -> None:
        """counts: how many tokens are whose, in this order; wanted: of how many of them logits are."""
        first, self.wanted = members[0], list(wanted or counts)
        self.counts, self.embeddings = list(counts), [member.embedding for member in members]
        for name in ("columns", "heads", "kv_heads", "size", "eps", "hidden", "cos", "sin", "embedding"):
            setattr(self, name, getattr(first, name))
        self.head = [member.head for member in members]
        self.norm = self._spread([member.norm for member in members], self.wanted)
        self.layers = []
        for layers in zip(*(member.layers for member in members), strict=True):
            before, qkv, norms, output, between, gates, down = zip(*layers, strict=True)
            norms = None if norms[0] is None else self._spread(norms)
            before, between = self._spread(before), self._spread(between)
            self.layers.append((before, qkv, norms, output, between, gates, down))

    def logits(self, x):
        parts = zip(self.normed(x, self.norm).split(self.wanted), self.head, strict=True)
        return torch.cat([linear(each, *weights) for each, weights in parts])

    def _spread(self, gains: Sequence[torch.Tensor], counts: Sequence[int] | None = None) -> torch.Tensor:
        """(N, ...) each token's."""
        pairs = zip(gains, counts or self.counts, strict=True)
        return torch.cat([gain.expand(count, *gain.shape) for gain, count in pairs])

    def embed(self, ids):
        pairs = zip(ids.split(self.counts), self.embeddings, strict=True)
        return torch.cat([F.embedding(mine, weight) for mine, weight in pairs])

    def normed(self, x, gain):
        return F.rms_norm(x, self.hidden, None, self.eps) * gain

    def linear(self, x, weights):
        return torch.cat([linear(each, *w) for each, w in zip(x.split(self.counts), weights, strict=True)])

    def add_linear(self, x, y, weights):
        parts = zip(x.split(self.counts), y.split(self.counts), weights, strict=True)
        return torch.cat([add_linear(mine, other, *w) for mine, other, w in parts])


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of (N, K)."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add_linear(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None):
    """x + linear(y), of (N, K)."""
    if _by_onednn(y, weight):
        return torch.ops.mkldnn._linear_pointwise.binary(y, x, weight, bias, "add")
    return torch.addmm(x, y, weight.t()) if bias is None else x + F.linear(y, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies: with float32 on a CPU torch calls MKL, which on processors other than
    Intel's takes twice as long, but has less to do before it starts (the bound is where both take as long).
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.shape[0] * weight.numel() > 1_500_000 and torch.backends.mkldnn.is_available()


def _cut(bias: torch.Tensor | None, size: int) -> torch.Tensor | None:
    return None if bias is None else bias[:size]


def joined(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight and bias for layers of the same input, whose parameters become views of it: no copy is
    kept.
    """
    biases = [linear.bias for linear in linears]
    weight = _join([linear.weight for linear in linears])
    return weight, None if biases[0] is None else _join(biases)


def _join(parts: list[nn.Parameter]) -> torch.Tensor:
    first, at = parts[0], parts[0].data_ptr()
    rows, stride = sum(len(part) for part in parts), first.stride()
    together = True  # an earlier call may have joined them
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        together &= same and part.data_ptr() == at and part.is_contiguous()
        at += part.numel() * part.element_size()
    if not together:
        with torch.inference_mode(first.is_inference()), torch.no_grad():  # they stay what they were
            whole, offset = torch.cat([part.detach() for part in parts]), 0
            for part in parts:
                part.data = whole[offset : offset + len(part)]
                offset += len(part)
    return first.detach().as_strided((rows, *first.shape[1:]), stride, first.storage_offset())
