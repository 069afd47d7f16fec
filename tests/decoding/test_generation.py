"""Generation against slow references: one row, no padding, no cache, a full forward per token and model."""

import copy
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import varlen
from pairs import (
    ALIGNER,
    BOTH,
    CASES,
    LETTERS,
    LOOPS,
    PIECES,
    PROPOSAL,
    SEED,
    STOP,
    assert_same,
    last_logits,
    pair,
    ragged_prompts,
    run,
    slow_answers,
)
from tiny import Scripted, byte_tokenizer, tiny_model, tiny_tokenizer

from ram.decoding import generation, par, reference, rows
from ram.decoding.par import PARParams
from ram.errors import UserError

OTHERS = {  # settings so near that a law must be told from theirs
    "temperature": 1.1,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "base_temperature": 1.6,
    "base_top_p": 1.0,
    "base_repetition_penalty": 1.0,
    "n_candidates": 1,
    "expert_temperature": 1.0,
    "div_threshold": 9.0,
    "eos_priority": False,
    "mixture_weight": 0.6,
    "kl_direction": "forward",
}


# ---- the law of whole sequences ----------------------------------------------------------------------------
def next_probs(models, params, context, vocab, eos):
    """The exact next-token law; snis summed over everything its candidates can be."""
    z_p, z_q = last_logits(models, context, vocab)
    seen = torch.tensor([context])
    if params.sample_mode != "snis" or z_p is None or z_q is None:
        return par.token_logprobs(z_p, z_q, params, seen, eos)[0].exp()
    nucleus, total = par.token_logprobs(z_p, None, params)[0].exp(), torch.zeros(vocab)
    for candidates in itertools.product(nucleus.nonzero().flatten().tolist(), repeat=params.n_candidates):
        law = par.token_logprobs(z_p, z_q, params, seen, eos, torch.tensor([candidates]))[0].exp()
        total += math.prod(nucleus[c] for c in candidates) * law
    return total


def sequence_law(models, params, prompt, vocab, eos, length):
    """{token ids: probability} of every answer of at most `length` tokens."""
    finished, open_prefixes = {}, {(): 1.0}
    for step in range(length):
        grown = {
            (*prefix, token): mass * q
            for prefix, mass in open_prefixes.items()
            for token, q in enumerate(next_probs(models, params, [*prompt, *prefix], vocab, (eos,)).tolist())
            if q > 0
        }
        ended = {ids: mass for ids, mass in grown.items() if ids[-1] == eos or step + 1 == length}
        finished, open_prefixes = finished | ended, {k: v for k, v in grown.items() if k not in ended}
    assert sum(finished.values()) == pytest.approx(1, abs=1e-5)
    return finished


