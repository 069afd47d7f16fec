"""Influence per token: equal to the distributions that decoding used, in a file that can be resumed."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import byte_tokenizer, save_model_folder, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ram.answers import answer_files, influence, influence_files
from ram.answers.jobs import AnswerJob, Pair
from ram.data.text import spelling
from ram.decoding import generation, reference, rows, scoring
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
    "mixture": PARParams("mixture", **KNOBS),
    "snis": PARParams("snis", **KNOBS),
    "eos_priority": PARParams("par", eos_priority=True, **KNOBS),
    "greedy": replace(PARParams("product", **KNOBS), temperature=0.0, base_temperature=0.0),
}
PROMPTS = [[0, 1, 2, 3], [4, 4, 5], [7], [1, 6, 6, 2, 0, 3, 5]]


@pytest.fixture(scope="module")
def models():
    return tiny_model(VOCAB, seed=1), tiny_model(VOCAB, seed=2, extra_rows=2)


def recorded(models, params, monkeypatch):
    """Decode with the plain loop. Return its answers, and by (row, step) the distributions that it used.

    A distribution is (the pair's law, the aligner's own log-probabilities).
    """
    laws, original = {}, reference.next_token_law

    def spy(z_p, z_q, params, seen=None, *rest):
        law = original(z_p, z_q, params, seen, *rest)
        if z_q is not None:  # snis also calls it for the nucleus of its candidates, without an aligner
            steps.append((law, reference.align(z_q, params, seen)))
        return law

    monkeypatch.setattr(reference, "next_token_law", spy)
    answers = []
    for row, prompt in enumerate(PROMPTS):
        steps: list = []
        settings = {"max_new_tokens": 12, "seed": 3, "row_ids": [row], "speculative": False}
        answers += generation.generate(*models, LETTERS, [prompt], params, **settings)
        laws |= {(row, step): law for step, law in enumerate(steps)}
    return answers, laws


@pytest.mark.parametrize("at_once", [1, 30, 2**22])
@pytest.mark.parametrize("name", CASES)
def test_figures_equal_the_plain_loops_distributions(name, at_once, models, monkeypatch):
    """Log-probabilities, divergence, fall-back and candidates agree at every position, for any chunk size."""
    params = CASES[name]
    generations, laws = recorded(models, params, monkeypatch)
    monkeypatch.setattr(scoring, "LAW_LOGITS", {"cpu": at_once})
    for row, answer in enumerate(generations):
        ids = answer.token_ids
        figures = influence.token_figures(*models, LETTERS, PROMPTS[row], ids, params)
        assert (figures["logp"] is None) == (params.sample_mode == "snis")
        for step, token in enumerate(ids):
            law, own = laws[row, step]
            tolerance = {"rel": 1e-3, "abs": 2e-5}
            if figures["logp"] is not None:
                assert figures["logp"][step] == pytest.approx(float(law.logprobs[0, token]), **tolerance)
            expected = float(law.proposal_logprobs[0, token])
            assert figures["logp_proposal"][step] == (
                pytest.approx(expected, **tolerance) if math.isfinite(expected) else None
            )
            assert figures["kl"][step] == pytest.approx(float(law.kl[0]), **tolerance)
            if params.sample_mode == "par_kl":
                above = figures["kl"][step] > params.div_threshold
                assert above == (answer.events[step] == rows.FELL_BACK)
            check_candidates(figures["candidates"][step], law, own[0], token, figures["logp"] is not None)


def check_candidates(candidates, law, own, token, has_pair_law):
    words = [word for word, *_ in candidates]
    assert len(set(words)) == len(words) and LETTERS.convert_ids_to_tokens(token) in words
    by_word = {word: figures for word, *figures in candidates}
    for logprobs, place in ((law.proposal_logprobs[0], 0), (own[:VOCAB], 1)):
        best = logprobs.topk(influence.TOP)
        for value, i in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True):
            if value > 1e-4:  # ties and rounding reorder unlikely tokens
                assert by_word[LETTERS.convert_ids_to_tokens(i)][place] == pytest.approx(
                    value, rel=1e-3, abs=2e-5
                )
    possible = {LETTERS.convert_ids_to_tokens(token)}
    for logprobs in (law.proposal_logprobs[0], own[:VOCAB]):
        best = logprobs.topk(influence.TOP)
        possible |= {
            LETTERS.convert_ids_to_tokens(i)
            for value, i in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True)
            if value > 0
        }
    assert set(words) <= possible
    for word, _, _, p in candidates:
        expected = float(law.logprobs[0, LETTERS.convert_tokens_to_ids(word)].exp())
        assert p == pytest.approx(expected, rel=1e-3, abs=2e-5) if has_pair_law else p is None


def test_sampling_from_the_recomputed_distributions_gives_the_answer(models, monkeypatch):
    """With the row's Gumbel noise the recomputed distributions choose the tokens that decoding chose."""
    params = CASES["par_kl"]
    generations, _ = recorded(models, params, monkeypatch)
    laws, original = [], influence.next_token_law

    def spy(*args):
        laws.append(original(*args))
        return laws[-1]

    monkeypatch.setattr(influence, "next_token_law", spy)
    for row, answer in enumerate(generations):
        laws.clear()
        influence.token_figures(*models, LETTERS, PROMPTS[row], answer.token_ids, params)
        law = torch.cat([chunk.logprobs for chunk in laws])
        steps = torch.arange(len(law))
        noise = reference.gumbel_noise(3, torch.full_like(steps, row), steps, VOCAB)
        assert gumbel_argmax(law, noise).tolist() == answer.token_ids


