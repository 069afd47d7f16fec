"""What a model may do: each family takes the fastest path that is right, or is refused with its reason."""

import pytest
import torch
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralForCausalLM

from ram.decoding.cache import pool_objection
from ram.errors import UserError
from ram.models import abilities, checkpoints, survey
from ram.models.small import HEAD_SIZE, small_config
from ram.training import logps, passes

FAMILIES = {  # type -> the way to train and to decode; None if it is refused
    "gptj": ("padded", "engine"),  # eager attention, which adds its mask
    "bart": ("padded", "whole forwards"),  # positions from the cache's length
    "mamba": ("padded", "whole forwards"),  # a cache of another name
    "lfm2": ("padded", "cache"),  # a state
    "deepseek_v3": ("padded", "engine"),  # keys and values of two widths
    "gemma2": ("padded", "cache"),  # a window, no SDPA, capped logits
    "mixtral": ("packed", "engine"),
    "bert": None,  # sees later tokens
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_in_what_it_may_do(name):
    """Training and decoding by the paths that a type is allowed equal whole forwards of each row alone."""
    result = survey.survey(name)
    assert not result.fault
    if FAMILIES[name] is None:
        assert result.note.startswith("refused: ") and result.training is result.decoding is None
    else:
        assert (result.training, result.decoding) == FAMILIES[name], result.note
        assert result.served == (result.decoding == "engine")


@pytest.mark.slow
def test_every_type_of_the_library_is_right_or_refused(capsys):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    results = [survey.survey(name) for name in sorted(NAMES)]
    built = [result for result in results if not result.note.startswith("not built")]
    assert [result.name for result in results if result.fault] == [] and len(built) >= 145
    assert all(result.training or result.note for result in results)


@pytest.mark.parametrize("kind", ["minimax", "granitemoehybrid", "lfm2"])
def test_models_with_a_state_are_not_packed(kind):
    """A state, or a convolution, leaks from one answer into the next."""
    reason = passes.objection_to(logps.packed_logps, survey.model_of(kind), 64)
    assert reason is not None and "nats" in reason


def test_refused_before_training():
    """A model that could never be decoded trains nothing."""
    model = survey.model_of("bert")
    with pytest.raises(UserError, match="BertLMHeadModel cannot decode: a token's law depends on later"):
        passes.pick([tiny_model(13, 0), model], 64)


def test_own_families_need_no_check(monkeypatch):
    """Llama's kin costs nothing; only a window shorter than the rows rules a path out."""
    monkeypatch.setattr(abilities, "_stored", lambda *_: "checked")
    model = tiny_model(13, 0)
    assert passes.pick([model], 64) is logps.packed_logps and pool_objection(model, 64) is None
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mistral", vocab_size=13, num_key_value_heads=2, sliding_window=20, **sizes)
    window = MistralForCausalLM(config)
    assert pool_objection(window, 20) is None and pool_objection(window, 21) == "checked"


def test_a_check_is_made_once(monkeypatch, tmp_path):
    """Its result is stored by what it depends on: configuration, attention, code; damage repeats it."""
    abilities.use_store(tmp_path)
    config = GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=13)
    assert pool_objection(GPT2LMHeadModel(config), 64) is None
    (file,) = tmp_path.iterdir()
    calls = []
    monkeypatch.setattr(abilities, "_checked", lambda *_: calls.append(1) or "checked again")
    abilities.use_store(tmp_path)
    larger = GPT2Config(n_layer=5, n_head=2, n_embd=32, vocab_size=40)  # its small model is the same
    assert pool_objection(GPT2LMHeadModel(larger), 64) is None and not calls
    file.write_text(file.read_text().replace("null", '"forged"'))
    assert "checked again" in (pool_objection(GPT2LMHeadModel(config), 64) or "")
    eager = GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    assert "checked again" in (pool_objection(eager, 64) or "") and len(calls) == 2


