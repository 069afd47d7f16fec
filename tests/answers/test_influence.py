"""Figures of finished answers: those of the plain loop's own laws, in a file that goes on and is reused."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, save_model_folder, tiny_model, tiny_tokenizer

from ram.answers import answer_files, influence
from ram.answers.jobs import Job, Pair
from ram.decoding import generation, reference
from ram.decoding.par import PARParams, gumbel_argmax
from ram.storage.files import write_jsonl
from ram.storage.provenance import write_marked

LETTERS = tiny_tokenizer("abcdefgh")
VOCAB = len(LETTERS)
KNOBS = {"temperature": 0.8, "top_p": 0.93, "repetition_penalty": 1.6, "base_temperature": 1.2}
KNOBS |= {"base_top_p": 0.9, "div_threshold": 1.2, "n_candidates": 3, "expert_temperature": 1.5}
CASES = {
    "par": PARParams("par", **KNOBS),
    "par_kl": PARParams("par_kl", **KNOBS),
    "par_kl_aligner": PARParams("par_kl", kl_fallback="aligner", **KNOBS),
    "product": PARParams("product", **KNOBS),
    "mds": PARParams("mds", **KNOBS),
    "snis": PARParams("snis", **KNOBS),
    "eos_priority": PARParams("par", eos_priority=True, **KNOBS),
    "greedy": replace(PARParams("product", **KNOBS), temperature=0.0, base_temperature=0.0),
}
PROMPTS = [[0, 1, 2, 3], [4, 4, 5], [7], [1, 6, 6, 2, 0, 3, 5]]


@pytest.fixture(scope="module")
def models():
    return tiny_model(VOCAB, seed=1), tiny_model(VOCAB, seed=2, extra_rows=2)


def recorded(models, params, monkeypatch):
    """What the plain loop drew, and by (row, step) the laws that it drew from."""
    laws, original = {}, reference.next_token_law

    def spy(z_p, z_q, given, seen=None, *rest):
        law = original(z_p, z_q, given, seen, *rest)
        if z_q is not None:  # not the nucleus that snis draws its candidates from
            own = reference.warp(z_q, given, seen)
            kept.append((law, own))
        return law

    monkeypatch.setattr(reference, "next_token_law", spy)
    found = []
    for row, prompt in enumerate(PROMPTS):
        kept: list = []
        settings = {"max_new_tokens": 12, "seed": 3, "row_ids": [row], "speculative": False}
        found += generation.generate(*models, LETTERS, [prompt], params, **settings)
        laws |= {(row, step): law for step, law in enumerate(kept)}
    return found, laws


@pytest.mark.parametrize("at_once", [1, 30, influence.AT_ONCE])
@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_the_plain_loops_laws(name, at_once, models, monkeypatch):
    """At every position: the token's log-probability by the pair's and by the proposal's law, the divergence,
    the fall-back, the probabilities of the candidates; whatever is computed at once.
    """
    params = CASES[name]
    generations, laws = recorded(models, params, monkeypatch)
    monkeypatch.setattr(influence, "AT_ONCE", at_once)
    for row, answer in enumerate(generations):
        ids = answer.token_ids
        figures = influence.token_figures(*models, LETTERS, PROMPTS[row], ids, params)
        assert (figures["logp"] is None) == (params.sample_mode == "snis")
        for step, token in enumerate(ids):
            law, own = laws[row, step]
            near = {"rel": 1e-3, "abs": 2e-5}
            if figures["logp"] is not None:
                assert figures["logp"][step] == pytest.approx(float(law.logprobs[0, token]), **near)
            expected = float(law.proposal_logprobs[0, token])
            assert figures["logp_proposal"][step] == (
                pytest.approx(expected, **near) if math.isfinite(expected) else None
            )
            assert figures["kl"][step] == pytest.approx(float(law.kl[0]), **near)
            if params.sample_mode == "par_kl":
                above = figures["kl"][step] > params.div_threshold
                assert above == (answer.events[step] == reference.FELL_BACK)
            check_candidates(figures["candidates"][step], law, own[0], token, figures["logp"] is not None)


def check_candidates(found, law, own, token, fixed):
    words = [word for word, *_ in found]
    assert len(set(words)) == len(words) and LETTERS.convert_ids_to_tokens(token) in words
    by_word = {word: figures for word, *figures in found}
    for each, place in ((law.proposal_logprobs[0], 0), (own[:VOCAB], 1)):
        best = each.topk(influence.TOP)
        for value, i in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True):
            if value > 1e-4:  # ties and rounding reorder what has no weight
                found_value = by_word[LETTERS.convert_ids_to_tokens(i)][place]
                assert found_value == pytest.approx(value, rel=1e-3, abs=2e-5)
    possible = {LETTERS.convert_ids_to_tokens(token)}
    for each in (law.proposal_logprobs[0], own[:VOCAB]):
        best = each.topk(influence.TOP)
        possible |= {
            LETTERS.convert_ids_to_tokens(i)
            for value, i in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True)
            if value > 0
        }
    assert set(words) <= possible
    for word, _, _, p in found:
        expected = float(law.logprobs[0, LETTERS.convert_tokens_to_ids(word)].exp())
        assert p == pytest.approx(expected, rel=1e-3, abs=2e-5) if fixed else p is None


def test_drawing_from_the_figures_laws_gives_the_answer_again(models, monkeypatch):
    """With the row's noise the laws choose the very tokens: they are those that decoding used."""
    params = CASES["par_kl"]
    generations, _ = recorded(models, params, monkeypatch)
    laws, original = [], influence.next_token_law
    monkeypatch.setattr(influence, "next_token_law", lambda *given: laws.append(original(*given)) or laws[-1])
    for row, answer in enumerate(generations):
        laws.clear()
        influence.token_figures(*models, LETTERS, PROMPTS[row], answer.token_ids, params)
        law = torch.cat([each.logprobs for each in laws])
        steps = torch.arange(len(law))
        noise = reference.gumbel_noise(3, torch.full_like(steps, row), steps, VOCAB)
        assert gumbel_argmax(law, noise).tolist() == answer.token_ids