def chi_square_excess(counts, law):
    """How many standard deviations chi-square lies above its mean; infinite for an impossible answer."""
    if counts.keys() - law.keys():
        return math.inf
    draws = counts.total()
    cells = [(counts[ids], draws * mass) for ids, mass in law.items() if draws * mass >= 5]
    rest = draws - sum(n for n, _ in cells), draws - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    freedom = len(cells) - 1
    return (sum((n - e) ** 2 / e for n, e in cells) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("case", CASES)
def test_whole_answers_follow_the_exact_law(case):
    """4,000 answers fit the enumerated law, and not that of any setting changed which the law depends on."""
    (roles, params, decisive), tokenizer = CASES[case], tiny_tokenizer("abc")
    models, vocab, eos, prompt = pair(5, roles), len(tokenizer), tokenizer.eos_token_id, [0, 1]
    settings = {"batch_size": 4000, "max_new_tokens": 3, "stop": (), "seed": 3}
    answers = run(roles, params, [prompt] * 4000, tokenizer, **settings)
    counts = Counter(tuple(g.token_ids) for g in answers)

    def excess(settings):
        return chi_square_excess(counts, sequence_law(models, settings, prompt, vocab, eos, length=3))

    assert excess(params) < 4
    for key in decisive:
        assert excess(replace(params, **{key: OTHERS[key]})) > 6, key
    if case.startswith("par_kl"):
        (other,) = par.KL_FALLBACKS.keys() - {params.kl_fallback}
        assert excess(replace(params, kl_fallback=other)) > 6
        tokens = sum(len(g.token_ids) for g in answers)
        assert 0.1 < sum(g.events.count("fell_back") for g in answers) / tokens < 0.9


# ---- token for token ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_batched_and_cached_equals_slow_reference(case, dtype, loop):
    """Tokens, text, events and statistics of 16 ragged rows equal the uncached, unpadded recomputation."""
    roles, params, _ = CASES[case]
    found = run(roles, params, ragged_prompts(), dtype=dtype, **LOOPS[loop])
    assert_same(found, slow_answers(case, dtype))
    for answer, role in itertools.product(found, ("proposal", "aligner")):
        forwards, given = answer.stats[f"{role}_forwards"], roles[role == "aligner"]
        if loop in ("plain", "no drafts") or not given:
            assert forwards == len(answer.token_ids) * given
    if loop == "far ahead" and roles == BOTH:
        verified = sum(g.stats["proposal_forwards"] for g in found)
        assert verified < 0.9 * sum(len(g.token_ids) for g in found)
    assert {g.finish_reason for g in found} == {"stop", "length"}
    if roles == BOTH:
        gated = {"fell_back"} if case.startswith("par_kl") else set()
        assert {event for g in found for event in g.events} == {"agreed", "changed"} | gated
        assert 0 < sum(g.stats["accepted"] for g in found) < sum(g.stats["drafted"] for g in found)


@pytest.mark.parametrize("loop", ["no drafts", "far ahead"])
@pytest.mark.parametrize("case", CASES)
def test_attention_by_lengths_equals_slow_reference(case, loop, monkeypatch):
    """Drafts of one token and verifications of many give the same answers if lengths replace the masks."""
    calls = varlen.pretend(monkeypatch)
    roles, params, _ = CASES[case]
    found = run(roles, params, ragged_prompts(), dtype=torch.float64, **LOOPS[loop])
    assert_same(found, slow_answers(case, torch.float64))
    assert {1, max(calls)} <= set(calls) and max(calls) > 1


@pytest.mark.parametrize("case", CASES)
def test_batch_size_and_order_change_nothing(case):
    """Rows one by one, in other batches or in another order with their row ids give the same answers."""
    (roles, params, _), prompts = CASES[case], ragged_prompts()
    whole = run(roles, params, prompts, batch_size=16)
    lengths = [len(g.token_ids) for g in whole]
    assert 2 * sum(length == max(lengths) for length in lengths) <= 16  # the batch shrinks on its way
    for batch_size in (1, 5):
        assert_same(run(roles, params, prompts, batch_size=batch_size), whole)
    order = random.Random(1).sample(range(16), 16)
    shuffled = run(roles, params, [prompts[i] for i in order], batch_size=7, row_ids=order)
    assert_same(shuffled, [whole[i] for i in order])


def test_row_id_and_seed_decide_the_draw():
    """The same prompt gives other text for another row id or seed, and the same text for the same two."""
    roles, params, _ = CASES["par"]
    first, second, again = run(roles, params, ["abc"] * 3, row_ids=[0, 1, 0], stop=())
    assert_same([first], [again])  # a CPU's kernel may round two rows of one batch differently
    assert first.token_ids != second.token_ids
    assert run(roles, params, ["abc"], seed=SEED + 1, stop=())[0].token_ids != first.token_ids


def test_prompts_as_ids_equal_prompts_as_text():
    """Token ids and the text they stand for are the same prompt."""
    prompts = ragged_prompts()
    ids = [LETTERS(prompt).input_ids for prompt in prompts]
    assert_same(run(*CASES["par"][:2], ids), run(*CASES["par"][:2], prompts))


def test_positions_start_at_the_first_token_of_a_prompt():
    """Padding does not count: a model that reads absolute positions sees the same ones in any batch."""
    model = Scripted(PIECES, "abcdef", 1)
    answers = generation.generate(model, None, PIECES, ["a", "aba"], PARParams(), max_new_tokens=3)
    assert [g.text for g in answers] == ["abc", "cde"]


@pytest.mark.parametrize("case", CASES)
def test_rows_beyond_the_tokenizer_do_not_exist(case):
    """Embedding rows that name no token change nothing, though their logits are far above all others."""
    (roles, params, _), vocab = CASES[case], len(LETTERS)
    sizes = ((26, 2, 4), (100, 1, 6))  # seed, layers, extra rows: of the models that `pair` gives
    padded = [
        tiny_model(vocab, seed, layers, extra_rows=extra) if wanted else None
        for (seed, layers, extra), wanted in zip(sizes, roles, strict=True)
    ]
    with torch.no_grad():
        assert all(m(torch.tensor([[0, 1]])).logits.argmax(-1).min() >= vocab for m in padded if m)
    found = generation.generate(
        *padded, LETTERS, ragged_prompts(), params, max_new_tokens=16, seed=SEED, stop=STOP
    )
    assert_same(found, run(roles, params, ragged_prompts()))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("roles", [PROPOSAL, ALIGNER], ids=["proposal", "aligner"])
def test_greedy_equals_transformers(roles, penalty):
    """A temperature of 0 gives what transformers gives for each prompt alone, by that role's penalty."""
    own, other = ("base_", "") if roles == PROPOSAL else ("", "base_")
    keys = {f"{own}temperature": 0, f"{own}repetition_penalty": penalty, f"{other}repetition_penalty": 3.0}
    prompts, expected = ragged_prompts(), []
    model = pair(len(LETTERS), BOTH)[roles == ALIGNER]
    for prompt in prompts:
        ids = torch.tensor([LETTERS(prompt).input_ids])
        special = {"eos_token_id": LETTERS.eos_token_id, "pad_token_id": LETTERS.pad_token_id}
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            repetition_penalty=penalty,
            **special,
        )
        expected.append(answer[0, ids.shape[1] :].tolist())
    found = [g.token_ids for g in run(roles, PARParams(**keys), prompts, stop=())]
    assert found == expected
    unpenalised = replace(PARParams(**keys), **{f"{own}repetition_penalty": 1.0})
    assert (found == [g.token_ids for g in run(roles, unpenalised, prompts, stop=())]) == (penalty == 1)


