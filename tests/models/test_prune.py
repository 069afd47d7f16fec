"""An aligner cut out of a proposal: which layers stay, and that the result is a model like any other."""

import pytest
import torch
from llamas import KIN, kin
from tiny import byte_tokenizer, save_model_folder, tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from ram.decoding import PARParams, generate
from ram.errors import UserError
from ram.models import checkpoints, prune

SMALL = {"vocab_size": 13, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}


def neox():
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32)).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=16, n_head=2, n_layer=3)).eval()


MODELS = {name: lambda name=name: kin(name) for name in KIN} | {"gpt_neox": neox, "gpt2": gpt2}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_the_kept_layers_compute(name):
    """Equal to the whole model whose removed block passes its input on, with a cache and without."""
    model = MODELS[name]()
    ids = torch.tensor([[1, 5, 2, 9, 3]])
    blocks = next(
        part
        for part in model.base_model.modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == 3
    )
    output = blocks[1].register_forward_hook(
        lambda block, args, kwargs, result: (
            (args[0] if args else kwargs["hidden_states"], *result[1:])
            if isinstance(result, tuple)
            else (args[0] if args else kwargs["hidden_states"])
        ),
        with_kwargs=True,
    )
    expected = model(ids).logits
    output.remove()
    pruned = prune.prune(model, [0, 2])
    torch.testing.assert_close(pruned(ids).logits, expected)
    first = pruned(ids[:, :3], use_cache=True)
    rest = pruned(ids[:, 3:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, expected[:, 3:], rtol=1e-4, atol=1e-5)
    assert pruned.config.num_hidden_layers == 2


def smollm3(count, **settings):
    sizes = SMALL | {"num_hidden_layers": count, "num_key_value_heads": 2, "pad_token_id": None}
    sizes["initializer_range"] = 0.5  # so that positions matter
    config = SmolLM3Config(**sizes | settings, intermediate_size=32)
    torch.manual_seed(0)
    return SmolLM3ForCausalLM(config).eval()


def test_settings_of_single_layers_stay_with_their_layers():
    """SmolLM3 has no rotary positions in every fourth layer; other families list layers by index."""
    config = prune.prune(smollm3(8), [0, 3, 7]).config
    assert config.no_rope_layers == [1, 0, 0]
    model = smollm3(4)
    model.config.mlp_only_layers, model.config.eos_token_id = [1, 3], [2, 3, 4, 5]
    prune.prune(model, [0, 3])
    assert model.config.mlp_only_layers == [1] and model.config.eos_token_id == [2, 3, 4, 5]


def test_model_that_changes_when_it_is_loaded_again_is_refused(tmp_path, monkeypatch):
    """As if a family derived its rotary layers from their numbers."""
    tokenizer = byte_tokenizer()
    model = smollm3(8, eos_token_id=tokenizer.eos_token_id, vocab_size=len(tokenizer))
    source = save_model_folder(tmp_path / "p", model, tokenizer)
    prune.main([source, "layers=0,3,7", f"out={tmp_path / 'q'}"])
    kept = checkpoints.load_model(str(tmp_path / "q")).config
    assert kept.no_rope_layers == [1, 0, 0] and checkpoints.trained_template(str(tmp_path / "q")) is None

    def forgetful(model, layers):
        pruned(model, layers).config.no_rope_layers = [1] * len(layers)
        return model

    pruned = prune.prune
    monkeypatch.setattr(prune, "prune", forgetful)
    with pytest.raises(UserError, match="changes when it is loaded again"):
        prune.main([source, "layers=0,3,7", f"out={tmp_path / 'r'}"])
    assert not (tmp_path / "r").exists()


def test_command_writes_a_model_that_decodes_as_an_aligner(tmp_path):
    tokenizer = byte_tokenizer()
    proposal = tiny_model(len(tokenizer), seed=1, layers=4)
    source, out = save_model_folder(tmp_path / "p", proposal, tokenizer), tmp_path / "q"
    prune.main([source, "layers=2", f"out={out}"])
    aligner = checkpoints.load_model(str(out), "float32")
    assert checkpoints.read_card(str(out))["layers"] == [0, 3] and aligner.config.num_hidden_layers == 2
    checkpoints.load_pair(source, str(out))
    answers = [
        generate(proposal, aligner, tokenizer, ["Why?"], PARParams("par"), max_new_tokens=8, speculative=fast)
        for fast in (True, False)
    ]
    assert answers[0][0].text == answers[1][0].text
    with pytest.raises(UserError, match="exists: give a folder that does not"):
        prune.main([source, "layers=2", f"out={out}"])


@pytest.mark.parametrize(
    "text, layers",
    [("1", [0]), ("2", [0, 9]), ("4", [0, 3, 6, 9]), ("0,4,9", [0, 4, 9]), ("[3]", [3]), ("[1,2]", [1, 2])],
)
def test_layers_are_chosen(text, layers):
    assert prune.chosen_layers(text, 10) == layers


@pytest.mark.parametrize(
    "text, message",
    [
        ("10", "keep fewer and at least 1"),
        ("0", "keep fewer and at least 1"),
        ("x", "expected a number of layers"),
        ("4,2", "ascending indices from 0 to 9"),
        ("0,10", "ascending indices from 0 to 9"),
        ("1,1", "each once"),
    ],
)
def test_impossible_layers_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        prune.chosen_layers(text, 10)


def test_usage_is_shown():
    with pytest.raises(UserError, match="python -m ram.models.prune MODEL layers=7"):
        prune.main(["x", "layers=2"])