def test_partial_character_is_shown_as_in_the_vocabulary():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé").input_ids
    words = spelling(tokenizer)
    assert words.word(ids[0]) == "a"
    assert words.word(ids[1]) == tokenizer.convert_ids_to_tokens(ids[1]) != "\ufffd"
    assert words.word(tokenizer.eos_token_id) == "</s>"


def test_tokens_of_equal_text_are_told_apart():
    """A report showed two rows `s`: the second one has its spelling in the vocabulary."""
    vocabulary = {"<unk>": 0, "</s>": 1, "s": 2, "<0x73>": 3, "▁s": 4}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    law = torch.tensor([[0.0, 0.0, 0.5, 0.3, 0.2]]).log()
    (position,) = influence.candidates(fast, [law, law, law], torch.tensor([4]), True)
    assert [text for text, *_ in position] == ["s", "<0x73>", " s"]


@pytest.mark.parametrize("n, count, expected", [(3, 9, [0, 4, 8]), (5, 2, [0, 1]), (1, 7, [0]), (0, 3, [])])
def test_rows_are_evenly_spread(n, count, expected):
    assert influence_files.evenly_spread(n, count) == expected


# ---- the file ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The finished answers of a pair to five prompts: their file and their job."""
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
    job = AnswerJob(
        label="pair",
        pair=Pair(*paths, dtype="float32"),
        params=CASES["par"],
        settings=settings,
        records=[{"instruction": prompt} for prompt in prompts],
        prompts=prompts,
        row_ids=list(range(5)),
        seed=0,
        add_bos=False,
        key="output",
        extra={},
    )
    answer_files.answer_file(folder / "output.json", job, overwrite=False)
    return folder / "output.json", job


def test_interrupted_file_is_continued_and_a_finished_one_kept(answered, monkeypatch):
    """Interruptions after each row do not change the file. It is made again only for other rows."""
    output, job = answered
    path, original = influence_files.figures_path(output), influence.token_figures
    calls: list = []
    influence_files.figures_file(output, job, 3, overwrite=False)
    whole = path.read_bytes()
    figures = influence_files.read_figures(output, job)
    assert list(figures) == [0, 2, 4] and len(figures[2]["logp"]) == len(figures[2]["candidates"])
    path.unlink()

    def interrupted(*args):
        if len(calls) % 2:
            calls.append("interrupt")
            raise KeyboardInterrupt
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr(influence, "token_figures", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            influence_files.figures_file(output, job, 3, overwrite=False)
    influence_files.figures_file(output, job, 3, overwrite=False)
    assert path.read_bytes() == whole and len(calls) == 5  # three rows, two interruptions
    influence_files.figures_file(output, job, 3, overwrite=False)
    assert len(calls) == 5
    with pytest.raises(KeyboardInterrupt):
        influence_files.figures_file(output, job, 2, overwrite=False)


def test_figures_of_other_answers_or_a_damaged_file_are_not_read(answered):
    output, job = answered
    path = influence_files.figures_path(output)
    influence_files.figures_file(output, job, 2, overwrite=True)
    assert influence_files.read_figures(output, replace(job, seed=1)) == {}
    path.write_text(path.read_text()[:-20])
    assert influence_files.read_figures(output, job) == {}
    influence_files.figures_file(output, job, 2, overwrite=False)
    assert list(influence_files.read_figures(output, job)) == [0, 4]


def test_answers_without_token_ids_are_logged(answered, tmp_path, caplog):
    """Answers of older versions have no token ids: this is logged, and no file is made."""
    output, job = tmp_path / "output.json", answered[1]
    answers = answer_files.read_answers(*answered)
    for answer in answers:
        del answer["token_ids"]
    write_jsonl(answer_files.trace_path(output), answers)
    rows = json.loads(answered[0].read_text())
    write_marked(output, rows, job.made_from, answer_files.trace_path(output))
    influence_files.figures_file(output, job, 2, overwrite=False)
    assert "without their token ids; generate them again" in caplog.text
    assert not influence_files.figures_path(output).exists()
    assert influence_files.read_figures(output, job) == {}
