"""judge=rouge: the answer whose words follow the test file's answer more closely wins."""

import sys

import pytest
from small import settings

from ram.errors import UserError
from ram.evaluation.judges.rouge import RougeJudge

pytest.importorskip("rouge_score", reason="the package rouge-score is not installed")


def f_measure(a: list[str], b: list[str]) -> float:
    """ROUGE-L of two lists of words, from the table of common subsequences (Lin 2004, section 3)."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            longest = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if first == second else longest
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b))


ROWS = [{"output": "the cat sat on the mat"}, {"output": "a dog ran away"}, {"output": "rain"}]
ANSWERS = ["the cat lay on a mat", "a dog ran away", "snow"]
REFERENCES = ["the dog", "a cat ran", "wind"]


def test_larger_overlap_wins_and_is_reported(tmp_path):
    found = RougeJudge().compare(ROWS, ANSWERS, REFERENCES, tmp_path / "cache")
    expected = [
        f_measure(row["output"].split(), text.split()) for row, text in zip(ROWS, ANSWERS, strict=True)
    ]
    assert [judgement["rouge_l"] for judgement in found] == pytest.approx(expected)
    assert [judgement["preference"] for judgement in found] == [1.0, 1.0, 0.5]
    swapped = RougeJudge().compare(ROWS, REFERENCES, ANSWERS, tmp_path / "cache")
    assert [judgement["preference"] for judgement in swapped] == [0.0, 0.0, 0.5]


def test_reference_without_words_that_are_counted_is_not_judged(tmp_path):
    """The package keeps a-z and digits: every pair of Russian texts would be a tie."""
    rows = [{"output": "кот сидел"}, {"output": "the cat"}]
    found = RougeJudge().compare(rows, ["кот", "the cat"], ["дом", "a"], tmp_path / "cache")
    assert "no word of a-z or digits in 'output'" in found[0]["failed"] and found[1]["preference"] == 1.0


def test_shipped_settings_are_the_judge(tmp_path):
    assert settings("judge=rouge").judge == RougeJudge()


def test_rows_without_the_field_and_a_missing_package_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no text in 'summary'; set judge.field"):
        RougeJudge(field="summary").compare(ROWS, ANSWERS, REFERENCES, tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        RougeJudge().check()
