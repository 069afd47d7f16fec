"""A judge that prefers the longer answer. It measures nothing: the pipeline can run without a real judge."""

from dataclasses import dataclass
from pathlib import Path

from ram.evaluation.judges.base import Judge, Judgement, Rows, Texts


@dataclass(frozen=True)
class DummyJudge(Judge):
    name: str = "dummy"
    warning = "warning: judge=dummy prefers the longer answer and measures nothing: choose another judge"

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        pairs = zip(map(len, answers), map(len, references), strict=True)
        return [{"preference": 0.5 + 0.5 * ((own > other) - (own < other))} for own, other in pairs]


JUDGE = DummyJudge
