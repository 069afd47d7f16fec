"""A model whose keys and values lie in slots: a line for every row being decoded, a column per position.

    token ids, where they lie, what they see -> forward -> logits where they are wanted

Nothing is moved or grown: taking tokens back is a smaller length, and a finished row's line goes to the next
row. `LlamaSlots` is our own forward for Llama and its kin, where transformers spends more time in Python than
in arithmetic on small models; `TransformersSlots` runs any other model, and is what ours is compared with.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicLayer

from ram.decoding.graphs import Graphs, can_capture
from ram.models.llama import LlamaForward, is_plain_llama


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
