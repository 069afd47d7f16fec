"""Drafting ahead against the plain loop: other drafters, other widths from round to round, other forwards."""

import random

import pytest
import torch
from test_generation import (
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

from ram.decoding import generation, par, slots, speculation
from ram.decoding.par import PARParams
from ram.decoding.speculation import WIDTHS, DraftLength


@pytest.fixture
def any_width(monkeypatch):
    """Every round takes a width at random."""
    rng = random.Random(2)
    monkeypatch.setattr(DraftLength, "choose", lambda self: rng.choice(WIDTHS))
    monkeypatch.setattr(DraftLength, "best", lambda self: rng.choice(WIDTHS))


@pytest.mark.parametrize("case", CASES)
def test_transformers_forward_gives_the_same(case, monkeypatch):
    """Models that only transformers can compute decode alike, by every loop."""
    monkeypatch.setattr(slots, "is_plain_llama", lambda model: False)
    roles, params, _ = CASES[case]
    for loop in LOOPS.values():
        assert_same(run(roles, params, ragged_prompts(), **loop), slow_answers(case, torch.float32))


@pytest.mark.parametrize("case", CASES)
def test_a_large_vocabulary_gives_the_same(case, monkeypatch):
    """Ranking and noise for no more tokens than a law needs change nothing."""
    monkeypatch.setattr(par, "LARGE_VOCABULARY", 0)
    roles, params, _ = CASES[case]
    for loop in LOOPS.values():
        assert_same(run(roles, params, ragged_prompts(), **loop), slow_answers(case, torch.float32))


@pytest.mark.parametrize("case", [case for case, (roles, _, _) in CASES.items() if roles == BOTH])
@pytest.mark.parametrize("tight", [True, False])
def test_width_may_change_from_round_to_round(case, tight, any_width, monkeypatch):
    """Whatever width each round takes, with rows coming and going, the answers are the plain loop's."""
    monkeypatch.setattr(speculation, "TIGHT", {"cpu"} if tight else set())
    roles, params, _ = CASES[case]
    for batch_size in (1, 4, 16):
        found = run(roles, params, ragged_prompts(), batch_size=batch_size)
        assert_same(found, slow_answers(case, torch.float32))


@pytest.mark.parametrize("kind", ["ours", "transformers"])
@pytest.mark.parametrize("widths", ["five", "any"])
def test_a_model_that_drafts_for_itself_is_always_right(widths, kind, request, monkeypatch):
    """Nothing that a drafter has read is lost between rounds, also where it did not draft: all is
    accepted.
    """
    if kind == "transformers":
        monkeypatch.setattr(slots, "is_plain_llama", lambda model: False)
    rounds = []
    real = DraftLength.learn
    monkeypatch.setattr(DraftLength, "learn", lambda *args: (rounds.append(args[1:]), real(*args)))
    if widths == "any":
        request.getfixturevalue("any_width")
    model, _ = pair(len(LETTERS), BOTH)
    settings = {"max_new_tokens": 60, "seed": SEED, "draft_tokens": 4 if widths == "five" else None}
    params = PARParams(**KNOBS)
    found = generation.generate(
        model, None, LETTERS, ragged_prompts(), params, drafter=model, batch_size=6, **settings
    )
    assert all(agreed >= compared - 6 for agreed, compared in rounds)  # a row that ends counts one less
    assert sum(compared for _, compared in rounds) > 100
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


def test_drafts_are_worth_their_time():
    """The draft length follows the cost of both models and the agreement, down to none."""

    def settle(step, verify, agreed):
        length = DraftLength()
        for _ in range(40):
            width = length.choose()
            kept = 1 + sum(agreed**i for i in range(1, width))
            length.learn(agreed * kept, kept)
            length.clock(width, width * step, verify(width))
        return length.choose()

    assert settle(0.1, lambda width: 10 + 0.2 * width, 0.9) >= 10
    assert 3 <= settle(1.0, lambda width: 10 + 0.2 * width, 0.8) <= 8
    assert settle(8.0, lambda width: 10 + 0.2 * width, 0.3) == 1
    assert settle(0.1, lambda width: 10 * width, 0.8) == 1
    assert DraftLength(4).choose() == 4
