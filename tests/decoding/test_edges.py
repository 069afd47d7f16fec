"""Edges of the laws and draws that random cases seldom reach: ties, far digits, ends that differ by row."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from pairs import BOTH, LETTERS, SEED, assert_same, pair, ragged_prompts, run
from tiny import tiny_model

from ram.decoding import generation, par
from ram.decoding.cache import Limits, open_model
from ram.decoding.drafting import Fixed
from ram.decoding.engine import Engine
from ram.decoding.par import PARParams
from ram.decoding.requests import Request

VOCAB = 128_256


@pytest.mark.parametrize("mode", ["product", "snis"])
def test_proposal_breaks_the_aligners_ties_at_temperature_0(mode):
    """The limit of P Q^(1/T): among the aligner's best inside P, the best of the proposal."""
    params = PARParams(mode, temperature=0, base_temperature=1.0, repetition_penalty=1.0, n_candidates=3)
    z_p = torch.tensor([[0.0, 1.0, 2.0, 3.0, -20.0]])
    z_q = torch.tensor([[5.0, 5.0, 5.0, 1.0, 9.0]])
    candidates = torch.tensor([[2, 1, 2]])  # 2 twice
    law = par.token_logprobs(z_p, z_q, params, candidates=candidates)
    assert law.tolist() == [[-math.inf, -math.inf, 0.0, -math.inf, -math.inf]]


def test_draws_are_made_in_float64():
    """Two scores that differ in their tenth digit are told apart, with and without a whole vocabulary."""
    noise = torch.full((1, VOCAB), -100.0, dtype=torch.float64)
    noise[0, 7], noise[0, 9] = 10.0, 10.0 + 1e-9
    assert par.gumbel_argmax(torch.zeros(1, VOCAB), noise).tolist() == [9]
    keys = torch.arange(40), torch.zeros(40, dtype=torch.int64)
    found = par.gumbel_noise(SEED, *keys, VOCAB)
    assert found.dtype == torch.float64 and len(found.unique()) == found.numel()


def test_divergence_is_summed_in_float64():
    """Over 128k tokens, in the order of no thread: the sum of its float32 terms to the last digit."""
    torch.manual_seed(0)
    z_p, z_q = torch.randn(2, 1, VOCAB)
    p, q = (torch.log_softmax(z, dim=-1) for z in (z_p, z_q))
    exact = math.fsum((p.exp() * (p - q)).flatten().tolist())
    assert par.kl_divergence(z_p, z_q).item() == pytest.approx(exact, rel=1e-13)


def test_rows_with_other_ends_do_not_share_a_law():
    """With eos_priority the law knows what ends an answer, and aligners of one engine differ in that."""
    params = PARParams("par", eos_priority=True, temperature=1.0, base_temperature=1.5)
    proposal = pair(len(LETTERS), BOTH)[0]
    models = {name: tiny_model(len(LETTERS), 100) for name in "ab"}
    models["b"].config = copy.deepcopy(models["b"].config)
    models["b"].config.eos_token_id = [0, 2, 4, 6]
    settings = {"max_new_tokens": 12, "seed": SEED, "speculative": False}
    prompts = ["abc", "dd", "hgf", "ab", "e", "gg", "fa", "hhh"]
    limits = Limits(len(LETTERS), rows=16, positions=400, columns=40, share_prefixes=False)
    served = {name: open_model(model, limits) for name, model in models.items()}
    engine, tickets = Engine(open_model(proposal, limits), LETTERS, Fixed(1), aligners=served), {}
    for row, prompt in enumerate(prompts):
        for name in models:
            ids = tuple(LETTERS(prompt).input_ids)
            tickets[name, row] = engine.ticket(Request(ids, name, params, 12, seed=SEED, row_id=row))
            engine.add(tickets[name, row])
    while not engine.idle:
        engine.step()
    texts = {}
    for name, model in models.items():
        found = generation.generate(proposal, model, LETTERS, prompts, params, **settings)
        texts[name] = [answer.token_ids for answer in found]
        assert [tickets[name, row].row.ids for row in range(len(prompts))] == texts[name]
    found = generation.generate(
        proposal, models["b"], LETTERS, prompts, replace(params, eos_priority=False), **settings
    )
    assert sum(answer.token_ids != ids for answer, ids in zip(found, texts["b"], strict=True)) > 2


@pytest.mark.parametrize("mode", sorted(par.SAMPLE_MODES))
def test_greedy_takes_the_most_likely_token_of_the_finished_law(mode):
    """Also where par_kl falls back and where one part of a mixture is random; NaN stays an error."""
    generator = torch.Generator().manual_seed(3)
    z_p, z_q = (2 * torch.randn(64, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    candidates = None
    params = PARParams(mode, temperature=0.7, n_candidates=5 if mode == "snis" else None, div_threshold=3.0)
    if mode == "snis":
        candidates = par.next_token_law(z_p, None, params).logprobs.topk(5).indices
    law = par.next_token_law(z_p, z_q, params, candidates=candidates)
    greedy = par.next_token_law(z_p, z_q, replace(params, greedy=True), candidates=candidates)
    assert torch.equal(greedy.logprobs.argmax(-1), law.logprobs.argmax(-1))
    assert torch.equal(greedy.logprobs.exp().sum(-1), torch.ones(64, dtype=torch.float64))
    assert set(greedy.logprobs.unique().tolist()) == {0.0, -math.inf}
    assert mode != "par_kl" or 0 < law.fell_back.sum() < 64
    z_p[0] = math.nan
    broken = par.next_token_law(z_p, z_q, replace(params, greedy=True), candidates=candidates)
    assert par.checked(broken.logprobs.argmax(-1), broken)[0] == -1


@pytest.mark.parametrize("mode", sorted(par.SAMPLE_MODES))
def test_greedy_pair_is_drafted_for_greedily(mode):
    """The engine equals the plain loop; if the nucleus is the whole vocabulary, `par` accepts all drafts."""
    own = {"n_candidates": 3} if mode == "snis" else {}
    wide = {"top_p": 1.0, "repetition_penalty": 1.0, "base_temperature": 1.0, "base_top_p": 1.0}
    params = PARParams(mode, greedy=True, temperature=0.8, div_threshold=1.2, **wide, **own)
    fast, slow = (run(BOTH, params, ragged_prompts(6), speculative=flag) for flag in (True, False))
    assert_same(fast, slow)
    if mode == "par":
        assert all(answer.stats["accepted"] == answer.stats["drafted"] for answer in fast)
    if mode != "snis":  # its candidates are drawn
        assert_same(run(BOTH, params, ragged_prompts(6), seed=SEED + 1), fast)
