"""Figures of judgements: the simplest judges, intervals, and what a pair's decoding did."""

import math

import numpy as np
import pytest

from ram.errors import UserError
from ram.evaluation import statistics
from ram.evaluation.judges.dummy import DummyJudge
from ram.evaluation.judges.exact import ExactJudge


def test_simple_judges(tmp_path):
    """The dummy judge prefers longer answers; the exact one needs the toy's rows."""
    found = DummyJudge().compare([{}] * 3, ["aa", "a", "b"], ["a", "aa", "c"], tmp_path)
    assert [row["preference"] for row in found] == [1.0, 0.0, 0.5]
    with pytest.raises(UserError, match="judge=exact needs the rows of the toy data set"):
        ExactJudge().compare([{"instruction": "x"}], ["a"], ["b"], tmp_path)


@pytest.mark.parametrize("n, wins", [(1, 0), (1, 1), (10, 0), (10, 3), (200, 199), (200, 200)])
def test_interval_of_a_share_is_wilsons(n, wins):
    """It solves (p - q)^2 = z^2 q (1 - q) / n for q, with 1.96 for 95 %; it has a width at 0 and 1."""
    low, high = statistics.interval([1.0] * wins + [0.0] * (n - wins))
    for q in (low, high):
        if 0 < q < 1:
            assert abs(wins / n - q) == pytest.approx(1.959964 * math.sqrt(q * (1 - q) / n), abs=1e-6)
    assert low <= wins / n <= high and high - low > 0.01 and (low > 0 or wins == 0)


LAWS = {
    "share": ([0.0, 1.0], [0.05, 0.95]),
    "ties": ([0.0, 0.5, 1.0], [0.05, 0.85, 0.1]),
    "rare losses": ([0.5, 0.0], [0.97, 0.03]),
    "soft": ([0.1, 0.3, 0.6, 0.9], [0.25] * 4),
}


@pytest.mark.parametrize("n", [2, 20, 200])
@pytest.mark.parametrize("name", LAWS)
def test_interval_holds_the_mean_of_ties_and_soft_preferences(name, n):
    """In nearly 95 % of 1,000 samples, and for many rows no wider than the normal law's by a third."""
    values, weights = LAWS[name]
    rng, mean = np.random.default_rng(0), np.dot(values, weights)
    found = [statistics.interval(rng.choice(values, size=n, p=weights)) for _ in range(1000)]
    assert np.mean([low - 1e-9 <= mean <= high + 1e-9 for low, high in found]) > (0.92 if n > 2 else 0.88)
    spread = math.sqrt(np.dot(weights, (np.array(values) - mean) ** 2))
    if n == 200 and name != "rare losses":
        assert np.mean([high - low for low, high in found]) < 4 / 3 * 2 * 1.96 * spread / math.sqrt(n)


def answer(text="x", n_tokens=4, **stats):
    return {"text": text, "n_tokens": n_tokens, "stats": {"drafted": 0} | stats}


def test_standard_error_is_that_of_a_sample():
    """Divided by n - 1; one row has none."""
    judged = [{"preference": p} for p in (0.0, 0.5, 1.0)]
    figures = statistics.summarise(judged, [answer()] * 3, ["y"] * 3)
    assert figures["standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    alone = statistics.summarise(judged[:1], [answer()], ["y"])
    assert alone["standard_error"] is None and alone["win_rate_high"] > 0.5


def test_decoding_figures_are_weighted_by_tokens():
    """Nine tokens of one answer count nine times the one of another; a single model has none."""
    shares = {"fallback_fraction": 0.2, "changed_fraction": 0.4, "mean_kl": 1.0}
    long = answer(n_tokens=9, drafted=9, accepted=6, **shares)
    short = answer(n_tokens=1, drafted=1, accepted=1, **dict.fromkeys(shares, 0.0))
    expected = {"fallback_fraction": 0.18, "changed_fraction": 0.36, "mean_kl": 0.9, "acceptance": 0.7}
    assert statistics.decoding_figures([long, short, answer()]) == pytest.approx(expected)
    assert statistics.decoding_figures([answer()]) == {}


def test_infinite_divergence_and_overlap_have_their_means():
    """Files hold no infinite number: None stands for it. ROUGE-L is averaged as it is reported."""
    shares = {"fallback_fraction": 0.2, "changed_fraction": 0.4, "mean_kl": None}
    figures = statistics.decoding_figures([answer(n_tokens=9, drafted=9, accepted=6, **shares)])
    assert figures["mean_kl"] == math.inf
    judged = [{"preference": 0.5, "rouge_l": value} for value in (0.2, 0.4)]
    assert statistics.summarise(judged, [answer()] * 2, ["y"] * 2)["rouge_l"] == pytest.approx(0.3)


def test_gate_is_warned_of_if_it_undoes_the_alignment():
    """Mostly fallen back, or the aligner changes next to nothing; only the first is the gate's doing."""

    def warned(fallen, changed):
        row = {"system": "x", "fallback_fraction": fallen, "changed_fraction": changed}
        return statistics.gate_warning(row) or ""

    assert all("div_threshold undoes" in warned(*shares) for shares in ((0.51, 0.3), (0.11, 0.009)))
    assert "changed only 0.9%" in warned(0.1, 0.009) and "div_threshold" not in warned(0.1, 0.009)
    assert not warned(0.5, 0.3) and not warned(0.11, 0.01) and not statistics.gate_warning({"system": "x"})
