"""The packed forward pass against the padded ones: values, gradients, families, precisions, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from ram.data.tokenization import TokenizedDataset
from ram.decoding import generation
from ram.decoding.par import PARParams
from ram.training import logps
from ram.training.logps import packed_logps, padded_logps
from ram.training.packing import Segments

VOCAB = 97
BOTH = ("target", "negative")


def ragged(count, seed, longest=100):
    """Examples whose three parts have random lengths from 1 up, short ones more often than long ones."""
    rng = np.random.default_rng(seed)
    sizes = {part: rng.integers(1, rng.integers(2, longest, size=count)) for part in ("prompt", *BOTH)}
    return TokenizedDataset(
        {part: rng.integers(VOCAB, size=size.sum()).astype(np.int32) for part, size in sizes.items()},
        {part: np.cumsum([0, *size]) for part, size in sizes.items()},
        {},
    )


def model_of(family="llama", seed=0, dtype=torch.float32, **settings):
    """A small model of a family with random weights large enough to make its logits differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, max_position_embeddings=256, **sizes, **special, **settings
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(dtype).eval()


def run(way, model, data, rows, answers=BOTH, drawn=None):
    """Log-probabilities by answer, counts, and the gradient under uneven upstream weights."""
    model.zero_grad()
    found, counts = way(model, data, rows, answers, 0, drawn)
    upstream = torch.linspace(-1, 2, len(rows) * len(answers), dtype=model.dtype)
    (torch.cat([found[answer] for answer in answers]) * upstream).sum().backward()
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return {answer: values.detach() for answer, values in found.items()}, counts, gradient


def assert_equal(model, data, rows, answers=BOTH, drawn=None, rtol=1e-5, gradient_rtol=1e-5):
    packed, padded = (run(way, model, data, rows, answers, drawn) for way in (packed_logps, padded_logps))
    assert packed[1] == padded[1] and packed[0].keys() == padded[0].keys()
    for answer in answers:
        torch.testing.assert_close(packed[0][answer], padded[0][answer], rtol=rtol, atol=0)
    assert (packed[2] - padded[2]).norm() <= gradient_rtol * padded[2].norm()


@pytest.mark.parametrize("seed", range(12))
def test_packed_equals_padded(seed):
    """Ragged lengths in any order, one or both answers, negatives left out, grouped keys, tied weights."""
    rng = np.random.default_rng(100 + seed)
    model = model_of(
        seed=seed, num_key_value_heads=int(rng.choice([1, 2, 4])), tie_word_embeddings=bool(seed % 2)
    )
    assert logps.prepare(model, 128) is None
    data, count = ragged(9, seed), int(rng.integers(1, 9))
    rows = rng.permutation(9)[:count]
    assert_equal(model, data, rows)
    assert_equal(model, data, rows, ("target",))
    for drawn in (rng.random(count) < 0.5, np.zeros(count, dtype=bool)):
        assert_equal(model, data, rows, drawn=drawn)


