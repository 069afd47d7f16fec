"""Length-controlled win rates: AlpacaEval's method for its 805 questions, a simpler one for other questions.

Both fit a logistic model of the preference in [0, 1] given the difference in length, and predict the
preference at equal lengths (Dubois et al. 2024, arXiv 2404.04475).
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ram.errors import UserError
from ram.log import log

QUESTIONS = 805  # number of AlpacaEval's questions
QUESTIONS_FILE = "alpaca_eval_gpt4_baseline.json"
FILE = "alpaca_eval_length_control.csv"  # its df_gamed.csv, beside the questions
GAMED_WEIGHT = 0.1  # of a row of the two gamed baselines; a row of the model has weight 1
STRENGTHS = np.logspace(-4, 4, 10)  # candidate weights of the loss relative to the L1 norm
FOLDS = 5


def length_controlled(preferences: Sequence[float], differences: Sequence[float]) -> float:
    """Return the win rate at equal lengths, by AlpacaEval's model without the questions' difficulty.

    Args:
        preferences: (n,) in [0, 1].
        differences: (n,) answer minus reference, in characters. They are divided by their standard deviation
            and squashed by tanh.
    """
    y, d = np.asarray(preferences, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if not d.std():
        return float(y.mean())
    x = np.stack([np.ones_like(y), np.tanh(d / d.std())], axis=1)
    return float(sigmoid(fit(x, y, np.ones_like(y), STRENGTHS[-1])[0]))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


# ---- AlpacaEval's ------------------------------------------------------------------------------------------


class Gamed(NamedTuple):
    """AlpacaEval's published data for its model.

    It has each question's difficulty, and judgements of its baseline's answers with the instruction to be
    brief and with the instruction to be verbose.

    Attributes:
        difficulty: (805,).
        x: (n, 3), the columns of `design`.
        preference: (n,).
        weight: (n,).
    """

    difficulty: np.ndarray
    x: np.ndarray
    preference: np.ndarray
    weight: np.ndarray


def design(standard_difference: np.ndarray, difficulty: np.ndarray, is_model: np.ndarray) -> np.ndarray:
    """Return the model's three columns, (n, 3).

    The last column is 1 for a system and 0 for a gamed baseline, which is as good as its reference.
    """
    return np.stack([np.tanh(standard_difference), difficulty, is_model], axis=1)


def read_gamed(path: Path) -> Gamed:
    """Read AlpacaEval's df_gamed.csv. Its row k < 805 has the difficulty of question k.

    Raises:
        UserError: if the file has other columns, too few rows or invalid numbers.
    """
    columns = ("preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")
    remedy = "expected AlpacaEval's df_gamed.csv; `python -m ram.data.prepare alpaca --overwrite` fetches it"
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise UserError(f"{path}: has no column {', '.join(sorted(missing))}; {remedy}")
        rows = list(reader)
    if len(rows) < QUESTIONS:
        raise UserError(f"{path}: has {len(rows)} rows, fewer than {QUESTIONS}; {remedy}")
    try:
        numbers = np.array([[float(row[key] or "nan") for key in columns[:3]] for row in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a value is not a number ({error}); {remedy}") from None
    preference, difference, difficulty = numbers.T
    if not np.isfinite(numbers[:, 1:]).all() or (preference < 0).any() or (preference > 1).any():
        raise UserError(
            f"{path}: a length or difficulty is missing, or a preference is not in [0, 1]; {remedy}"
        )
    is_model = np.array([row["not_gamed_baseline"] == "True" for row in rows], dtype=np.float64)
    judged = np.isfinite(preference)
    x = design(difference, difficulty, is_model)[judged]
    weight = np.where(is_model[judged] == 1, 1.0, GAMED_WEIGHT)
    return Gamed(difficulty[:QUESTIONS], x, preference[judged], weight)


def find_gamed(folder: Path, row_ids: Sequence[int], reference: str) -> Gamed | None:
    """Return AlpacaEval's data, or None if the comparison is not AlpacaEval's or the file is missing.

    The reason is logged.

    Args:
        folder: folder of the questions.
        row_ids: ids of the questions that are judged.
        reference: `evaluation.reference`.
    """
    prefix = "no lc_win_rate, AlpacaEval's length-controlled win rate"
    if list(row_ids) != list(range(QUESTIONS)):
        log.info(f"{prefix}: it needs all {QUESTIONS} questions in order, {len(row_ids)} are evaluated here")
    elif reference != "output":
        log.info(f"{prefix}: it compares with the test file's answers, not with {reference}")
    elif not (folder / FILE).is_file():
        log.warning(
            f"{prefix}: it needs {folder / FILE}, which `python -m ram.data.prepare alpaca` downloads; or "
            "copy df_gamed.csv from the hub's data set tatsu-lab/alpaca_eval there under that name"
        )
    else:
        return read_gamed(folder / FILE)
    return None


def alpaca_length_controlled(
    preferences: Sequence[float | None], differences: Sequence[float], gamed: Gamed
) -> dict[str, float]:
    """Return `lc_win_rate` and `lc_standard_error` as fractions.

    They are those of `get_length_controlled_winrate` in alpaca_eval 0.6.6. The model is fitted to the judged
    answers and, with little weight, to the gamed ones. The standard error is that of the mean of the model's
    predictions over the questions; it does not include the error of the fit.

    Args:
        preferences: of the 805 questions in order, None if the judgement failed.
        differences: answer minus reference, in characters.
        gamed: AlpacaEval's data.
    """
    y = np.array([math.nan if p is None else p for p in preferences], dtype=np.float64)
    # The published coefficients are for reference minus answer.
    d = -np.asarray(differences, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # all differences equal, or all 0
        d = np.nan_to_num(d / d.std(ddof=1))
    judged, ones = np.isfinite(y), np.ones(len(y))
    x = np.concatenate([gamed.x, design(d, gamed.difficulty, ones)[judged]])
    p = np.concatenate([gamed.preference, y[judged]])
    weight = np.concatenate([gamed.weight, ones[judged]])
    coefficients = fit(x, p, weight, best_strength(x, p, weight))
    predicted = sigmoid(design(0 * d, gamed.difficulty, ones) @ coefficients)
    error = predicted.std(ddof=1) / math.sqrt(len(predicted))
    return {"lc_win_rate": float(predicted.mean()), "lc_standard_error": float(error)}


def best_strength(x: np.ndarray, p: np.ndarray, weight: np.ndarray) -> float:
    """Return the candidate with the lowest weighted log-loss on held-out rows, summed over five folds."""
    # scikit-learn's GroupKFold assigns groups of equal size from the last one on.
    fold = np.arange(len(p))[::-1] % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for out in (fold == number for number in range(FOLDS)):
        for index, strength in enumerate(STRENGTHS):
            z = x[out] @ fit(x[~out], p[~out], weight[~out], strength)
            losses[index] += np.mean(weight[out] * (np.logaddexp(0, z) - p[out] * z))
    return float(STRENGTHS[losses.argmin()])


def fit(x: np.ndarray, p: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """Return the b that minimises |b|_1 + strength * sum of weight * (log(1 + e^z) - p z), with z = x b.

    This is the weighted logistic loss with an L1 norm and without intercept. Newton's method: each step
    minimises the quadratic model plus the exact norm, coordinate by coordinate (Friedman, Hastie and
    Tibshirani 2010).
    """

    def objective(b: np.ndarray) -> float:
        z = x @ b
        return np.abs(b).sum() + strength * np.sum(weight * (np.logaddexp(0, z) - p * z))

    b, now = np.zeros(x.shape[1]), objective(np.zeros(x.shape[1]))
    for _ in range(100):
        q = sigmoid(x @ b)
        gradient = strength * x.T @ (weight * (q - p))
        curvature = strength * (x * (weight * q * (1 - q))[:, None]).T @ x + 1e-9 * np.eye(len(b))
        step = step_of(b, gradient, curvature)
        if np.abs(step).max() < 1e-9:
            break
        while (then := objective(b + step)) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        b, now = b + step, then
    return b


def step_of(b: np.ndarray, gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Return the step s that minimises gradient s + s curvature s / 2 + |b + s|_1."""
    to = b.copy()
    for _ in range(1000):
        before = to.copy()
        for j, own in enumerate(np.diag(curvature)):
            free = to[j] - (gradient[j] + curvature[j] @ (to - b)) / own
            to[j] = np.sign(free) * max(abs(free) - 1 / own, 0.0)
        if np.abs(to - before).max() < 1e-12:
            break
    return to - b
