"""The rules of the toy data set: the answer with more of (correct, aligned) wins."""

from dataclasses import dataclass
from pathlib import Path

from ram.data import toy_world
from ram.errors import UserError
from ram.evaluation.judges.base import Judge, Judgement, Rows, Texts


@dataclass(frozen=True)
class ExactJudge(Judge):
    name: str = "exact"

    def compare(self, rows: Rows, answers: Texts, references: Texts, cache: Path) -> list[Judgement]:
        if missing := {"entity", "attribute", "value"} - set(rows[0] if rows else ()):
            raise UserError(
                "judge=exact needs the rows of the toy data set, but these lack "
                f"{', '.join(sorted(missing))}; use another judge (config/judge/*.yaml)"
            )
        judgements = []
        for row, answer, reference in zip(rows, answers, references, strict=True):
            score, other = toy_world.score(row, answer), toy_world.score(row, reference)
            margin = score["correct"] + score["aligned"] - other["correct"] - other["aligned"]
            judgements.append({"preference": 0.5 + 0.5 * ((margin > 0) - (margin < 0)), **score})
        return judgements


JUDGE = ExactJudge
