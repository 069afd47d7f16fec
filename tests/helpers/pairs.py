"""A pair of tiny models, settings for every mode, and the answers that `generate` must give with them.

A slow reference recomputes the answers: one row, no padding, no cache, a full forward per token and model.
"""

import functools
import random

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from ram.decoding import generation, par
from ram.decoding.par import PARParams
from ram.decoding.rows import Generation

KNOBS = {
    "temperature": 0.8,
    "top_p": 0.93,
    "repetition_penalty": 1.4,
    "base_temperature": 1.2,
    "base_top_p": 0.9,
    "base_repetition_penalty": 1.3,
    "n_candidates": 3,
    "expert_temperature": 1.5,
    "div_threshold": 1.2,
    "mixture_weight": 0.4,
}
BOTH, PROPOSAL, ALIGNER = (True, True), (True, False), (False, True)
POST, NUCLEUS = ["temperature", "top_p", "repetition_penalty"], ["base_temperature", "base_top_p"]
CASES = {  # name -> models, settings, the settings that its law depends on
    "par": (BOTH, PARParams("par", **KNOBS), POST + NUCLEUS),
    "par_kl": (BOTH, PARParams("par_kl", **KNOBS), [*POST, *NUCLEUS, "div_threshold"]),
    "par_kl_aligner": (
        BOTH,
        PARParams("par_kl", kl_fallback="aligner", **KNOBS),
        [*POST, "base_top_p", "div_threshold"],
    ),
    "par_kl_reverse": (
        BOTH,
        PARParams("par_kl", kl_direction="reverse", **KNOBS),
        [*POST, *NUCLEUS, "div_threshold", "kl_direction"],
    ),
    "product": (BOTH, PARParams("product", **KNOBS), POST + NUCLEUS),
    "snis": (BOTH, PARParams("snis", **KNOBS), [*POST[::2], *NUCLEUS, "n_candidates"]),
    "mds": (BOTH, PARParams("mds", **KNOBS), [*POST, "base_temperature", "expert_temperature"]),
    "mixture": (BOTH, PARParams("mixture", **KNOBS), [*POST[::2], *NUCLEUS, "mixture_weight"]),
    "eos_priority": (BOTH, PARParams("par", eos_priority=True, **KNOBS), [*POST, "eos_priority"]),
    "proposal_alone": (PROPOSAL, PARParams(**KNOBS), [*NUCLEUS, "base_repetition_penalty"]),
    "aligner_alone": (ALIGNER, PARParams(**KNOBS), POST),
}
LETTERS, STOP = tiny_tokenizer("abcdefgh"), ("ca", "dd")  # stop strings of two tokens
PIECES = tiny_tokenizer(["a", "b", "c", "d", "e", "f", "cde"])
SEED = 11


def ragged_prompts(count=16):
    rng = random.Random(5)
    return ["".join(rng.choices("abcdefgh", k=rng.randint(1, 12))) for _ in range(count)]


@functools.cache
def pair(vocab, roles, dtype=torch.float32):
    """Proposal and aligner with different laws; None for a role that is not used."""
    models = (tiny_model(vocab, 26, layers=2, dtype=dtype), tiny_model(vocab, 100, dtype=dtype))
    return tuple(model if used else None for model, used in zip(models, roles, strict=True))


@torch.no_grad()
def last_logits(models, context, vocab):
    """Both models' logits after `context`: one row, no padding, no cache."""
    return [m and m(torch.tensor([context]), use_cache=False).logits[:, -1, :vocab] for m in models]


def run(roles, params, prompts, tokenizer=LETTERS, dtype=torch.float32, **settings):
    """`generate` with the pair, or with one of its models."""
    settings = {"max_new_tokens": 16, "seed": SEED, "stop": STOP} | settings
    return generation.generate(*pair(len(tokenizer), roles, dtype), tokenizer, prompts, params, **settings)


def settled(stats):
    """The statistics without the counts of forwards, which depend on the width of the rounds."""
    return {key: value for key, value in stats.items() if not key.endswith("_forwards")}


def assert_same(answers, expected):
    """Tokens, text, events, finish reasons and settled statistics are equal."""
    assert [(g.token_ids, g.text, g.finish_reason, g.events) for g in answers] == [
        (g.token_ids, g.text, g.finish_reason, g.events) for g in expected
    ]
    for a, b in zip(answers, expected, strict=True):
        assert settled(a.stats) == pytest.approx(settled(b.stats), rel=1e-4, abs=1e-6)


@functools.cache
def slow_answers(case, dtype):
    """The answers that `generate` must give: every prefix again through each model, alone and unpadded."""
    (roles, params, _), vocab, eos = CASES[case], len(LETTERS), LETTERS.eos_token_id
    models = pair(vocab, roles, dtype)
    return [
        slow_answer(models, params, LETTERS(prompt).input_ids, row, vocab, eos)
        for row, prompt in enumerate(ragged_prompts())
    ]


def slow_answer(models, params, prompt, row, vocab, eos):
    """One of `slow_answers`."""
    ids, events, divergences, accepted, changed, finish = [], [], [], 0, 0, None
    while finish is None:
        (z_p, z_q), seen = last_logits(models, prompt + ids, vocab), torch.tensor([prompt + ids])

        def draw(logprobs, stream=0):
            noise = par.gumbel_noise(SEED, torch.tensor([row]), torch.tensor([len(ids)]), vocab, stream)
            return int((logprobs.double() + noise).argmax())

        candidates = None
        if z_p is not None and z_q is not None:
            nucleus = par.token_logprobs(z_p, None, params)
            candidates = torch.tensor([[draw(nucleus, 1 + j) for j in range(params.n_candidates)]])
        token = draw(par.token_logprobs(z_p, z_q, params, seen, (eos,), candidates))
        if candidates is not None:
            log_p, log_q = z_p.double().log_softmax(-1), z_q.double().log_softmax(-1)
            divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
            reverse = float((log_q.exp() * (log_q - log_p)).sum())
            gate = divergences[-1] if params.kl_direction == "forward" else reverse
            gated = params.sample_mode == "par_kl" and gate > params.div_threshold
            is_own = draw(nucleus) == token
            events.append("fell_back" if gated else "agreed" if is_own else "changed")
            changed += not is_own
            accepted += draw(par.token_logprobs(None, z_q, params, seen)) == token
        ids.append(token)
        text = "".join("abcdefgh"[i] for i in ids if i < 8)  # EOS and PAD are no text
        if token == eos or any(s in text for s in STOP):
            finish = "stop"
        elif len(ids) == 16:
            finish = "length"
    n, is_pair = len(ids), bool(events)
    stats = {
        "proposal_forwards": n * (models[0] is not None),
        "aligner_forwards": n * (models[1] is not None),
        "drafted": n * is_pair,
        "accepted": accepted,
        "fallback_fraction": events.count("fell_back") / n,
        "changed_fraction": changed / n,
        "mean_kl": sum(divergences) / n,
    }
    for stop in STOP:
        text = text.split(stop)[0]
    return Generation(ids, text, finish, stats, events if is_pair else None)


LOOPS = {
    "plain": {"speculative": False},
    "adaptive": {"batch_size": 5},
    "no drafts": {"draft_tokens": 0},
    "one ahead": {"draft_tokens": 1, "batch_size": 3},
    "far ahead": {"draft_tokens": 9, "batch_size": 16},  # past ends, stop strings and the last position
}