def test_bfloat16_answers_are_valid():
    """Two bfloat16 models give tokens of the vocabulary, mostly those that float32 begins with."""
    found = run(*CASES["par_kl"][:2], ragged_prompts(), dtype=torch.bfloat16)
    wide = run(*CASES["par_kl"][:2], ragged_prompts())
    assert all(0 <= i < len(LETTERS) for g in found for i in g.token_ids)
    assert all(math.isfinite(g.stats["mean_kl"]) for g in found)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(found, wide, strict=True)) >= 14


# ---- where an answer ends ----------------------------------------------------------------------------------
def follow(script, stop=(), prompt="ab", tokenizer=PIECES, max_new_tokens=6):
    model = Scripted(tokenizer, script, len(tokenizer(prompt).input_ids))
    settings = {"max_new_tokens": max_new_tokens, "stop": stop}
    return generation.generate(model, None, tokenizer, [prompt], PARParams(), **settings)[0]


@pytest.mark.parametrize(
    "script, stop, text, tokens, reason",
    [
        ("abcdef", ("cd",), "ab", 4, "stop"),  # spans two tokens
        (["a", "cde", "f"], ("d",), "ac", 2, "stop"),  # inside one token
        (["a", "cde", "f"], ("e", "d"), "ac", 2, "stop"),  # two in one token: the first in the text
        ("abcdef", ("ef", "bcd", "de"), "a", 4, "stop"),  # the one that is complete first
        ("aaabbb", ("aab",), "a", 4, "stop"),  # begins again in mid-way
        ("abcdef", ("dc", "g"), "abcdef", 6, "length"),
        ("abcdef", ("",), "abcdef", 6, "length"),
        ("abcdef", ("f",), "abcde", 6, "stop"),  # with the last token that is allowed
    ],
)
def test_stop_strings(script, stop, text, tokens, reason):
    """An answer ends with the token that completes a stop string, which its text leaves out."""
    answer = follow(script, stop)
    assert (answer.text, len(answer.token_ids), answer.finish_reason) == (text, tokens, reason)


@pytest.mark.parametrize("prompt", ["abcd", "abc"], ids=["whole", "up to the answer"])
def test_stop_string_of_the_prompt_does_not_stop(prompt):
    """Only the answer is searched for stop strings: neither the prompt nor the seam between the two."""
    answer = follow("dabef", ("cd",), prompt=prompt, max_new_tokens=5)
    assert (answer.text, answer.finish_reason) == ("dabef", "length")


def test_stop_string_of_split_characters():
    """A stop string is found though each of its characters spans several tokens."""
    tokenizer = byte_tokenizer()
    answer = follow(tokenizer("né日本🙂!").input_ids, ("本🙂",), "x", tokenizer, max_new_tokens=99)
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("né日", "stop", 3 + 3 + 3 + 4)


def test_nothing_follows_eos():
    """EOS is the last token, a stop, and no part of the text."""
    answer = follow(["a", "b", "</s>", "c"])
    assert answer.token_ids == [0, 1, PIECES.eos_token_id]
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize("value, ids", [(2, (2,)), ([2, 3], (2, 3))], ids=["int", "list"])
@pytest.mark.parametrize("where", ["config", "generation_config"])
@pytest.mark.parametrize("role", [0, 1], ids=["proposal", "aligner"])
def test_eos_wherever_it_is_configured(role, where, value, ids):
    """An EOS of either model's config or generation config ends the answer, beside the tokenizer's."""
    models = [Scripted(PIECES, "abc", 1), Scripted(PIECES, "abc", 1)]
    models[role] = Scripted(PIECES, "abc", 1, **{where: value})
    answer = generation.generate(*models, PIECES, ["a"], PARParams(), max_new_tokens=6)[0]
    assert (answer.token_ids, answer.finish_reason) == ([0, 1, 2], "stop")
    assert rows.eos_token_ids(PIECES, *models) == (*ids, PIECES.eos_token_id)


