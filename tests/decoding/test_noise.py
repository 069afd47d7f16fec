"""Gumbel noise: exact arithmetic, a function of its key alone, and draws that follow the law."""

import functools
import math

import pytest
import torch

from ram.decoding import noise as noise_module
from ram.decoding import par

float64 = functools.partial(torch.tensor, dtype=torch.float64)


def mix(x):
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def reference_noise(seed, row, position, stream, token):
    """SplitMix64's mixing in unbounded integers taken modulo 2^64."""
    golden, key = 0x9E3779B97F4A7C15, seed
    for part in (row, position, stream):
        key = mix(key + golden) ^ mix(part * golden + 0xBF58476D1CE4E5B9)
    bits = mix(mix(key + (token + 1) * golden)) >> 11
    return -math.log(-math.log(max(bits, 1) * 2.0**-53))


def noise(seed, rows, positions, vocab, stream=0):
    return par.gumbel_noise(seed, torch.tensor(rows), torch.tensor(positions), vocab, stream)


@pytest.mark.parametrize("stream", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 2**64 - 1])
def test_noise_equals_integer_reference(seed, stream):
    """The int64 arithmetic equals the mixing in arbitrary precision, whatever the size of its inputs."""
    keys = [(0, 0), (1, 5), (7, 1), (10**6, 4095), (2**40, 2**33)]
    expected = [[reference_noise(seed, *key, stream, t) for t in range(9)] for key in keys]
    actual = noise(seed, *zip(*keys, strict=True), 9, stream)
    torch.testing.assert_close(actual, float64(expected), rtol=0, atol=1e-11)


def test_noise_depends_on_its_key_alone():
    """Repeated, batched, or in a larger vocabulary the noise is the same; any part of the key changes it."""
    base = noise(3, [5], [7], 50)
    assert torch.equal(noise(3, [1, 5, 9], [2, 7, 7], 80)[1:2, :50], base) and base.dtype == torch.float64
    others = ((4, 5, 7, 0), (3, 6, 7, 0), (3, 5, 8, 0), (3, 5, 7, 1), (3, 7, 5, 0))
    values = torch.cat([base] + [noise(seed, [row], [at], 50, stream) for seed, row, at, stream in others])
    assert values.unique().numel() == values.numel()


def test_noise_follows_the_gumbel_law_and_neighbours_do_not_correlate():
    """Kolmogorov-Smirnov against Gumbel's law; adjacent rows, positions, streams, seeds, tokens: no trend."""
    along, still = list(range(400)), [0] * 400
    row, position = noise(0, along, still, 500), noise(0, still, along, 500)
    cdf = torch.exp(-torch.exp(-torch.cat([row[1:], position]).flatten().sort().values))
    gap = (cdf - (torch.arange(len(cdf)) + 0.5) / len(cdf)).abs().max()
    assert row.isfinite().all() and gap * math.sqrt(len(cdf)) < 2
    stream, seed = noise(0, along, still, 500, 1), noise(1, along, still, 500)
    pairs = [(row[1:], row[:-1]), (position[1:], position[:-1]), (row[:, 1:], row[:, :-1])]
    for a, b in [*pairs, (row, stream), (row, seed), (row[1:], position[1:])]:
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(r) * math.sqrt(a.numel()) < 4


def test_gumbel_argmax_draws_the_law():
    """Draws over many positions follow a known law (chi-square), and probability 0 never comes up."""
    law, positions = float64([0.5, 0.3, 0.15, 0.05, 0.0]), torch.arange(200_000)
    drawn = par.gumbel_argmax(law.log(), par.gumbel_noise(2, positions * 0 + 4, positions, 5))
    counts, expected = torch.bincount(drawn, minlength=5), law * len(positions)
    assert counts[4] == 0 and ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 22


@pytest.mark.parametrize("vocab", [30, 700, 5000])
def test_noise_on_the_support_draws_the_same(vocab, monkeypatch):
    """Drawing with the noise of a law's support only gives the whole noise's tokens, by column and in all."""
    monkeypatch.setattr(noise_module, "LARGE_VOCABULARY", 0)
    rng = torch.Generator().manual_seed(vocab)
    rows, at = torch.tensor([[4], [9]]).expand(-1, 3), torch.tensor([[0, 1, 2], [7, 8, 9]])
    for inside in (1, 2, vocab // 5, vocab):
        laws = torch.full((6, vocab), par.NEG_INF)
        for line in range(6):
            some = torch.randperm(vocab, generator=rng)[: max(1, inside - line)]
            laws[line, some] = torch.randn(len(some), generator=rng).log_softmax(-1)
        noise = par.Noise(5, rows, at, vocab, stream=2)
        expected = par.gumbel_argmax(laws, par.gumbel_noise(5, rows.flatten(), at.flatten(), vocab, 2))
        assert torch.equal(noise.draw(laws), expected)
        assert noise.whole is None or 4 * inside > vocab
        for column in range(3):
            assert torch.equal(noise.draw(laws[column::3], columns=column), expected[column::3])
