"""ROUGE-L against the test file's answer: the answer with the larger overlap wins (package rouge-score)."""

import re
from dataclasses import dataclass
from pathlib import Path

from ram.errors import UserError
from ram.evaluation.judges.base import Judge, Judgement, Rows, Texts

WARNING = (
    "ROUGE-L counts common words of a-z and digits in order; it follows an answer's length and wording, not "
    "what is said"
)


@dataclass(frozen=True)
class RougeJudge(Judge):
    """Compares F-measures of the longest common subsequence of words (Lin 2004), with Porter's stems.

    Attributes:
        field: the record's field with the answer that both are measured against.
    """

    name: str = "rouge"
    field: str = "output"
    warning = WARNING

    def check(self) -> None:
        try:
            import rouge_score  # noqa: F401 (only whether it is there)
        except ImportError:
            raise UserError(
                "judge=rouge needs the package rouge-score: pip install rouge-score==0.1.2"
            ) from None

    def identity(self) -> dict[str, str]:
        return {"name": self.name, "field": self.field}

    def describe(self) -> str:
        return f"ROUGE-L against the test file's {self.field}"

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        from rouge_score.rouge_scorer import RougeScorer

        if any(not isinstance(row.get(self.field), str) for row in rows):
            raise UserError(
                f"judge=rouge: rows of the test file have no text in {self.field!r}; set judge.field"
            )
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        judgements: list[Judgement] = []
        for row, answer, reference in zip(rows, answers, references, strict=True):
            if not re.search("[a-z0-9]", row[self.field].lower()):
                judgements.append(
                    {"failed": f"no word of a-z or digits in {self.field!r}, as ROUGE-L counts"}
                )
                continue
            own, other = (
                scorer.score(row[self.field], text)["rougeL"].fmeasure for text in (answer, reference)
            )
            judgements.append({"preference": 0.5 + 0.5 * ((own > other) - (own < other)), "rouge_l": own})
        return judgements


JUDGE = RougeJudge
