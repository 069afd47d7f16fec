"""Figures of a system from a judge's preferences in [0, 1], where 1/2 is a tie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ram.answers.influence import is_little
from ram.data import toy_world
from ram.errors import UserError
from ram.evaluation import length_control
from ram.evaluation.judges.base import Judgement
from ram.settings.overrides import system_override

Z = 1.959963984540054  # the normal law's 97.5 % quantile


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % score interval of the mean of values in [0, 1]; for 0 and 1 it is Wilson's (1927).

    Wilson's variance p (1 - p) is the largest that values of mean p can have. Ties and soft preferences have
    less, so it is multiplied by the share of it that was observed, with Z^2 rows of the largest variance
    added: a few equal values are no certainty, neither at 0 and 1 nor between them.
    """
    array = np.asarray(values, dtype=np.float64)
    n, p = len(array), array.mean()
    largest = p * (1 - p)
    share = array.var() / largest if largest > 0 else 1.0
    width = Z**2 * (n * share + Z**2) / (n + Z**2) / n
    middle = (p + width / 2) / (1 + width)
    half = np.sqrt(width * (largest + width / 4)) / (1 + width)
    return max(float(middle - half), 0.0), min(float(middle + half), 1.0)


def paired_difference(
    ours: Sequence[Judgement], theirs: Sequence[Judgement], resamples: int, seed: int
) -> dict[str, float]:
    """Return the difference of two systems' win rates on the rows that have both judgements, and its p-value.

    The test is the two-sided sign-flip test of the mean difference (Fisher 1935). `p_floor` is the least
    p-value that so many random flips can give. Empty if no row has both.
    """
    pairs = zip(ours, theirs, strict=True)
    both = [(a["preference"], b["preference"]) for a, b in pairs if "failed" not in a and "failed" not in b]
    difference = np.array([a - b for a, b in both])
    if not len(difference):
        return {}
    rng, seen = np.random.default_rng(seed), abs(difference.mean())
    beyond, step = 0, max(1, 10_000_000 // len(difference))
    for start in range(0, resamples, step):
        signs = rng.choice((-1.0, 1.0), size=(min(step, resamples - start), len(difference)))
        beyond += int((np.abs((signs * difference).mean(axis=1)) >= seen - 1e-12).sum())
    p_value, floor = ((count + 1) / (resamples + 1) for count in (beyond, 0))
    return {"difference": float(difference.mean()), "p_value": p_value, "p_floor": floor}


def summarise(
    judgements: Sequence[Judgement],
    answers: Sequence[dict],
    references: Sequence[str],
) -> dict[str, Any]:
    """Return one system's figures, all rates as fractions.

    Failed judgements are left out and counted.

    Args:
        judgements: one per row; may have `correct`, `aligned`, `both`, `rouge_l` and `first`.
        answers: one per row, with text and, for a pair, statistics.
        references: the texts that the answers were compared with.

    Raises:
        UserError: if all judgements failed.
    """
    figures: dict[str, Any] = {"n": len(judgements), "failed": 0}
    if any("failed" in j for j in judgements):
        kept = [row for row in zip(judgements, answers, references, strict=True) if "failed" not in row[0]]
        if not kept:
            raise UserError(
                f"all {len(judgements)} judgements failed, the last because: {judgements[-1]['failed']}"
            )
        figures["failed"] = len(judgements) - len(kept)
        judgements, answers, references = (list(part) for part in zip(*kept, strict=True))
        figures["n"] = len(judgements)
    shares = {"win_rate": [j["preference"] for j in judgements]}
    for key in ("correct", "aligned", "both", "rouge_l"):
        if judgements and key in judgements[0]:
            shares[key] = [float(j[key]) for j in judgements]
    for key, values in shares.items():
        figures[key] = float(np.mean(values))
        if key in ("win_rate", "both"):
            figures[f"{key}_low"], figures[f"{key}_high"] = interval(values)
    figures["standard_error"] = None  # one row tells nothing of it
    if len(judgements) > 1:
        spread = np.std(shares["win_rate"], ddof=1)
        figures["standard_error"] = float(spread / np.sqrt(len(judgements)))
    figures["average_length"] = float(np.mean([len(answer["text"]) for answer in answers]))
    longer = differences(answers, references)
    figures["length_controlled"] = length_control.length_controlled(shares["win_rate"], longer)
    firsts = [j["first"] for j in judgements if "first" in j]
    if firsts:
        figures["first_shown_wins"] = float(np.mean(firsts))
    return figures | decoding_figures(answers)


def differences(answers: Sequence[dict], references: Sequence[str]) -> list[int]:
    """Return the number of characters that each answer is longer than its reference."""
    return [
        len(answer["text"]) - len(reference) for answer, reference in zip(answers, references, strict=True)
    ]


def alpaca_figures(
    judgements: Sequence[Judgement],
    answers: Sequence[dict],
    references: Sequence[str],
    gamed: length_control.Gamed,
) -> dict[str, float]:
    """Return AlpacaEval's length-controlled win rate over its 805 questions, with its standard error."""
    preferences = [None if "failed" in j else j["preference"] for j in judgements]
    return length_control.alpaca_length_controlled(preferences, differences(answers, references), gamed)


def decoding_figures(answers: Sequence[dict]) -> dict[str, float]:
    """Return fallback and changed fraction, mean KL and acceptance over a pair's tokens.

    Empty for a single model.
    """
    pairs = [answer for answer in answers if answer["stats"]["drafted"]]
    tokens = sum(answer["n_tokens"] for answer in pairs)
    if not tokens:
        return {}

    def figure(answer: dict, key: str) -> float:
        value = answer["stats"][key]
        return math.inf if value is None else value  # files hold no infinite number

    weighted = {
        key: sum(figure(a, key) * a["n_tokens"] for a in pairs) / tokens
        for key in ("fallback_fraction", "changed_fraction", "mean_kl")
    }
    accepted, drafted = (sum(a["stats"][key] for a in pairs) for key in ("accepted", "drafted"))
    return weighted | {"acceptance": accepted / drafted}


def gate_warning(row: dict[str, Any]) -> str | None:
    """Return a warning if a pair answers almost as its proposal alone, because of its gate or not."""
    fallen, changed = row.get("fallback_fraction", 0.0), row.get("changed_fraction", 1.0)
    if not is_little(fallen, changed):
        return None
    if fallen <= 0.1:
        return (
            f"warning: the aligner of {row['system']} changed only {changed:.1%} of the tokens: the pair "
            "answers almost as its proposal alone"
        )
    return (
        f"warning: {row['system']} fell back to the proposal on {fallen:.0%} of its tokens and the aligner "
        f"changed {changed:.1%} of them: div_threshold undoes the alignment; compare "
        f"{system_override(row['system'], 'sample_mode', 'par')}"
    )


def style_shares(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Return the share of answers in each style, empty if the judge names no styles."""
    styles = [j["style"] for j in judgements if "style" in j]
    names = (*toy_world.STYLES, "other") if styles else ()
    return {f"style_{name}": styles.count(name) / len(styles) for name in names}
