"""`python -m ram.models.from_gguf`: a GGUF file's weights and tokenizer, written here by the package gguf."""

import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ram.errors import UserError
from ram.models import from_gguf

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
WORDS = ["<end>", "<|im_start|>", *"0123456789abdehilnoprstuw Ġ", "th", "the", "Ġthe", "in", "10"]
MERGES = ["t h", "th e", "Ġ the", "i n", "1 0"]


def permuted(weight, heads):
    """Return query or key rows in the order of GGUF: pairs of rotated numbers beside each other."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def written(path, model, rule="smollm"):
    """Write a Llama as GGUF does: other names, permuted queries and keys, tokens with types."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(WORDS)
    writer.add_token_types([3 if word.startswith("<") else 1 for word in WORDS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for own, name in names.items():
            weight = layer.get_submodule(own).weight.detach()
            weight = permuted(weight, heads[own]) if own in heads else weight
            writer.add_tensor(f"blk.{index}.{name}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.add_tensor("output.weight", model.lm_head.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_model_and_tokenizer_come_out_as_they_went_in(tmp_path):
    model = tiny_model(len(WORDS), seed=0, layers=2)
    path = written(tmp_path / "model.gguf", model)
    from_gguf.main([str(path), f"out={tmp_path / 'out'}"])
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(read(ids).logits, model.double()(ids).logits, rtol=1e-6, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<end>" and tokenizer.bos_token == "<|im_start|>"
    # Digits stay apart although "1 0" is a merge; the mark is one token.
    tokens = tokenizer.tokenize("<|im_start|>in the 10")
    assert tokens == ["<|im_start|>", "in", "Ġthe", "Ġ", "1", "0"]
    assert tokenizer.decode(tokenizer("in the 10").input_ids) == "in the 10"


def test_unknown_rules_and_broken_files_are_told(tmp_path):
    path = written(tmp_path / "other.gguf", tiny_model(len(WORDS), seed=0), rule="llama-bpe")
    with pytest.raises(UserError, match="splitting rule 'llama-bpe'; expected gpt2 with one of smollm"):
        from_gguf.main([str(path), f"out={tmp_path / 'out'}"])
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(UserError, match="not a readable GGUF file"):
        from_gguf.main([str(broken), f"out={tmp_path / 'out'}"])
    with pytest.raises(UserError, match="not a readable GGUF file"):
        from_gguf.main([str(tmp_path / "none.gguf"), f"out={tmp_path / 'out'}"])