def test_small_models_keep_every_kind_of_layer():
    """Layers are kept up to the last new kind; windows are short only if rows are longer."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=24, layer_types=kinds * 4, sliding_window=512
    )
    small = small_config(config, 1000)
    assert small.layer_types == kinds and small.sliding_window < 16 and small.hidden_size == 64
    assert small_config(config, 512).sliding_window > survey.LONGEST
    state = AutoConfig.for_model("jamba", num_hidden_layers=32)
    assert set(small_config(state, 64).layers_block_type) == set(state.layers_block_type)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}


def test_longrope_ends_where_its_factors_change(tmp_path):
    """Beyond the original context a token's law would depend on later tokens and on the row's neighbours."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    rope = LONG | {"original_max_position_embeddings": 32}
    config = AutoConfig.for_model(
        "phi3",
        **sizes,
        vocab_size=40,
        num_key_value_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters=rope,
    )
    assert config.hidden_size // config.num_attention_heads == HEAD_SIZE
    model = AutoModelForCausalLM.from_config(config).eval()
    rows = torch.randint(3, 40, (1, 40))
    with torch.no_grad():
        whole, cut = model(rows).logits[:, 31], model(rows[:, :32]).logits[:, 31]
    assert (whole - cut).abs().max() > 1e-4  # a later token changes this law
    assert abilities.max_positions(config) == 32 == abilities.max_positions(config.to_dict())
    assert pool_objection(model, 32) is None
    config.save_pretrained(tmp_path)
    checkpoints.check_context(str(tmp_path), 32)
    with pytest.raises(UserError, match="max_length=33, but .* holds 32 positions"):
        checkpoints.check_context(str(tmp_path), 33)


# ---- chance in training ------------------------------------------------------------------------------------


def noisy_model(setting):
    """Return a model whose configuration asks for noise in training by one setting."""
    if setting == "attn_pdrop":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=13, attn_pdrop=0.3))
    config = small_config(AutoConfig.for_model("mixtral", router_jitter_noise=0.3), 64)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("setting", ["attn_pdrop", "router_jitter_noise"])
def test_dropout_is_off_in_training_unless_asked_for(setting, caplog):
    """Off: training's forward pass is that of evaluation. Kept: a line says what that means."""
    ids = torch.randint(10, (2, 12))
    for keep, line in ((True, "micro-batches and processes change"), (False, "dropout is off in training")):
        caplog.clear()
        model = noisy_model(setting)
        passes.settle_dropout(model, keep)
        assert line in caplog.text and f"{setting}=0.3" in caplog.text
        evaluated = model.eval()(ids).logits
        assert torch.equal(model.train()(ids).logits, evaluated) != keep
    caplog.clear()
    passes.settle_dropout(tiny_model(13, 0), keep=False)
    assert not caplog.text


def test_router_loss_is_added_in_training():
    """The loss that a mixture of experts asks for is part of the training loss, with its factor."""
    model = survey.model_of("mixtral")
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.5
    rows = torch.randint(10, 40, (2, 9))
    data = survey.TokenizedDataset(
        {"prompt": rows[:, :4].flatten().numpy(), "target": rows[:, 4:].flatten().numpy()},
        {"prompt": survey.np.array([0, 4, 8]), "target": survey.np.array([0, 5, 10])},
        {},
    )
    forward = passes.pick([model], 64)
    assert forward is logps.padded_logps and "router loss" in passes.objection_to(
        logps.packed_logps, model, 64
    )
    sums, _ = forward(model.eval(), data, [0, 1], ("target",), 0)
    assert logps.ROUTER_LOSS not in sums
    sums, _ = forward(model.train(), data, [0, 1], ("target",), 0)
    expected = 0.5 * model(rows, output_router_logits=True).aux_loss
    torch.testing.assert_close(sums[logps.ROUTER_LOSS], expected.expand(2))
    assert sums[logps.ROUTER_LOSS].requires_grad
