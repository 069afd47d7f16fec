"""The same command twice gives the same texts, in bfloat16 too: no choice depends on the clock."""

import random

import pytest
import torch
from pairs import CASES, ragged_prompts
from pairs import run as decode

from ram.decoding import rounds


class Clock:
    """A clock whose steps are random, from a microsecond to minutes."""

    def __init__(self, seed: int) -> None:
        self.random, self.now = random.Random(seed), 0.0

    def perf_counter(self) -> float:
        self.now += 10 ** self.random.uniform(-6, 2)
        return self.now


@pytest.mark.parametrize("case", ["par", pytest.param("par_kl", marks=pytest.mark.slow)])
def test_bfloat16_answers_do_not_depend_on_the_clock(case, monkeypatch):
    """200 rows of two models with random weights, whose flat distributions show every change of a width."""
    roles, params, _ = CASES[case]
    answers = []
    for seed in (1, 2):
        monkeypatch.setattr(rounds, "time", Clock(seed))
        answers.append(decode(roles, params, ragged_prompts(200), dtype=torch.bfloat16, batch_size=16))
    assert answers[0] == answers[1]
    assert sum(answer.stats["drafted"] > 0 for answer in answers[0]) > 150
