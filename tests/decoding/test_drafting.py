"""Drafts against the plain loop: other drafters, widths that change, other forwards; the draft policies."""

import random
from types import SimpleNamespace

import pytest
import torch
from pairs import (
    BOTH,
    CASES,
    KNOBS,
    LETTERS,
    LOOPS,
    PROPOSAL,
    SEED,
    STOP,
    assert_same,
    pair,
    ragged_prompts,
    run,
    slow_answers,
)
from tiny import tiny_model

from ram.decoding import cache, generation, noise, par
from ram.decoding.drafting import WIDTHS, Clocked, Counted, DraftPolicy, Fixed, Load
from ram.decoding.par import PARParams
from ram.decoding.rounds import RoundResult
from ram.decoding.scheduler import Role


@pytest.fixture
def any_width(monkeypatch):
    """Every round has a random width."""
    rng = random.Random(2)
    monkeypatch.setattr(Counted, "width", lambda self, load: rng.choice(WIDTHS))


@pytest.mark.parametrize("case", CASES)
def test_transformers_forward_gives_the_same_answers(case, monkeypatch):
    """Models that only transformers can compute give the same answers by every loop."""
    monkeypatch.setattr(cache, "is_plain_llama", lambda model: False)
    roles, params, _ = CASES[case]
    for loop in LOOPS.values():
        assert_same(run(roles, params, ragged_prompts(), **loop), slow_answers(case, torch.float32))


@pytest.mark.parametrize("case", CASES)
def test_sparse_noise_gives_the_same_answers(case, monkeypatch):
    """Ranking, and noise, for only as many tokens as a law needs change no answer."""
    for module in (noise, par):
        monkeypatch.setattr(module, "LARGE_VOCABULARY", 0)
    roles, params, _ = CASES[case]
    for loop in LOOPS.values():
        assert_same(run(roles, params, ragged_prompts(), **loop), slow_answers(case, torch.float32))