def test_words_are_readable():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé").input_ids
    assert influence.word(tokenizer, ids[0]) == "a"
    assert influence.word(tokenizer, ids[1]) == tokenizer.convert_ids_to_tokens(ids[1]) != "\ufffd"
    assert influence.word(tokenizer, tokenizer.eos_token_id) == "</s>"


@pytest.mark.parametrize("n, count, expected", [(3, 9, [0, 4, 8]), (5, 2, [0, 1]), (1, 7, [0]), (0, 3, [])])
def test_rows_are_evenly_spread(n, count, expected):
    assert influence.evenly_spread(n, count) == expected


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A pair's finished answers to five prompts."""
    folder = tmp_path_factory.mktemp("pair")
    paths = [
        save_model_folder(folder / name, tiny_model(VOCAB, seed), LETTERS)
        for seed, name in enumerate(("large", "small"), start=1)
    ]
    settings = SimpleNamespace(
        max_length=24,
        max_prompt_length=12,
        batch_size=5,
        speculative=True,
        stop_str=None,
        backend="local",
        drafter=None,
        cuda_graphs=False,
        template="ram",
        multiround=True,
        proposal_device="cpu",
        aligner_device="cpu",
    )
    prompts = ["ab", "c", "ddd", "eh", "f"]
    records = [{"instruction": prompt} for prompt in prompts]
    pair = Pair(*paths, dtype="float32")
    given = ("pair", pair, CASES["par"], settings, records, prompts, list(range(5)))
    job = Job(*given, seed=0, add_bos=False, key="output", extra={})
    answer_files.answer_file(folder / "output.json", job, overwrite=False)
    return folder / "output.json", job


def test_file_is_made_once_and_goes_on_where_it_stopped(answered, monkeypatch):
    """Stopped after each row and started again the file is what one run makes; then it is left alone, until
    other rows are asked for.
    """
    output, job = answered
    path, original, made = influence.figures_path(output), influence.token_figures, []
    influence.figures_file(output, job, 3, overwrite=False)
    whole = path.read_bytes()
    found = influence.read_figures(output, job)
    assert list(found) == [0, 2, 4] and len(found[2]["logp"]) == len(found[2]["candidates"])
    path.unlink()

    def stopped(*given):
        if len(made) % 2:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(influence, "token_figures", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            influence.figures_file(output, job, 3, overwrite=False)
    influence.figures_file(output, job, 3, overwrite=False)
    assert path.read_bytes() == whole and len(made) == 5  # three rows, two stops
    influence.figures_file(output, job, 3, overwrite=False)
    assert len(made) == 5
    with pytest.raises(KeyboardInterrupt):
        influence.figures_file(output, job, 2, overwrite=False)


def test_figures_of_other_answers_or_a_damaged_file_are_not_read(answered):
    output, job = answered
    path = influence.figures_path(output)
    influence.figures_file(output, job, 2, overwrite=True)
    assert influence.read_figures(output, replace(job, seed=1)) == {}
    path.write_text(path.read_text()[:-20])
    assert influence.read_figures(output, job) == {}
    influence.figures_file(output, job, 2, overwrite=False)
    assert list(influence.read_figures(output, job)) == [0, 4]


def test_answers_without_token_ids_get_a_line(answered, tmp_path, caplog):
    """Answers that an older version left have no token ids: said once, and no file is made."""
    output, job = tmp_path / "output.json", answered[1]
    answers = answer_files.read_answers(*answered)
    for answer in answers:
        del answer["token_ids"]
    write_jsonl(answer_files.trace_path(output), answers)
    rows = json.loads(answered[0].read_text())
    write_marked(output, rows, job.made_from, answer_files.trace_path(output))
    influence.figures_file(output, job, 2, overwrite=False)
    assert "without their token ids; generate them again" in caplog.text
    assert not influence.figures_path(output).exists() and influence.read_figures(output, job) == {}
