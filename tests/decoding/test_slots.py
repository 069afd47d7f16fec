"""Our forward over slots against transformers' over the same slots and over whole texts; who may use it."""

import copy
import random

import pytest
import torch
from tiny import LlamaConfig, LlamaForCausalLM, tiny_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ram.decoding.slots import LlamaSlots, TransformersSlots, has_slots, open_slots
from ram.models import llama
from ram.models.llama import is_plain_llama, joined

SIZES = {
    "vocab_size": 13,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KIN = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
}


def kin(name):
    """A model of the family with random weights, the norms' gains and biases included."""
    kind, config, settings = KIN[name]
    model = kind(config(**SIZES, **settings)).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=rng)
    return model


def feed(cache, texts, columns, rng):
    """Feeds all of every text in pieces, some lines at a time, ragged; yields (line, first, logits (T,
    V)).
    """
    done = [0] * len(texts)
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        waiting = [line for line, text in enumerate(texts) if done[line] < len(text)]
        lines = waiting if rng.random() < 0.5 else sorted(rng.sample(waiting, rng.randint(1, len(waiting))))
        counts = [min(rng.randint(1, 5), len(texts[line]) - done[line]) for line in lines]
        width = max(counts)
        ids, places = (
            torch.zeros(len(lines), width, dtype=torch.long),
            torch.full((len(lines), width), columns),
        )
        for i, (line, count) in enumerate(zip(lines, counts, strict=True)):
            ids[i, :count] = torch.tensor(texts[line][done[line] : done[line] + count])
            places[i, :count] = torch.arange(done[line], done[line] + count)
        seen = max(done[line] + count for line, count in zip(lines, counts, strict=True))
        mask = (torch.arange(seen) <= places.unsqueeze(-1)).unsqueeze(1)
        chosen = None if len(lines) == len(texts) else torch.tensor(lines)
        wanted = (torch.tensor(counts).unsqueeze(1) - 1, min(counts) - 1) if rng.random() < 0.5 else None
        found = cache(ids, places, mask, chosen, wanted)
        for i, (line, count) in enumerate(zip(lines, counts, strict=True)):
            first = done[line] + (count - 1 if wanted else 0)
            yield line, first, found[i] if wanted else found[i, :count]
            done[line] += count


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-5), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize("kind", [LlamaSlots, TransformersSlots])
@torch.inference_mode()
def test_pieces_in_slots_equal_whole_texts(kind, name, dtype, near):
    """Texts fed in ragged pieces, by line, give the logits of each text alone in one forward.

    float64 is as near as transformers is, whose norms are float32 throughout.
    """
    model, rng = kin(name).to(dtype), random.Random(5)
    texts = [[rng.randrange(12) for _ in range(length)] for length in (9, 1, 17, 4)]
    whole = [model(torch.tensor([text])).logits[0, :, :12] for text in texts]
    assert is_plain_llama(model) and has_slots(model)
    cache, count = kind(model, 4, 20, 12), 0
    for line, first, logits in feed(cache, texts, 20, rng):
        torch.testing.assert_close(logits, whole[line][first : first + len(logits)], rtol=near, atol=near)
        count += len(logits)
    assert count > 12


@pytest.mark.parametrize("kind", [LlamaSlots, TransformersSlots])
@torch.inference_mode()
def test_lines_that_go_on_keep_their_texts(kind):
    """After `keep`, the i-th line is the one that was named, and only what moved was copied."""
    model, text = kin("llama"), [3, 1, 4, 1, 5, 9]
    cache = kind(model, 4, 8, 12)
    rows = torch.tensor([text, text[::-1], [7] * 6, text])
    places = torch.arange(6).expand(4, -1)
    cache(rows[:, :5], places[:, :5], (torch.arange(5) <= places[:, :5, None]).unsqueeze(1))
    stays = cache.stored[0][0].data_ptr()
    cache.keep([0, 3, 2])
    assert cache.stored[0][0].data_ptr() == stays and cache.slots == 3
    rows = rows[[0, 3, 2]]
    found = cache(rows[:, 5:], places[:3, 5:], torch.ones(3, 1, 1, 6, dtype=torch.bool))
    torch.testing.assert_close(found[:, 0], model(rows).logits[:, -1, :12], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_large_products_equal_small_ones():
    """Products given to oneDNN equal torch's, with and without a bias, at the size where they begin."""
    x, y, weight, bias = torch.randn(40, 200), torch.randn(40, 300), torch.randn(300, 200), torch.randn(300)
    assert llama._by_onednn(x, weight) and not llama._by_onednn(x[:1], weight)
    for rows, b in ((40, None), (40, bias), (1, None), (1, bias)):
        expected = nn.functional.linear(x[:rows].double(), weight.double(), b if b is None else b.double())
        torch.testing.assert_close(llama.linear(x[:rows], weight, b).double(), expected, rtol=1e-4, atol=1e-4)
        found = llama.add_linear(y[:rows], x[:rows], weight, b)
        torch.testing.assert_close(found.double(), expected + y[:rows], rtol=1e-4, atol=1e-4)


def test_joined_weights_are_the_models_own():
    """Joining keeps one copy, is done once, follows the weights, and leaves a model that trains and saves."""
    model = kin("qwen2")
    attention = model.model.layers[0].self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    before = [part.weight.detach().clone() for part in parts]
    with torch.inference_mode():
        weight, bias = joined(*parts)
    assert torch.equal(weight, torch.cat(before)) and len(bias) == len(weight)
    assert joined(*parts)[0].data_ptr() == weight.data_ptr() == attention.q_proj.weight.data_ptr()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(weight, torch.cat([part.weight for part in parts])) and not torch.equal(
        weight, torch.cat(before)
    )
    model.to(torch.float64)
    again = joined(*parts)[0]
    assert again.dtype == torch.float64 and torch.equal(again, torch.cat([part.weight for part in parts]))


def test_a_decoded_model_saves_as_before(tmp_path):
    """An export after decoding holds every weight by its own name and value."""
    model = kin("llama")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    open_slots(model, 1, 4, 13)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_other_models_take_transformers_forward():
    """Whatever differs from the family's own layers, or has something put into them, is not ours."""
    plain = kin("llama")
    assert isinstance(open_slots(plain, 1, 4, 13), LlamaSlots)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=13)).eval()
    assert isinstance(open_slots(gpt2, 1, 4, 13), TransformersSlots)

    class Low(nn.Linear):
        pass

    def changed(change):
        model = copy.deepcopy(plain)
        change(model)
        return is_plain_llama(model)

    assert changed(lambda model: None)
    assert not changed(lambda model: model.train())
    assert not changed(lambda model: model.model.norm.register_forward_hook(lambda *_: None))
    assert not changed(lambda model: setattr(model, "lm_head", Low(24, 13)))
    assert not changed(lambda model: setattr(model.model.layers[1].mlp, "up_proj", Low(24, 40)))
    assert not changed(lambda model: setattr(model.model.layers[1].mlp, "extra", nn.Linear(24, 24)))
    assert not changed(lambda model: model.lm_head.to(torch.float64))
    assert not changed(lambda model: setattr(model.config, "hidden_act", "gelu"))
    assert not changed(lambda model: model.config.rope_parameters.update(rope_type="dynamic"))
    subclass = type("Other", (LlamaForCausalLM,), {"__module__": "elsewhere"})
    assert not is_plain_llama(subclass(plain.config).eval())
    window = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert not has_slots(Qwen2ForCausalLM(window)) and not has_slots(object())
    assert has_slots(plain, tiny_model(13, 0))
