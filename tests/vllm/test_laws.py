"""What a pair returns to vLLM, followed by vLLM's sampler, is the pair's distribution."""

import itertools

import pytest
import torch

from ram.decoding.par import INTRODUCED, NEG_INF, SAMPLE_MODES, PARParams, token_logprobs
from ram.vllm import laws

V, EOS, ROWS = 19, (3,), 130  # more rows than two chunks
MODES = [
    *({"sample_mode": mode} for mode in SAMPLE_MODES if mode not in ("par_kl", "snis")),
    {"sample_mode": "par_kl", "kl_fallback": "aligner"},
    {"sample_mode": "par_kl", "kl_fallback": "proposal"},
]
GRID = {
    "temperature": (0.0, 0.7, 1.3),
    "limits": ({}, {"top_p": 0.8}, {"top_k": 4}, {"top_p": 0.8, "top_k": 4}),
    "repetition_penalty": (1.0, 1.3),
    "base": ({"base_top_p": 0.8}, {"base_temperature": 0.0}, {"base_top_p": 0.9, "base_top_k": 5}),
    "eos_priority": (False, True),
}


@pytest.fixture(scope="module")
def positions():
    """Both models' raw logits, and the contexts; the divergences lie on both sides of 0.5."""
    rng = torch.Generator().manual_seed(1)
    z_p = 1.5 * torch.randn(ROWS, V, generator=rng) - 1
    noise = torch.randn(ROWS, V, generator=rng)
    z_q = z_p + torch.linspace(0, 2, ROWS).unsqueeze(-1) * noise + 0.5
    z_p[::5, EOS[0]] = 9.0
    return z_p, z_q, torch.randint(0, V, (ROWS, 6), generator=rng)


def settings():
    """Every combination of a mode and the settings in GRID."""
    for mode, temperature, limits, penalty, base, eos in itertools.product(MODES, *GRID.values()):
        values = {"base_temperature": 1.2, "div_threshold": 0.5, "top_p": 1.0} | base | limits | mode
        yield PARParams(
            **values,
            temperature=temperature,
            repetition_penalty=penalty,
            eos_priority=eos,
            expert_temperature=0.9,
        )


def sampler(logits, contexts, temperature, top_p, top_k, repetition_penalty):
    """vLLM 0.32: penalties, temperature, top-k, top-p; then the log-probabilities that it draws from."""
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, contexts, True)
    scaled = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = torch.where(seen, scaled, logits)
    if temperature < 1e-5:
        return torch.full_like(logits, NEG_INF).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / temperature
    ascending, order = logits.sort(dim=-1)
    if top_k > 0:
        ascending = ascending.masked_fill(ascending < ascending[:, -top_k].unsqueeze(-1), NEG_INF)
    if top_p < 1:
        below = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        below[:, -1] = False
        ascending = ascending.masked_fill(below, NEG_INF)
    return torch.empty_like(logits).scatter(-1, order, ascending).log_softmax(-1)


def both(positions, params):
    """The distribution through vLLM, and ours."""
    z_p, z_q, contexts = positions
    logits = laws.fused_logits(z_p, z_q, params, EOS)
    own = {"temperature", "top_p", "top_k", "repetition_penalty"}
    values = {key: getattr(params, key) for key in own} if laws.form_of(params) == laws.OPEN else {}
    through = sampler(logits, contexts, **laws.request_settings(params) | values)
    return through, token_logprobs(z_p, z_q, params, contexts, EOS)


def test_kept_settings_give_the_same_distribution(positions):
    """All combinations that a form admits; both sides of the gate and of eos_priority occur."""
    kept = 0
    for params in settings():
        try:
            laws.check(params)
        except ValueError:
            continue
        through, expected = both(positions, params)
        assert torch.equal(through == NEG_INF, expected == NEG_INF), params
        torch.testing.assert_close(through, expected, rtol=0, atol=2e-5, msg=lambda m, p=params: f"{p}\n{m}")
        kept += 1
    assert kept > 200


def differing(positions, **values):
    """The share of rows whose distribution through vLLM is another one."""
    through, expected = both(positions, PARParams(**{"base_temperature": 1.2, "div_threshold": 0.5} | values))
    return float(((through.exp() - expected.exp()).abs().amax(-1) > 1e-3).float().mean())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_mode": "par", "top_p": 0.8, "top_k": 4, "temperature": 1.3}, "the other order"),
        ({"sample_mode": "product", "repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"sample_mode": "mds", "repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"sample_mode": "par_kl", "repetition_penalty": 1.3}, "kl_fallback=proposal"),
        ({"sample_mode": "par_kl", "repetition_penalty": 1.0, "temperature": 0.0}, "argmax"),
        ({"sample_mode": "product", "repetition_penalty": 1.0, "temperature": 0.0}, "argmax"),
        ({"sample_mode": "par", "temperature": 0.005}, "0.01"),
        ({"sample_mode": "snis", "n_candidates": 4}, "candidates"),
    ],
)
def test_other_settings_are_refused(positions, values, message):
    with pytest.raises(ValueError, match=message):
        laws.check(PARParams(**values))
    # What is refused for vLLM's order of operations does differ there.
    if values["sample_mode"] != "snis" and values.get("temperature", 1) > 0.01:
        assert differing(positions, **values) > 0.01


def test_columns_beyond_the_tokenizer_are_impossible(positions):
    z_p, z_q, _ = positions
    params = PARParams("par")
    wide = laws.fused_logits(z_p, z_q, params, EOS, columns=V + 5)
    assert (wide[:, V:] == NEG_INF).all() and torch.equal(
        wide[:, :V], laws.fused_logits(z_p, z_q, params, EOS)
    )


def test_half_precision_logits_are_computed_in_float32(positions):
    z_p, z_q, _ = (x.bfloat16() for x in positions)
    params = PARParams("product", repetition_penalty=1.0)
    fused = laws.fused_logits(z_p, z_q, params)
    assert fused.dtype == torch.float32 and torch.equal(
        fused, laws.fused_logits(z_p.float(), z_q.float(), params)
    )


def test_fixed_settings_leave_the_request_its_own():
    """In the open form a request may set four keys; in the closed form the server has decided all."""
    names = set(PARParams.field_names()) - set(INTRODUCED)  # at their old values they are not named
    own = {"temperature", "top_p", "top_k", "repetition_penalty"}
    assert set(laws.fixed_settings(PARParams("par"))) == names - own
    assert set(laws.fixed_settings(PARParams("product"))) == names


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "aligner"),
        ({"sample_mode": "par"}, "aligner"),
        ({"aligner": "a", "temprature": 1}, "hf_overrides.ram.temprature"),
        ({"aligner": "a", "base_top_p": 2}, "base_top_p=2"),
        ({"aligner": "a"}, "repetition_penalty=1.05"),  # the defaults are par_kl's
    ],
)
def test_overrides_that_cannot_work(values, message):
    with pytest.raises(ValueError, match=message):
        laws.PairSettings.parse(values)


def test_overrides_are_parsed():
    pair = laws.PairSettings.parse(
        {"aligner": "a", "sample_mode": "par", "base_top_p": 1, "digests": {"x": "y"}}
    )
    assert (pair.aligner, pair.digests) == ("a", {"x": "y"})
    assert pair.params == PARParams("par", base_top_p=1)
