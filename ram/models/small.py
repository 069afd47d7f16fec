"""A small random model with the layers of a large one: the same classes, kinds of layers and attention.

It is what an exact check of a forward pass runs on, so the check costs the same for a model of any size, with
quantised or sharded weights. Layers are kept up to the first that repeats no earlier kind.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

POSITIONS = 128  # more than the rows of a check have tokens
VOCABULARY = 96
IDS = range(8, 72)  # token ids of the rows of a check; those outside may have a meaning for the model
WINDOW = 8  # tokens; far fewer than a row of a check has
MOST_LAYERS = 24
MOST_WEIGHTS = 20_000_000

HEADS, KEY_HEADS, HEAD_SIZE, WIDTH = 4, 2, 16, 64
# Names of a configuration's sizes (regular expressions of the whole name) and their value in the small model.
SIZES: dict[str, int] = {
    r"vocab_size(_per_layer_input)?|unpadded_vocab_size|ngram_vocab_size_base": VOCABULARY,
    r"hidden_size|d_model|n_embd|embedding_size|embedding_dim|emb_dim|word_embed_proj_dim|lru_width"
    r"|(in|out)put_embedding_size|attention_hidden_size|(audio|vision)?_?embed_dim": WIDTH,
    r"((encoder|decoder|num|num_encoder|num_decoder|swa_num|global_num)_)?attention_heads|n_heads?|num_heads"
    r"|linear_num_heads|linear_num_value_heads|num_query_groups": HEADS,
    r"linear_num_key_heads": KEY_HEADS,
    r"index_n_heads": 16,  # with few heads many scores are 0, and which of them are the largest is arbitrary
    r"(swa_|global_|index_|linear_)?head_dim|d_head|dim_head|attention_head_size|kv_channels"
    r"|qk_(rope|nope)_head_dim|linear_(key|value)_head_dim": HEAD_SIZE,
    r"qk_head_dim": 2 * HEAD_SIZE,
    r"v_head_dim": 24,  # keys and values of two widths
    r"attention_head_dim": 2 * HEAD_SIZE,
    r".*intermediate_size(_mlp)?|(encoder_|decoder_)?ffn_dim|d_inner|dff|dim_ff|(expert_)?ffn_hidden_size"
    r"|feed_forward_size|block_ff_dim": 96,
    r"(q|kv|o)_lora_rank|laurel_rank|adapter_rank|hidden_size_per_layer_input|router_hidden_size|gated_norm_rank"
    r"|hc_lowrank|ple_embed_dim": 16,
    r"state_size|mamba_d_state|ssm_state_size": 8,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": HEAD_SIZE,
    r"mamba_d_ssm": 2 * WIDTH,
    r"time_step_rank|mamba_dt_rank|rotary_dim": 4,
    r"(mamba_)?chunk_size|block_size|(local|lsh)_attn_chunk_length": 16,
    r"sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|keep_window_size": WINDOW,
    r"local_attention": 2 * WINDOW,
    r"index_topk|rel_extent": 16,
    r"max_(position_embeddings|seq_len|target_positions|source_positions)|n_positions|n_ctx|context_length"
    r"|model_max_length|floor_scale|log_scaling_n_floor|original_max_position_embeddings": POSITIONS,
}
# Names of counts and the most that the small model has of them.
COUNTS: dict[str, int] = {
    r"(.*_)?(num_experts|num_local_experts|n_routed_experts)|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|moe_k|n_group|num_expert_group": 2,
    r"topk_group|(n|num|moe_num)_shared_experts": 1,
    r"(.*_)?n_groups|(.*_)?ngroups|num_kv_shared_layers|hc_mult|hc_count|o_groups": 2,
    r"(.*_)?vocab_size": VOCABULARY,
    r"encoder_hash_byte_group_vocab": 500,
    r"first_k_dense_replace|num_dense_layers": 1,
}
LAYERS = r"num_hidden_layers|n_layers?|num_layers|num_blocks|((num_)?(encoder|decoder)_)?layers"
WINDOWS = (
    r"sliding_window(_size)?|attention_chunk_size|window_size|attention_window_size|local_attention"
    r"|keep_window_size|index_topk"
)
# Numbers that say after how many layers a kind of layer comes again.
PERIODS = (
    r".*sliding_window_pattern|.*layer_period|layer_group_size|global_attn_every_n_layers"
    r"|no_rope_layer_interval|interleave_moe_layer_step|decoder_sparse_step|.*layer_interval"
    r"|n_layers_per_attn_res_block"
)
# Settings that a family needs beyond its sizes' names.
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": HEAD_SIZE},
}


class NoSmallModel(Exception):
    """A configuration of which no small model can be made; the message says why."""


def small_config(config: Any, longest: int) -> Any:
    """Return a configuration of the same class with small sizes.

    Args:
        config: a model's configuration; it is not changed.
        longest: tokens of the longest row. A window that is not shorter is left out of account: it becomes
            wider than the rows of a check.
    """
    values = config.to_dict()
    values = _small(values, longest)
    for key in ("quantization_config", "dtype", "torch_dtype", "architectures", "transformers_version"):
        values.pop(key, None)
    values.pop("_attn_implementation_autoset", None)
    return type(config).from_dict(values)


def _small(values: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return the values of a configuration, or of one inside it, with small sizes."""
    count, kept = _layers(values)
    family = values.get("model_type")
    result = {}
    for key, value in values.items():
        if key == "per_layer_config" and isinstance(value, dict):
            parts = {layer: part for layer, part in value.items() if int(layer) < kept}
            value = {layer: _small(part, longest) for layer, part in parts.items()}
        elif isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            value = _small(value, longest)
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            value = _small_rope(value)
        elif isinstance(value, list | tuple) and count and len(value) == count:
            value = [
                _small_size(key, size, values, longest, kept) if type(size) is int and size > 1 else size
                for size in value[:kept]
            ]
        elif _is_indices(value) and count and value and max(value) < count:
            value = [index for index in value if index < kept]
        elif key.endswith("_token_id"):
            value = _small_token(key, value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            value = _small_size(key, value, values, longest, kept)
        result[key] = value
    return result | FAMILIES.get(family or "", {})


def _small_size(key: str, value: int, values: dict[str, Any], longest: int, kept: int) -> int:
    if re.fullmatch(LAYERS, key):
        return min(value, kept)
    if re.fullmatch(WINDOWS, key) and value >= longest:
        return 4 * POSITIONS
    if re.fullmatch(r"(swa_|global_)?(num_|n_)(key_value|kv|global_key_value)_heads|num_kv_heads", key):
        heads = next((values[name] for name in ("num_attention_heads", "n_head") if name in values), None)
        return HEADS if value == heads else min(value, KEY_HEADS)
    for names, size in SIZES.items():
        if re.fullmatch(names, key):
            return size
    most = (most for names, most in COUNTS.items() if re.fullmatch(names, key))
    return min(value, next(most, value))


def _small_token(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small_token(key, token) for token in value][:1]
    if not isinstance(value, int) or value < 0:
        return value
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, 3 if value > 3 else value)


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions; they may be given for each kind of layer."""
    result = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            value = _small_rope(value)
        elif key == "original_max_position_embeddings" and value is not None:
            value = POSITIONS
        elif key in ("short_factor", "long_factor") and value is not None:
            share = rope.get("partial_rotary_factor", 1.0)
            value = list(value)[: int(HEAD_SIZE * share) // 2]
        elif key == "mrope_section" and value is not None:
            value = [HEAD_SIZE // 4, *[HEAD_SIZE // 8] * (len(value) - 1)]
        result[key] = value
    return result


def _is_indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(index) is int for index in value)


def _layers(values: dict[str, Any]) -> tuple[int, int]:
    """Return the number of layers of a configuration, and how many from the first have all of its kinds."""
    counts = [values[key] for key in values if re.fullmatch(LAYERS, key) and type(values[key]) is int]
    count = max(counts, default=0)
    lists = [value for value in values.values() if isinstance(value, list | tuple)]
    per_layer = [value for value in lists if len(value) == count and len({str(kind) for kind in value}) <= 8]
    indices = [value for value in lists if value and len(value) < count and _is_indices(value)]
    inside = [set(value) for value in indices if max(value) < count]
    if isinstance(values.get("per_layer_config"), dict):
        inside.append({int(layer) for layer in values["per_layer_config"]})
    kinds = list(_kinds(count, per_layer, inside))
    kept = max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
    periods = [value for key, value in values.items() if re.fullmatch(PERIODS, key) and type(value) is int]
    named = [value for value in lists if value and all(isinstance(kind, str) for kind in value)]
    periods += [len(value) for value in named if len(value) < count]
    kept = max([2, kept, *(period for period in periods if period <= count)])
    return count, min(count, kept)


def _kinds(count: int, per_layer: Sequence[Sequence], inside: Sequence[set]) -> Iterator[tuple]:
    for layer in range(count):
        members = (layer in indices for indices in inside)
        yield tuple(str(values[layer]) for values in per_layer), tuple(members)


def small_model(kind: Any, config: Any, attention: str) -> Any:
    """Return a model of a small configuration in eval mode, with weights that make its laws differ.

    Args:
        kind: the model's class.
        config: see `small_config`.
        attention: transformers' attention implementation.

    Raises:
        NoSmallModel: the model cannot be built, or is not small.
    """
    try:
        with torch.device("meta"):
            count = sum(weight.numel() for weight in kind._from_config(config).parameters())
        if count > MOST_WEIGHTS:
            raise NoSmallModel(f"its small model has {count:,} weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
    except NoSmallModel:
        raise
    except Exception as error:  # sizes that do not fit together raise a dozen unrelated types
        line = (str(error).strip().splitlines() or [""])[0][:120]
        raise NoSmallModel(f"its small model cannot be built ({type(error).__name__}: {line})") from None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:  # wide enough that a token that is seen in error changes the law
                weight.copy_(noise / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.1 * noise)
    return model.eval()


def id_tokenizer(size: int) -> "PreTrainedTokenizerFast":
    """Make a tokenizer for models without text: its tokens are the numbers below `size`, and none is EOS."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({str(token): token for token in range(size)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
