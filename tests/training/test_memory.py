"""The memory of forward and backward passes stays below the formulas of benchmarks/scaling.py."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SHARED, needs_shared
from training_runs import settings
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scaling
from ram.data.prompts import split_dialogue
from ram.data.tokenization import TokenizedDataset
from ram.models import lora
from ram.training import budget
from trainers import BasicTrainer

PARTS = ("prompt", "target", "negative")
TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
VOCABULARY = 128256  # of Llama 3
SIZE = scaling.Size(4, 64, 256, 4, 2, VOCABULARY, head_size=16)
# Mean and standard deviation of the logarithm of the tokens of prompt and answers, and the longest example.
# HH: of its test rows. UltraChat: about turns of 35 to 230 tokens, in dialogues up to the recipe's length.
FITTED = {"hh": ((4.36, 1.08), (3.48, 1.03), 512), "ultrachat": ((4.9, 1.0), (5.2, 0.7), 2048)}


def fitted_lengths(name, count=64):
    """Lengths (count, 3) of a data set; the last example is as long as it may be."""
    prompt, answer, longest = FITTED[name]
    rng = np.random.default_rng(0)
    columns = [np.exp(rng.normal(*part, size=count)) for part in (prompt, answer, answer)]
    lengths = np.stack(columns, axis=1).astype(int) + 1
    lengths[-1] = longest
    return lengths


def real_lengths(name, count=64):
    """The same of real rows, at four characters per token; UltraChat's answers are a stand-in for them."""
    rows = []
    if name == "hh":
        with gzip.open(SHARED / "data" / "hh" / "helpful-base.test.jsonl.gz", "rt") as file:
            for line in file:
                row = json.loads(line)
                chosen, rejected = split_dialogue(row["chosen"]), split_dialogue(row["rejected"])
                if chosen and rejected:
                    rows.append((*chosen, rejected[1]))
    else:
        pairs = json.loads((SHARED / "data" / "ultrachat" / "instruction_pairs_1100.json").read_text())
        with open(SHARED / "data" / "ultrachat" / "ultrachat_prompts.jsonl") as file:
            prompts = [json.loads(line)["prompt"] for line in file]
        rows = [(text, pair["chosen"], pair["rejected"]) for text, pair in zip(prompts, pairs, strict=False)]
    longest_first = sorted(rows, key=lambda row: -sum(map(len, row)))
    return np.array([[len(text) // 4 + 1 for text in row] for row in longest_first[:count]])


def dataset(lengths, vocabulary, max_length):
    """Examples of random ids: prompts cut to half of `max_length`, answers to the rest."""
    rng = np.random.default_rng(0)
    prompts = np.minimum(lengths[:, 0], max_length // 2)
    sizes = [prompts, *(np.minimum(lengths[:, i], max_length - prompts) for i in (1, 2))]
    ids = {
        part: rng.integers(vocabulary, size=int(size.sum()), dtype=np.int32)
        for part, size in zip(PARTS, sizes, strict=True)
    }
    offsets = {part: np.cumsum([0, *size]) for part, size in zip(PARTS, sizes, strict=True)}
    return TokenizedDataset(ids, offsets, {})


def trainer(size, data, max_length, *overrides, dtype=torch.float32):
    """A trainer of a new model of a shape."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        tie_word_embeddings=size.tied,
        max_position_embeddings=4096,
    )
    lengths = (f"max_length={max_length}", f"max_prompt_length={max_length // 2}", "batch_size=64")
    model = LlamaForCausalLM(config).to(dtype)
    assert sum(p.numel() for p in model.parameters()) == size.all
    run = BasicTrainer(
        settings("debug=true", *lengths, *overrides), model, TOKENIZER, data, data, Path("unused"), {}
    )
    run.model.train()
    return run


def peak_of(work):
    """The largest number of bytes that the work held at once, counted by torch's allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def largest_pass(run, data):
    """The peak of the largest pass of a batch, forward and backward, and its tokens."""
    rows = np.arange(64)
    passes = budget.micro_batches(run.settings, data, rows, run.answers, None, run.is_packed)
    passes.sort(key=lambda own: -budget.packing.lengths(data, own, run.answers).sum())

    def work():
        losses, _ = run.losses(data, passes[0])
        run.backward(losses.sum())

    return peak_of(work), len(passes)


@pytest.mark.parametrize(
    "name, source, checkpointing",
    [
        ("hh", fitted_lengths, False),
        ("hh", fitted_lengths, True),
        pytest.param("ultrachat", fitted_lengths, False, marks=pytest.mark.slow),
        pytest.param("hh", real_lengths, False, marks=[needs_shared, pytest.mark.slow]),
        pytest.param("ultrachat", real_lengths, False, marks=[needs_shared, pytest.mark.slow]),
    ],
)
def test_pass_stays_below_its_budget(name, source, checkpointing):
    """A pass of 4,096 tokens and a vocabulary of 128,256 hold at most what the formula says, with gradients.

    The logits of these tokens alone would take 2.1 GB in float32.
    """
    max_length, tokens = FITTED[name][2], 4096
    data = dataset(source(name), VOCABULARY, max_length)
    overrides = ["loss=ours_sft", f"activation_checkpointing={str(checkpointing).lower()}"]
    run = trainer(SIZE, data, max_length, *overrides, f"tokens_per_pass={tokens}")
    peak, n_passes = largest_pass(run, data)
    assert n_passes > 1
    gradients = scaling.gradient_bytes(SIZE, 1) + 4 * max(SIZE.block, SIZE.root)
    activations = scaling.activation_bytes(SIZE, tokens, checkpointing, 4, max_length)
    assert peak <= gradients + activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_formula_of_activations_is_near(checkpointing):
    """With a small vocabulary, most of the peak are activations: the bound is at most 1.5 times as large."""
    size = scaling.Size(6, 96, 384, 3, 1, 512, head_size=32)
    data = dataset(np.tile([100, 80, 60], (64, 1)), 512, 512)
    overrides = ["loss=ours_sft", f"activation_checkpointing={str(checkpointing).lower()}"]
    run = trainer(size, data, 512, *overrides, "tokens_per_pass=5760")
    peak, _ = largest_pass(run, data)
    bound = scaling.activation_bytes(size, 5760, checkpointing, 4, 240) + scaling.gradient_bytes(size, 1)
    assert peak <= bound <= 1.5 * peak


def test_pass_of_adapters_has_no_gradients_of_the_weights():
    """What `lora_bytes` adds to the frozen weights bounds the peak, without the optimizer's moments."""
    size, rank = scaling.Size(4, 256, 1024, 4, 2, 512, head_size=64), 4
    data = dataset(np.tile([60, 40, 30], (64, 1)), 512, 512)
    overrides = ("loss=sft", "activation_checkpointing=false", "tokens_per_pass=1024")
    peaks = []
    for adapted in (False, True):
        run = trainer(size, data, 512, *overrides)
        if adapted:
            lora.add_adapters(run.model, lora.LoraSettings(r=rank, alpha=8.0), 0)
        peak, _ = largest_pass(run, data)
        peaks.append(peak)
    weights, tokens = scaling.lora_weights(size, rank), 1024
    inner = tokens * (7 * 4 * rank * size.layers + 4 * size.inner)
    bound = 4 * weights + scaling.activation_bytes(size, tokens, False, 4, 512) + inner
    assert peaks[1] <= bound <= 1.5 * peaks[1]
    assert peaks[0] - peaks[1] >= 0.5 * (scaling.gradient_bytes(size, 1) - 4 * weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, inner", [(4, 4, 256), (4, 1, 224), (8, 2, 400)])
def test_bytes_that_a_block_keeps(dtype, heads, kv_heads, inner):
    """What a block keeps for the backward pass, counted as two blocks less one, is as the formula says.

    The formula counts the keys of a prompt twice, which is right if the second answer reads all of them.
    """
    data = dataset(np.tile([100, 30, 40], (20, 1)), 512, 512)
    kept = []
    for layers in (1, 2):
        size = scaling.Size(layers, 64, inner, heads, kv_heads, 512, head_size=16)
        run = trainer(size, data, 512, "loss=ours_sft", dtype=dtype)
        own = {weight.untyped_storage().data_ptr() for weight in run.model.parameters()}
        storages = {}

        def keep(tensor, storages=storages, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage  # held, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run.losses(data, np.arange(20))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    tokens = 20 * (100 + 29 + 39)
    size = scaling.Size(1, 64, inner, heads, kv_heads, 512, head_size=16)
    measured, formula = (kept[1] - kept[0]) / tokens, scaling.block_bytes(size, dtype.itemsize)
    assert 0.9 * formula <= measured <= formula
