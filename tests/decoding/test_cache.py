"""Pools of keys and values: both forwards over pieces of texts, and the models that have no pool."""

import random

import numpy as np
import pytest
import torch
import varlen
from llamas import KIN, SIZES, kin
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from ram.decoding.cache import (
    Limits,
    LlamaPool,
    Part,
    TransformersPool,
    open_model,
    pool_objection,
)
from ram.decoding.positions import BLOCK, PagedPositions
from ram.models.llama import is_plain_llama

COLUMNS, VOCAB = 20, 12


def feed(pool, texts, rng):
    """Feed every text in ragged pieces, some rows at a time; yield (row, first position, logits (T, V))."""
    done = [0] * len(texts)
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        waiting = [line for line, text in enumerate(texts) if done[line] < len(text)]
        lines = waiting if rng.random() < 0.5 else sorted(rng.sample(waiting, rng.randint(1, len(waiting))))
        counts = [min(rng.randint(1, 5), len(texts[line]) - done[line]) for line in lines]
        ids = torch.zeros(len(lines), max(counts), dtype=torch.long)
        places = torch.full_like(ids, COLUMNS)
        for i, (line, count) in enumerate(zip(lines, counts, strict=True)):
            ids[i, :count] = torch.tensor(texts[line][done[line] : done[line] + count])
            places[i, :count] = torch.arange(done[line], done[line] + count)
        seen = max(done[line] + count for line, count in zip(lines, counts, strict=True))
        consecutive = lines == list(range(lines[0], lines[0] + len(lines)))
        span = slice(lines[0], lines[0] + len(lines)) if consecutive else None
        last_only = rng.random() < 0.5
        needed = torch.tensor(counts).unsqueeze(1) - 1 if last_only else None
        part = Part(ids, places, torch.tensor(lines), span, seen, needed, min(counts) - 1 if last_only else 0)
        (logits,) = pool([part])
        for i, (line, count) in enumerate(zip(lines, counts, strict=True)):
            first = done[line] + (count - 1 if last_only else 0)
            yield line, first, logits[i] if last_only else logits[i, :count]
            done[line] += count


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.float64, 1e-5), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("name", KIN)
@pytest.mark.parametrize("share", [True, False], ids=["pages", "lines"])
@pytest.mark.parametrize(
    ("kind", "by_length"),
    [(LlamaPool, False), (LlamaPool, True), (TransformersPool, False)],
    ids=["llama", "llama by lengths", "transformers"],
)
@torch.inference_mode()
def test_pieces_equal_whole_texts(kind, by_length, share, name, dtype, near, monkeypatch):
    """Texts fed in ragged pieces give the logits of each text alone in one forward.

    float64 is compared as closely as transformers is exact: its norms are float32 throughout.
    """
    calls = varlen.pretend(monkeypatch) if by_length else []
    model, rng = kin(name).to(dtype), random.Random(5)
    texts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (9, 1, 17, 4)]
    whole = [model(torch.tensor([text])).logits[0, :, :VOCAB] for text in texts]
    assert is_plain_llama(model) and pool_objection(model, 128) is None
    pool, count = kind(model, Limits(VOCAB, 4, 40, COLUMNS, share)), 0
    for line, text in enumerate(texts):
        assert pool.admit(line, text, len(text)) is not None
    for line, first, logits in feed(pool, texts, rng):
        torch.testing.assert_close(logits, whole[line][first : first + len(logits)], rtol=near, atol=near)
        count += len(logits)
    assert count > 12 and bool(calls) == by_length


@torch.inference_mode()
def test_pool_survives_a_failed_allocation(monkeypatch):
    """Keys without values would shift every layer behind them."""
    model = kin("llama")
    pool, ids = TransformersPool(model, Limits(VOCAB, 2, 40, COLUMNS)), [1, 5, 2]
    assert pool.admit(0, ids, len(ids)) is not None
    whole, new_zeros, calls = model(torch.tensor([ids])).logits[0, :, :VOCAB], torch.Tensor.new_zeros, []

    def fail_once(tensor, *sizes, **keys):
        calls.append(sizes)
        if len(calls) == 2:
            raise MemoryError
        return new_zeros(tensor, *sizes, **keys)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.Tensor, "new_zeros", fail_once)
        list(feed(pool, [ids], random.Random(5)))
    assert len(calls) == 2 and not pool.stored
    pool = TransformersPool(model, Limits(VOCAB, 2, 40, COLUMNS))
    assert pool.admit(0, ids, len(ids)) is not None
    for _, first, logits in feed(pool, [ids], random.Random(5)):
        torch.testing.assert_close(logits, whole[first : first + len(logits)], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_lines_are_read_without_a_copy():
    """If each row has a line, attention reads consecutive lines as a view of the pool."""
    pool = LlamaPool(kin("llama"), Limits(VOCAB, 3, 60, COLUMNS, share_prefixes=False))
    ids = torch.zeros(2, 1, dtype=torch.long)
    part = Part(ids, ids, torch.tensor([1, 2]), slice(1, 3), 5)
    stored = pool.stored[0]
    view = pool.read(stored, part, pool.read_index(part))
    assert view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    gathered = part._replace(span=None)
    assert torch.equal(view, pool.read(stored, gathered, pool.read_index(gathered)))


def test_rows_beyond_the_positions_wait():
    """A row gets all its positions or none, and what a finished row has read is dropped before it waits."""
    positions = PagedPositions(lines=3, positions=64, columns=64)
    first = positions.admit(0, list(range(40)), 40)
    assert positions.admit(1, list(range(100, 130)), 30) is None and positions.count == 24
    first.read = 39
    positions.release(first)
    assert positions.kept and positions.find(list(range(40)))[1] == 39
    second = positions.admit(1, list(range(100, 130)), 30)
    assert second is not None and not positions.kept
    assert len(np.unique(second.positions)) == 30


def test_whole_blocks_are_found_by_later_rows():
    """From the moment that the last token of a block is read, and no block that is not whole."""
    positions, tokens = PagedPositions(lines=2, positions=64, columns=64), list(range(40))
    row = positions.admit(0, tokens, 40)
    assert row is not None
    for read in (BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK):
        row.read = read
        positions.note(row)
        found = positions.find(tokens)
        assert found == ((row, read) if read >= BLOCK else (None, 0))
    row.read = BLOCK
    positions.release(row)
    assert list(positions.kept) == [row] and positions.find(tokens)[1] == BLOCK


def test_llama_models_get_their_own_forward():
    """Other models run transformers' forward; models with a window or a state get no pool."""
    limits = Limits(13, 1, 4, 4)
    assert isinstance(open_model(kin("llama"), limits).pool, LlamaPool)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=13)).eval()
    assert isinstance(open_model(gpt2, limits).pool, TransformersPool)
    window = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert pool_objection(Qwen2ForCausalLM(window), 4) is None  # no row is longer than the window
    assert "differs from whole forwards" in pool_objection(Qwen2ForCausalLM(window), 5)
    assert pool_objection(object(), 4)
    with pytest.raises(ValueError, match="cannot be served: its keys and values"):
        open_model(Qwen2ForCausalLM(window).eval(), Limits(13, 1, 8, 8))