@pytest.mark.parametrize("mode", par.SAMPLE_MODES)
def test_eos_priority_ends_where_the_proposal_would(mode):
    """With eos_priority an answer ends where the proposal's best token is EOS, whatever the aligner wants."""
    models = Scripted(PIECES, ["a", "a", "</s>"], 1, margin=0.1), Scripted(PIECES, "b", 1)
    ends = {}
    for priority in (True, False):
        settings = {"base_top_p": 1.0, "div_threshold": 1e9, "n_candidates": 60, "top_p": 1.0}
        params = PARParams(mode, eos_priority=priority, mixture_weight=1.0, **settings)
        answer = generation.generate(*models, PIECES, ["a"], params, max_new_tokens=5)[0]
        ends[priority] = PIECES.convert_ids_to_tokens(answer.token_ids)
    assert ends == {True: ["b", "b", "</s>"], False: ["b"] * 5}


# ---- mistakes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "models, prompts, max_new_tokens, message",
    [
        ((None, None), ["a"], 4, "at least one model"),
        (PROPOSAL, ["a", ""], 4, "prompt 1 has no tokens"),
        (PROPOSAL, [[]], 4, "prompt 0 has no tokens"),
        (PROPOSAL, ["a"], 0, "max_new_tokens=0: expected at least 1"),
        (PROPOSAL, ["a" * 250, "a"], 7, "257 positions, but the proposal holds 256: lower max_length"),
        (ALIGNER, ["a" * 250, "a"], 7, "257 positions, but the aligner holds 256: lower max_length"),
        ((True, tiny_model(6, 1)), ["a"], 4, "the aligner has 6 vocabulary rows, but EOS has the token id 8"),
    ],
)
def test_mistakes_are_explained(models, prompts, max_new_tokens, message):
    """What cannot be decoded raises ValueError and says what was given and expected."""
    given = pair(len(LETTERS), BOTH)
    models = [g if m is True else m or None for g, m in zip(given, models, strict=True)]
    with pytest.raises(ValueError, match=message):
        generation.generate(*models, LETTERS, prompts, PARParams(), max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("speculative", [True, False])
@pytest.mark.parametrize(
    "case, damaged",
    [
        *((case, role) for case in ("par", "par_kl", "product", "snis", "mds", "mixture") for role in (0, 1)),
        ("proposal_alone", 0),
        ("aligner_alone", 1),
    ],
)
def test_nan_logits_of_either_model_are_an_error(case, damaged, speculative):
    """A damaged aligner once gave the proposal's own answers, and a damaged proposal the aligner's."""
    roles, params, _ = CASES[case]
    models = [model and copy.deepcopy(model) for model in pair(len(LETTERS), roles)]
    with torch.no_grad():
        models[damaged].model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="token 0 of an answer has no law"):
        generation.generate(*models, LETTERS, ["abc", "b"], params, max_new_tokens=4, speculative=speculative)


def test_batch_beyond_memory_is_halved(monkeypatch):
    """The plain loop decodes a batch that does not fit in two halves, and gives each answer once."""
    sizes, decode_batch = [], reference.decode_batch

    def limited(proposal, aligner, tokenizer, prompt_ids, *args, **settings):
        sizes.append(len(prompt_ids))
        steps = decode_batch(proposal, aligner, tokenizer, prompt_ids, *args, **settings)
        for step, batch in enumerate(steps):
            if len(prompt_ids) > 4 and step == 3:
                raise torch.OutOfMemoryError
            yield batch

    monkeypatch.setattr(reference, "decode_batch", limited)
    roles, params, _ = CASES["par"]
    settings = {"max_new_tokens": 16, "seed": SEED, "stop": STOP, "speculative": False, "batch_size": 16}
    models = pair(len(LETTERS), roles)
    answers = list(generation.generate_iter(*models, LETTERS, ragged_prompts(), params, **settings))
    assert sizes[0] == 16 and sizes[-1] <= 4 and len(answers) == 16
    by_index = dict(answers)
    assert_same([by_index[index] for index in range(16)], slow_answers("par", torch.float32))
