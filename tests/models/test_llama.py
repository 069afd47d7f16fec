"""Our forward of Llama-like models: its linear layers, joined weights, and the models that it computes."""

import copy

import pytest
import torch
from llamas import SIZES, kin
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ram.models import llama
from ram.models.llama import LlamaForward, is_plain_llama, joined


@torch.inference_mode()
def test_large_products_equal_small_ones():
    """oneDNN's products equal torch's, with and without a bias; fails if torch changes the function."""
    x, y, weight, bias = torch.randn(40, 200), torch.randn(40, 300), torch.randn(300, 200), torch.randn(300)
    assert llama._uses_onednn(x, weight) and not llama._uses_onednn(x[:1], weight)
    for rows, b in ((40, None), (40, bias), (1, None), (1, bias)):
        expected = nn.functional.linear(x[:rows].double(), weight.double(), b if b is None else b.double())
        torch.testing.assert_close(llama.linear(x[:rows], weight, b).double(), expected, rtol=1e-4, atol=1e-4)
        added = llama.add_linear(y[:rows], x[:rows], weight, b)
        torch.testing.assert_close(added.double(), expected + y[:rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_folded_attention_equals_grouped_attention(count, monkeypatch):
    """Off the CPU, heads that share a key-value head are further queries of it: no call groups queries."""
    forward = LlamaForward(kin("llama").double(), 20, 12)
    queries, states = torch.randn(2, count, 4, 8).double(), torch.randn(2, 5, 4, 8).double()
    mask = torch.arange(5) <= torch.tensor([[2, 3, 4], [0, 1, 5]])[:, None, :count, None]
    real, groups = nn.functional.scaled_dot_product_attention, []

    def attention(*args, **settings):
        groups.append(settings.get("enable_gqa", False))
        return real(*args, **settings)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    outputs = []
    for forward.folds in (False, True):
        outputs.append(forward.attention(queries, *states.chunk(2, dim=2), forward.bias(mask)))
    torch.testing.assert_close(*outputs)
    assert groups == [True, False] and outputs[0].shape == (2 * count, 32)


def test_joined_weights_are_views_of_one_tensor():
    """Joining keeps one copy, is done once, follows updates, and leaves a model that trains."""
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


def test_model_with_joined_weights_saves_every_weight(tmp_path):
    """A saved folder has every weight by its own name and value."""
    model = kin("llama")
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    LlamaForward(model, 4, 13)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_models_that_differ_in_one_size_share_no_forward():
    """Two aligners that differ in their heads' size only, or in norms of heads, are of two kinds."""
    changes = [
        {},
        {"head_dim": 16},
        {"intermediate_size": 24},
        {"num_hidden_layers": 1},
        {"attention_bias": True},
    ]
    models = [LlamaForCausalLM(LlamaConfig(**SIZES | change)).eval() for change in changes]
    kinds = {LlamaForward(model, 4, 13).kind for model in (*models, kin("qwen3"))}
    assert len(kinds) == len(changes) + 1 and LlamaForward(kin("llama"), 4, 13).kind in kinds


def test_changed_models_are_not_plain():
    """A model that differs from the family's own classes and layers keeps transformers' forward."""
    plain = kin("llama")

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
