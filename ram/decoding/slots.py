"""A model whose keys and values lie in slots: a line for every row being decoded, a column per position.

    token ids, where they lie, what they see -> forward -> logits where they are wanted

Nothing is moved or grown: taking tokens back is a smaller length, and a finished row's line goes to the next
row. `LlamaSlots` is our own forward for Llama and its kin, where transformers spends more time in Python than
in arithmetic on small models; `TransformersSlots` runs any other model, and is what ours is compared with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicLayer

from ram.decoding.graphs import Graphs, can_capture

LLAMA_KIN = {"llama", "mistral", "qwen2", "qwen3"}  # one decoder layer, but for biases and norms of heads
STEADY_ROPE = {"default", "linear", "llama3", "yarn"}  # angles depend on the position alone


def has_slots(*models) -> bool:
    """Whether the models keep all keys and values by position, as slots do: no sliding window, no state."""
    for model in models:
        if not hasattr(model, "base_model"):  # no transformers model: it keeps what it likes
            return False
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
        window = getattr(model.config, "sliding_window", None) and not hasattr(model.config, "layer_types")
        if set(kinds) != {"full_attention"} or window or model._is_stateful:
            return False
    return True


def open_slots(model, slots: int, columns: int, vocab_size: int, cuda_graphs: bool = False) -> "Slots":
    """Empty slots of a model, with the fastest forward that fits it."""
    if not is_plain_llama(model):
        return TransformersSlots(model, slots, columns, vocab_size)
    found = LlamaSlots(model, slots, columns, vocab_size)
    if cuda_graphs and can_capture(found.device):
        found.graphs = Graphs(found.forward, columns, found.device)
    return found


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


class Slots:
    """What both forwards share: how many tokens of each row were read, and the vocabulary."""

    def __init__(self, model, slots: int, columns: int, vocab_size: int) -> None:
        self.model, self.slots, self.columns, self.vocab_size = model, slots, columns, vocab_size
        self.device = model.device
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []  # by layer: (slots, columns + 1, H, D)
        self.all_lines = torch.arange(slots, device=self.device)
        self.read = [0] * slots  # tokens of each line whose keys and values stand
        self.graphs: Graphs | None = None  # of the forwards over all lines

    def __call__(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        lines: torch.Tensor | None = None,
        wanted: tuple[torch.Tensor, int] | None = None,
    ) -> torch.Tensor:
        """Logits (R, T, V) of new tokens, or (R, W, V) where only some are wanted.

        ids, places: (R, T) tokens and their columns, the one beyond the last for what nobody reads. mask:
        (R, 1, T, S), which columns a token sees. lines: (R,) whose tokens they are, None for all. wanted:
        (R, W) which of the T tokens, and the first that any row wants.
        """
        ids, places, mask = (each.to(self.device) for each in (ids, places, mask))
        if self.graphs is not None and lines is None and wanted is None:
            return self.graphs(ids, places, mask)
        lines = None if lines is None else lines.to(self.device)
        wanted = None if wanted is None else (wanted[0].to(self.device), wanted[1])
        return self.forward(ids, places, mask, lines, wanted)

    def keep(self, lines: Sequence[int]) -> None:
        """Goes on with some lines only, `lines[i]` as the i-th; what stays in its place is not copied."""
        self.slots, self.read = len(lines), [self.read[line] for line in lines]
        moved = [i for i, line in enumerate(lines) if line != i]
        to, origin = (torch.tensor(at, device=self.device) for at in (moved, [lines[i] for i in moved]))
        for stored in (each for pair in self.stored for each in pair):
            if moved:
                stored[to] = stored[origin]
        self.stored = [(keys[: self.slots], values[: self.slots]) for keys, values in self.stored]


class SlotCache(Cache):
    """transformers' view of the slots; `aim` says where the next forward's tokens go and what they see."""

    def __init__(self, owner: Slots) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.owner = owner

    def aim(self, lines: torch.Tensor | None, places: torch.Tensor, seen: int) -> None:
        """lines: (R,) whose tokens come, None for all; places: (R, T) their columns; seen: columns read."""
        self.chosen, self.seen = lines, seen
        self.where = ((self.owner.all_lines[: len(places)] if lines is None else lines).unsqueeze(1), places)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == len(self.owner.stored):
            _, heads, _, size = key_states.shape
            shape = (self.owner.slots, self.owner.columns + 1, heads, size)
            self.owner.stored.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        found = []
        for stored, states in zip(self.owner.stored[layer_idx], (key_states, value_states), strict=True):
            stored[self.where] = states.transpose(1, 2)
            stored = stored[:, : self.seen]
            found.append((stored if self.chosen is None else stored[self.chosen]).transpose(1, 2))
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class TransformersSlots(Slots):
    """Any decoder of transformers that takes a four-dimensional mask."""

    def __init__(self, model, slots: int, columns: int, vocab_size: int) -> None:
        super().__init__(model, slots, columns, vocab_size)
        self.cache = SlotCache(self)

    def forward(self, ids, places, mask, lines=None, wanted=None):
        self.cache.aim(lines, places, mask.shape[-1])
        first = 0 if wanted is None else wanted[1]
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places.clamp(max=self.columns - 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=ids.shape[1] - first,
        ).logits[..., : self.vocab_size]
        if wanted is None:
            return logits
        return logits.gather(1, (wanted[0] - first).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


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


class LlamaSlots(Slots):
    """`LlamaForward` over slots."""

    def __init__(self, model, slots: int, columns: int, vocab_size: int) -> None:
        super().__init__(model, slots, columns, vocab_size)
        self.run = LlamaForward(model, columns, vocab_size)
        shape = (slots, columns + 1, self.run.kv_heads, self.run.size)
        zeros = self.run.embedding.new_zeros
        self.stored = [(zeros(shape), zeros(shape)) for _ in self.run.layers]

    def forward(self, ids, places, mask, lines=None, wanted=None):
        (rows, count), run = ids.shape, self.run
        starts = (self.all_lines[:rows] if lines is None else lines) * (self.columns + 1)
        where, bias, seen = (starts.unsqueeze(1) + places).flatten(), run.bias(mask), mask.shape[-1]

        def attend(layer, found):
            queries, *new = found.split([run.heads, run.kv_heads, run.kv_heads], dim=1)
            heard = []
            for stored, states in zip(self.stored[layer], new, strict=True):
                stored.view(-1, run.kv_heads, run.size).index_copy_(0, where, states)
                stored = stored[:, :seen]
                heard.append(stored if lines is None else stored[lines])
            return run.hear(queries.view(rows, count, run.heads, run.size), *heard, bias)

        def pick(x):
            x = x.view(rows, count, -1)
            return x.gather(1, wanted[0].unsqueeze(-1).expand(-1, -1, x.shape[-1])).flatten(0, 1)

        logits = run(ids.flatten(), places.flatten(), attend, None if wanted is None else pick)
        return logits.view(rows, -1, self.vocab_size)


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