@pytest.mark.parametrize("case", [case for case, (roles, _, _) in CASES.items() if roles == BOTH])
def test_widths_that_change_give_the_same_answers(case, any_width):
    """Whatever width each round has, with rows coming and going, the answers are the plain loop's."""
    roles, params, _ = CASES[case]
    for batch_size in (1, 4, 16):
        found = run(roles, params, ragged_prompts(), batch_size=batch_size)
        assert_same(found, slow_answers(case, torch.float32))


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("widths", ["five", "any"])
def test_a_model_that_drafts_for_itself_is_always_accepted(widths, kind, request, monkeypatch):
    """A drafter loses nothing that it has read between rounds, also if it drafts in none: all is accepted."""
    if kind == "transformers":
        monkeypatch.setattr(cache, "is_plain_llama", lambda model: False)
    rounds = []
    real = DraftPolicy.learn
    monkeypatch.setattr(
        DraftPolicy, "learn", lambda self, result: (rounds.append(result), real(self, result))
    )
    if widths == "any":
        request.getfixturevalue("any_width")
    model, _ = pair(len(LETTERS), BOTH)
    settings = {"max_new_tokens": 60, "seed": SEED, "draft_tokens": 4 if widths == "five" else None}
    params = PARParams(**KNOBS)
    found = generation.generate(
        model, None, LETTERS, ragged_prompts(), params, drafter=model, batch_size=6, **settings
    )
    drafts = [result.agreement[False] for result in rounds]
    assert all(kept >= compared - 6 for compared, kept in drafts)  # a row that ends counts one less
    assert sum(compared for compared, _ in drafts) > 100
    if widths == "five":
        for g in found:
            assert g.stats["proposal_forwards"] == -(-len(g.token_ids) // 5)
    plain = run(PROPOSAL, params, ragged_prompts(), max_new_tokens=60, stop=(), speculative=False)
    assert_same(found, plain)


@pytest.mark.parametrize("role", [0, 1])
def test_another_model_may_draft_for_one_alone(role):
    """A drafter saves forwards and changes no token, whichever of the two models stands alone."""
    alone = [None, None]
    alone[role], drafter = pair(len(LETTERS), BOTH)[role], pair(len(LETTERS), BOTH)[1 - role]
    params, settings = PARParams(**KNOBS), {"max_new_tokens": 16, "seed": SEED, "stop": STOP}
    plain = generation.generate(*alone, LETTERS, ragged_prompts(), params, speculative=False, **settings)
    for draft_tokens in (None, 1, 4):
        settings |= {"drafter": drafter, "draft_tokens": draft_tokens, "batch_size": 6}
        found = generation.generate(*alone, LETTERS, ragged_prompts(), params, **settings)
        assert_same(found, plain)
    key = ("proposal_forwards", "aligner_forwards")[role]
    assert sum(g.stats[key] for g in found) < 0.9 * sum(len(g.token_ids) for g in found)


@pytest.mark.parametrize("case", [case for case, (roles, _, _) in CASES.items() if roles == BOTH])
def test_pair_with_a_third_model_as_its_drafter_gives_the_same_answers(case):
    """Tokens, events and the aligner's own acceptance are the plain loop's, whoever drafts."""
    roles, params, _ = CASES[case]
    drafter = tiny_model(len(LETTERS), 41)
    for loop in ({"draft_tokens": 3, "batch_size": 6}, {"draft_tokens": 0}, {"batch_size": 5}):
        answers = run(roles, params, ragged_prompts(), drafter=drafter, **loop)
        assert_same(answers, slow_answers(case, torch.float32))


def test_good_third_drafter_saves_forwards_of_both_members():
    """The aligner as a separate drafter is kept as often as if it drafted itself."""
    roles, params, _ = CASES["par"]
    members = pair(len(LETTERS), BOTH)
    answers = run(roles, params, ragged_prompts(), drafter=members[1], draft_tokens=4)
    for key in ("proposal_forwards", "aligner_forwards"):
        assert sum(a.stats[key] for a in answers) < 0.6 * sum(len(a.token_ids) for a in answers)


def load(is_pair=True, rows=1, new=False, drafter=None, verifier=None, room=100):
    sources = ("verifier", "drafter") if is_pair else ("verifier", None)
    return Load(Role(verifier, drafter, *sources), rows, 0, new, room)


def test_clocked_width_follows_costs_and_agreement():
    """The width follows the cost of both models and the agreement, down to no drafts."""

    def settle(step, verify, agreed):
        policy = Clocked()
        for _ in range(40):
            width = policy.width(load())
            kept = 1 + sum(agreed**i for i in range(1, width))
            counts = {True: [kept, agreed * kept], False: [0, 0]}
            policy.learn(RoundResult(width, step, verify(width), counts, []))
        return policy.width(load())

    assert settle(0.1, lambda width: 10 + 0.2 * width, 0.9) >= 10
    assert 3 <= settle(1.0, lambda width: 10 + 0.2 * width, 0.8) <= 8
    assert settle(8.0, lambda width: 10 + 0.2 * width, 0.3) == 1
    assert settle(0.1, lambda width: 10 * width, 0.8) == 1
    assert Clocked().width(load(new=True)) == 1
    assert Fixed(4).width(load()) == 5


def test_counted_width_follows_sizes_and_agreement(served_model):
    """By its table a small drafter that agrees is worth long drafts, and one of equal size is not."""
    large, small = served_model(layers=24, parameters=1_000_000_000), served_model(2, 1_000_000)

    def settle(drafter, agreed, is_pair=True, room=100):
        policy, widths = Counted(), []
        for _ in range(64):
            width = policy.width(load(is_pair, 4, drafter=drafter, verifier=large, room=room))
            kept = 1 + sum(agreed**i for i in range(1, width))
            counts = {True: [0, 0], False: [0, 0]} | {is_pair: [kept, agreed * kept]}
            policy.learn(RoundResult(width, random.random(), random.random(), counts, []))
            widths.append(width)
        return widths

    assert settle(small, 0.95)[-1] >= 6 > settle(small, 0.5)[-1]
    assert settle(large, 0.3)[-1] == 1
    assert settle(small, 0.9) == settle(small, 0.9)  # the times of the rounds change nothing
    assert 4 in settle(large, 0.0, is_pair=False)[-17:]  # a model alone goes on trying,
    assert set(settle(large, 0.0, is_pair=False, room=16)[-40:]) == {1}  # if its answers can pay for it


@pytest.fixture
def served_model():
    def make(layers, parameters):
        pool = SimpleNamespace(device=torch.device("cpu"))
        return SimpleNamespace(layers=layers, parameters=parameters, vocab_size=1000, pool=pool)

    return make


def test_same_command_gives_the_same_rounds(monkeypatch):
    """`generate` decides by acceptance counts alone: two runs have the same widths and forwards."""
    widths, real = [], Counted.width
    monkeypatch.setattr(Counted, "width", lambda *args: (widths.append(real(*args)), widths[-1])[1])
    answers = [run(*CASES["par"][:2], ragged_prompts(), batch_size=5, stop=()) for _ in range(2)]
    assert answers[0] == answers[1]
    assert widths[: len(widths) // 2] == widths[len(widths) // 2 :] and max(widths) > 1
