"""Model folders that load by halves elsewhere: refused in a line, or loaded whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_model_folder, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, CTRLTokenizer

import train
from ram.data.tokenization import encode, tokenizer_fingerprint
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.models import checkpoints, small, survey, vocabulary
from ram.settings import recipes
from utils import TABLES

TOKENIZER = byte_tokenizer()


def edit(folder, weights=None, **config):
    """Add weights to a folder and change keys of its config.json."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | (weights or {}), file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_weights_without_a_place_are_refused(tmp_path):
    """Biases that the configuration does not know, and layers beyond its number."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen = AutoConfig.for_model("qwen2", vocab_size=13, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(qwen).save_pretrained(tmp_path / "qwen")
    edit(tmp_path / "qwen", model_type="llama", architectures=["LlamaForCausalLM"])
    tiny_model(13, 0, layers=4).save_pretrained(tmp_path / "deep")
    edit(tmp_path / "deep", num_hidden_layers=2)
    for name, weight in (("qwen", "k_proj.bias"), ("deep", "layers.2.")):
        with pytest.raises(UserError, match=rf"weights that its config.json has no place for \(.*{weight}"):
            checkpoints.load_model(str(tmp_path / name), "float32")


def test_tables_of_older_versions_are_no_surplus(tmp_path):
    model = tiny_model(13, 0)
    model.save_pretrained(tmp_path)
    edit(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    edit(tmp_path, {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)})
    loaded = checkpoints.load_model(str(tmp_path), "float32")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_adapter_beside_weights_is_refused(tmp_path):
    folder = save_model_folder(tmp_path / "m", tiny_model(len(TOKENIZER), 0), TOKENIZER)
    assert checkpoints.find_model(folder) == folder
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter .* merge the adapter"):
        checkpoints.find_model(folder)


def test_models_without_sdpa_load_with_eager_attention(tmp_path, caplog):
    survey.model_of("gptj").save_pretrained(tmp_path)
    model = checkpoints.load_model(str(tmp_path), "float32")
    assert model.config._attn_implementation == "eager" and "loaded with eager attention" in caplog.text


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    tiny_model(13, 0).save_pretrained(tmp_path)
    edit(tmp_path, num_hidden_layers=100_000_000)
    with pytest.raises(UserError, match="num_hidden_layers=100,000,000 is no size of a model"):
        checkpoints.load_model(str(tmp_path), "float32")


def test_composite_models_decode():
    """A vision model's vocabulary and layers are in its text configuration."""
    model = survey.model_of("gemma3")
    assert "vocab_size" not in vars(model.config)
    for speculative in (True, False):
        settings = {"max_new_tokens": 2, "speculative": speculative}
        (answer,) = generation.generate(
            model, None, small.id_tokenizer(small.VOCABULARY), [[9, 10]], PARParams(), **settings
        )
        assert len(answer.token_ids) == 2


def test_tokenizers_written_in_python_work(tmp_path):
    """They have no fast backend: fingerprints and encodings do not need one."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    files = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    CTRLTokenizer(*files, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tokenizer, again = (checkpoints.load_tokenizer(str(tmp_path)) for _ in range(2))
    assert encode(tokenizer, ["a b"]) == [[0, 1]]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(again)
    assert vocabulary.shared_fingerprint(tokenizer, 4) == vocabulary.shared_fingerprint(again, 4)


def test_data_beyond_the_rows_are_refused_before_training(tmp_path):
    """A tokenizer larger than the model: refused if the data use what the model has no row for."""
    larger = byte_tokenizer()
    larger.add_tokens(["zebra"])
    folder = save_model_folder(tmp_path / "m", tiny_model(len(TOKENIZER), 0), TOKENIZER)
    larger.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "data" / "train").mkdir(parents=True)

    def run(word):
        rows = [{"instruction": f"{index}?", "output": f"{word} {index}"} for index in range(8)]
        file = tmp_path / "data" / "train" / "ultrachat_round_one.json"
        file.write_text(json.dumps(rows))
        values = {"datasets": "[uc]", "data_dir": tmp_path / "data", "output_dir": tmp_path / word}
        values |= {"model.name": "m", "model.name_or_path": folder, "max_length": 128, "n_examples": 4}
        values |= {"max_prompt_length": 64, "heldout_fraction": 0.2, "do_first_eval": "false"}
        values |= {"model.tokenizer_name_or_path": tmp_path / "tokenizer"}
        (stage,) = recipes.resolve([f"{key}={value}" for key, value in values.items()], TABLES)
        train.train_stage(stage, False)

    with pytest.raises(UserError, match=f"has {len(TOKENIZER)} vocabulary rows, but .* the token id"):
        run("zebra")
    run("horse")
