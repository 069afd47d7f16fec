"""Figures of judgements: the simplest judges, and intervals."""

import pytest

from ram.errors import UserError
from ram.evaluation import statistics
from ram.evaluation.judges.dummy import DummyJudge
from ram.evaluation.judges.exact import ExactJudge


def test_simple_judges_and_bootstrap(tmp_path):
    """The dummy judge prefers longer answers; the interval holds the mean and depends only on the seed.

    For constant preferences the interval is exact.
    """
    found = DummyJudge().compare([{}] * 3, ["aa", "a", "b"], ["a", "aa", "c"], tmp_path)
    assert [row["preference"] for row in found] == [1.0, 0.0, 0.5]
    values = [0.0, 1.0] * 50
    low, high = statistics.bootstrap_interval(values, 1000, seed=0)
    assert (low, high) == statistics.bootstrap_interval(values, 1000, seed=0)
    assert 0.37 < low < 0.43 and 0.57 < high < 0.63  # 0.5 +- 1.96 * 0.05
    assert statistics.bootstrap_interval([0.25] * 9, 100, seed=1) == (0.25, 0.25)
    with pytest.raises(UserError, match="judge=exact needs the rows of the toy data set"):
        ExactJudge().compare([{"instruction": "x"}], ["a"], ["b"], tmp_path)