def test_packed_equals_padded_in_float64():
    """The sums to 1e-12, the gradient to what Llama's norms leave of it: they compute in float32 always."""
    model = model_of(num_key_value_heads=2, dtype=torch.float64)
    assert logps.prepare(model, 128) is None
    assert_equal(model, ragged(6, 0), np.arange(6), rtol=1e-12, gradient_rtol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt_neox", "qwen3", "phi"])
def test_other_families(family):
    """Biases, windows that are long enough, partial rotary embeddings, norms on heads."""
    keys = {} if family in ("gpt_neox", "phi") else {"num_key_value_heads": 2}
    model = model_of(family, **keys)
    assert logps.prepare(model, 128) is None
    assert_equal(model, ragged(5, 1), np.arange(5))


def test_answers_do_not_see_each_other():
    """Changing one answer's tokens changes nothing of the other, of its example and of the next."""
    model, data = model_of(), ragged(3, 0)
    logps.prepare(model, 128)
    before, _, _ = run(packed_logps, model, data, [0, 1, 2])
    for answer, other in (BOTH, BOTH[::-1]):
        changed = TokenizedDataset(data.ids | {answer: (data.ids[answer] + 1) % VOCAB}, data.offsets, {})
        after, _, _ = run(packed_logps, model, changed, [0, 1, 2])
        assert torch.equal(after[other], before[other]) and not torch.equal(after[answer], before[answer])


def test_empty_prompts_and_answers():
    """An empty prompt's first token has no log-probability, an empty answer's sum is 0, in both ways."""
    sizes = {"prompt": [0, 5, 2], "target": [3, 0, 1], "negative": [1, 4, 0]}
    data = TokenizedDataset(
        {part: np.arange(sum(size)) for part, size in sizes.items()},
        {part: np.cumsum([0, *size]) for part, size in sizes.items()},
        {},
    )
    model = model_of()
    logps.prepare(model, 128)
    assert_equal(model, data, [0, 1, 2])
    assert run(packed_logps, model, data, [0, 1, 2])[1] == {"target": [2, 0, 1], "negative": [0, 4, 0]}


def test_checkpointed_activations():
    """Recomputing the layers in the backward pass sees the same segments."""
    model, data = model_of().train(), ragged(5, 2)
    logps.prepare(model, 128)
    plain = run(packed_logps, model, data, np.arange(5))
    model.activation_checkpointing_enable()
    recomputed = run(packed_logps, model, data, np.arange(5))
    torch.testing.assert_close(recomputed[2], plain[2], rtol=1e-6, atol=0)


def test_under_autocast():
    """bfloat16 compute: as far from float32 as the padded pass is, sums and gradients in float32."""
    model, data = model_of(num_key_value_heads=2), ragged(6, 3)
    exact = run(padded_logps, model, data, np.arange(6))

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    assert logps.prepare(model, 128, autocast) is None
    with autocast():
        packed, padded = (run(way, model, data, np.arange(6)) for way in (packed_logps, padded_logps))
    assert packed[0]["target"].dtype == torch.float32
    for part in (
        lambda found: found[0]["target"],
        lambda found: found[0]["negative"],
        lambda found: found[2],
    ):
        truth = part(exact)
        ours, theirs = ((part(found) - truth).norm() / truth.norm() for found in (packed, padded))
        assert 1e-5 < ours < 1.5 * theirs
        assert theirs < 0.5  # measured: 0.13 for the gradient; of unrelated vectors it would be 1 or more


def test_decoding_is_untouched():
    """A model that was made ready for packing decodes the same texts as before."""
    tokenizer = tiny_tokenizer("abcdefgh")
    model = tiny_model(len(tokenizer), seed=1, layers=2)
    prompts, params = [[0, 1, 2], [3], [4, 5, 6, 7, 1]], PARParams(temperature=1.0)

    def decode():
        found = generation.generate(None, model, tokenizer, prompts, params, max_new_tokens=20, seed=0)
        return [answer.token_ids for answer in found]

    before = decode()
    assert logps.prepare(model, 64) is None
    assert decode() == before


@pytest.mark.parametrize("block", [0, 8, 20, 10**6])
def test_attention_equals_one_dense_mask(monkeypatch, block):
    """Segments alone, a few under one mask, all under one mask: as one mask of all tokens has it."""
    segments = Segments((5, 3, 1, 4, 2, 30, 7, 6), (0, 2, 0, 1, 0, 0, 29, 0))
    total, dense, start = sum(segments.lengths), torch.zeros(58, 58, dtype=torch.bool), 0
    for i, (length, prefix) in enumerate(zip(segments.lengths, segments.prefixes, strict=True)):
        before = start - segments.lengths[i - 1]
        for query in range(start, start + length):
            dense[query, start : query + 1] = True
            dense[query, before : before + prefix] = True
        start += length
    query, key, value = (torch.randn(1, heads, total, 8, requires_grad=True) for heads in (4, 2, 2))
    monkeypatch.setattr(logps, "BLOCK", block)
    logps._calls.cache_clear()
    found = logps.attend(query, key, value, segments, 0.3)
    logps._calls.cache_clear()
    wanted = F.scaled_dot_product_attention(query, key, value, dense, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_kernel_equals_the_loop(monkeypatch):
    """What a GPU's kernel is handed gives the loop's result, with a stand-in that does as it documents."""
    heads, key_heads, width = 4, 2, 8
    segments = Segments((5, 3, 1, 4, 2), (0, 2, 0, 1, 0))
    total = sum(segments.lengths)
    query, key, value = (torch.randn(1, n, total, width) for n in (heads, key_heads, key_heads))

    def varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, scale, window_size, enable_gqa):
        assert window_size == (-1, 0) and enable_gqa and q_ends.dtype == k_ends.dtype == torch.int32
        assert (longest_q, longest_k) == (5, 5)
        found = []
        for i in range(len(q_ends) - 1):
            q_i, k_i, v_i = (
                x[ends[i] : ends[i + 1]].transpose(0, 1)
                for x, ends in ((q, q_ends), (k, k_ends), (v, k_ends))
            )
            mask = torch.ones(q_i.shape[1], k_i.shape[1], dtype=torch.bool)
            mask = mask.tril(k_i.shape[1] - q_i.shape[1])  # aligned at the end
            options = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
            found.append(F.scaled_dot_product_attention(q_i[None], k_i[None], v_i[None], **options)[0])
        return torch.cat(found, dim=1).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    found = logps.attend_at_once(query, key, value, segments, 0.3)
    torch.testing.assert_close(found, logps.attend(query, key, value, segments, 0.3))


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 2}, "no linear function"),
        ("cohere", {"num_key_value_heads": 2}, "no linear function"),
        ("granite", {"logits_scaling": 3.0, "num_key_value_heads": 2}, "no linear function"),
        ("mistral", {"sliding_window": 20, "num_key_value_heads": 2}, "does not reach over max_length=128"),
        ("bloom", {}, "cannot be replaced"),
    ],
)
def test_what_cannot_be_packed_is_left_alone(family, settings, reason):
    """Capped or scaled logits, short windows, attention of its own: a reason, and the model as it was."""
    model = model_of(family, **settings)
    before = model.config._attn_implementation
    assert reason in logps.prepare(model, 128)
    assert model.config._attn_implementation == before


def test_a_difference_that_no_key_tells_is_found(monkeypatch):
    """A model that does more to its logits than its configuration says is found out on a few tokens."""
    model = model_of()
    forward = type(model).forward

    def bent(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return type(output)(logits=0.9 * output.logits)

    monkeypatch.setattr(type(model), "forward", bent)
    assert "instead of" in logps.prepare(model, 128)
    assert model.config._attn_implementation == "sdpa" and not model.training


@pytest.mark.slow
def test_compiled_layers():
    """torch.compile of the layers changes no value, and compiles nothing anew for other lengths."""
    model, data = model_of().train(), ragged(12, 4)
    logps.prepare(model, 128)
    batches = [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10, 11], [4, 8, 9]]
    plain = [run(packed_logps, model, data, rows) for rows in batches]
    model.base_model.compile(dynamic=True)
    for i, (wanted, rows) in enumerate(zip(plain, batches, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            found = run(packed_logps, model, data, rows)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=0)
        assert (found[2] - wanted[2]).norm() <= 1e-4 * wanted[2].norm()
