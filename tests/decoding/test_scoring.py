"""Scores equal the plain loop's distributions in float64, at every position, for any window and batch."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from pairs import CASES, LETTERS, pair, ragged_prompts
from tiny import tiny_model, tiny_tokenizer

from ram.decoding import generation, reference, scoring
from ram.decoding.par import PARParams
from ram.decoding.scoring import RAW, Row, Scheme
from ram.errors import UserError
from ram.models.small import id_tokenizer

VOCAB = len(LETTERS)
SCORED = [name for name in CASES if name != "snis"]
ROWS = 208


def scheme(name):
    (proposal, aligner), params, _ = CASES[name]
    return Scheme(params, "proposal" if proposal else None, "aligner" if aligner else None)


@pytest.fixture(scope="module")
def models():
    proposal, aligner = pair(VOCAB, (True, True), torch.float64)
    return {"proposal": proposal, "aligner": aligner}


@pytest.fixture(scope="module")
def decoded(models):
    """By case: rows that the plain loop decoded, and the distributions that it used for each, (T, V)."""
    results = {}
    prompts = [LETTERS(prompt).input_ids for prompt in ragged_prompts(ROWS)]
    for name in SCORED:
        steps, original = [], reference.next_token_law

        def spy(*args, steps=steps, original=original):
            law = original(*args)
            steps.append(law.logprobs)
            return law

        members = [models[role] if role else None for role in (scheme(name).proposal, scheme(name).aligner)]
        laws = [[] for _ in prompts]
        lines = range(ROWS)  # the row in each line of the batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "next_token_law", spy)
            batches = reference.decode_batch(
                *members, LETTERS, prompts, scheme(name).params, max_new_tokens=9, seed=1, row_ids=range(ROWS)
            )
            for rows in batches:
                law = steps.pop()
                if len(law) < len(lines):  # the batch has dropped the rows that had ended
                    lines = [line for line in lines if len(laws[line]) < len(rows[line].ids)]
                    assert len(lines) == len(law)
                for line, logprobs in zip(lines, law, strict=True):
                    if len(laws[line]) < len(rows[line].ids):
                        laws[line].append(logprobs)
        answers = [Row(prompt, row.ids) for prompt, row in zip(prompts, rows, strict=True)]
        results[name] = answers, [torch.stack(law) for law in laws]
    return results


@pytest.mark.parametrize("limits", ["whole", "one position"])
@pytest.mark.parametrize("name", SCORED)
def test_scores_equal_the_plain_loops_distributions(name, limits, models, decoded, monkeypatch):
    """Including repetition penalties over prompt and prefix, the support, and the most likely tokens."""
    if limits == "one position":
        monkeypatch.setattr(scoring, "LOGITS", {"cpu": 1})
        monkeypatch.setattr(scoring, "LAW_LOGITS", {"cpu": 1})
    rows, laws = decoded[name]
    count = 8 if limits == "one position" else ROWS
    rows, laws = rows[:count], laws[:count]
    (scores,) = scoring.score(models, LETTERS, rows, [scheme(name)], anchor="proposal", top=VOCAB)
    assert len(scores) == len(rows)
    for row, law, own in zip(rows, laws, scores, strict=True):
        assert own.logprobs.dtype == torch.float64
        expected = law[torch.arange(len(law)), torch.tensor(row.token_ids)]
        torch.testing.assert_close(own.logprobs, expected, rtol=1e-9, atol=1e-9)
        assert own.covered.all()
        whole = torch.full_like(law, math.nan).scatter(1, own.top_ids, own.top_logprobs)
        torch.testing.assert_close(whole, law, rtol=1e-9, atol=1e-9)
        base = raw_logprobs(models["proposal"], row)
        kl = torch.where(law.isinf(), 0.0, law.exp() * (law - base)).sum(-1)
        torch.testing.assert_close(own.kl, kl, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def raw_logprobs(model, row):
    ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
    return model(ids).logits[0, len(row.prompt_ids) - 1 : -1, :VOCAB].log_softmax(-1)


def test_one_pass_yields_every_scheme(models, decoded):
    """A sweep gives what each scheme gives alone, and runs each model as often as one scheme does."""
    rows, _ = decoded["par"]
    rows = [*rows[:20], Row([1], [])]
    calls = []
    handle = models["proposal"].register_forward_hook(lambda *_: calls.append(1))
    try:
        schemes = [scheme(name) for name in SCORED]
        together = scoring.score(models, LETTERS, rows, schemes)
        once = len(calls)
        for own, expected in zip(schemes, together, strict=True):
            (alone,) = scoring.score(models, LETTERS, rows, [own])
            for a, b in zip(alone, expected, strict=True):
                torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-12, atol=1e-12)
            assert alone[-1].logprobs.shape == (0,)
    finally:
        handle.remove()
    used = [own for own in schemes if own.proposal]
    assert len(calls) == once * (1 + len(used))


def test_tokens_outside_the_support_have_no_probability(models):
    """At temperature 0 only the argmax is covered."""
    rows = [Row([0, 3, 1], list(range(VOCAB)))]
    greedy = Scheme(replace(RAW, base_temperature=0.0), aligner=None)
    (scores,) = scoring.score(models, LETTERS, rows, [greedy])
    best = raw_logprobs(models["proposal"], rows[0]).argmax(-1)
    assert scores[0].covered.tolist() == [int(t) == i for i, t in enumerate(best)]
    assert set(scores[0].logprobs.tolist()) <= {0.0, -math.inf}


@pytest.mark.parametrize("mode", ["par", "par_kl", "product", "mds", "mixture"])
def test_short_answers_sum_to_one(mode):
    """All answers that end within three tokens, and all beginnings of longer ones, have probability 1."""
    tokenizer = tiny_tokenizer("ab")
    eos = tokenizer.eos_token_id
    models = {"proposal": tiny_model(4, 1).double(), "aligner": tiny_model(4, 2).double()}
    ended = [
        [*prefix, eos] for n in range(3) for prefix in itertools.product(range(4), repeat=n)
        if eos not in prefix
    ]  # fmt: skip
    cut = [list(p) for p in itertools.product(range(4), repeat=3) if eos not in p]
    rows = [Row([0, 1], answer) for answer in [*ended, *cut]]
    params = PARParams(mode, temperature=1.3, top_p=0.95, base_top_p=0.9, div_threshold=0.2)
    (scores,) = scoring.score(models, tokenizer, rows, [Scheme(params)])
    assert sum(math.exp(float(s.logprobs.sum())) for s in scores) == pytest.approx(1, abs=1e-12)


def test_large_vocabularies_are_scored_in_windows():
    """V = 128,256: no tensor holds all positions at once, and the scores equal the whole pass."""
    model = tiny_model(128_256, 3, hidden=4)
    ids = torch.randint(0, 128_000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = id_tokenizer(128_256)
    widths = []
    handle = model.register_forward_hook(lambda *args: widths.append(args[-1].logits.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "LOGITS", {"cpu": 8 * 128_256})
        patch.setattr(scoring, "LAW_LOGITS", {"cpu": 3 * 128_256})
        (scores,) = scoring.score({"q": model}, tokenizer, [Row(ids[:4], ids[4:])], [Scheme(RAW, None, "q")])
    handle.remove()
    assert widths == [8, 8, 8, 8, 4]
    with torch.no_grad():
        whole = model(torch.tensor([ids])).logits[0, 3:-1].log_softmax(-1)
    expected = whole[torch.arange(36), torch.tensor(ids[4:])]
    torch.testing.assert_close(scores[0].logprobs, expected, rtol=1e-5, atol=1e-5)


def test_impossible_requests_are_refused(models):
    with pytest.raises(ValueError, match="snis has no likelihood"):
        scheme("snis")
    assert Scheme(CASES["snis"][1], aligner=None)  # the proposal alone has one
    with pytest.raises(ValueError, match="row 1 has no context"):
        scoring.score(models, LETTERS, [Row([1], [2]), Row([], [2])], [Scheme()])
    with pytest.raises(ValueError, match="do not belong together"):
        scoring.score({"proposal": tiny_model(3, 1)}, LETTERS, [Row([1], [3])], [Scheme(aligner=None)])
    damaged = tiny_model(VOCAB, 1)
    with torch.no_grad():
        damaged.lm_head.weight[0] = math.nan
    with pytest.raises(UserError, match="not numbers"):
        scoring.score({"proposal": damaged}, LETTERS, [Row([1], [2])], [Scheme(aligner=None)])


def test_generated_answers_are_covered(models):
    """What the engine decodes has a finite score in float32 too: both compute the same support."""
    single = {name: model.float() for name, model in zip(models, pair(VOCAB, (True, True)), strict=True)}
    params = CASES["par_kl"][1]
    prompts = [LETTERS(prompt).input_ids for prompt in ragged_prompts(30)]
    answers = generation.generate(*single.values(), LETTERS, prompts, params, max_new_tokens=12, seed=2)
    rows = [Row(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    (scores,) = scoring.score(single, LETTERS, rows, [Scheme(params)])
    assert all(bool(own.covered.all()) for own in scores)
