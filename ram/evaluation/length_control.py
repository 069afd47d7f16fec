"""Win rates with length taken out: AlpacaEval's own method for its 805 questions, a plain one for all else.

Both fit a logistic model of the preference in [0, 1] by the difference in length and ask it for the
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

QUESTIONS = 805  # of AlpacaEval
QUESTIONS_FILE = "alpaca_eval_gpt4_baseline.json"
FILE = "alpaca_eval_length_control.csv"  # its df_gamed.csv, beside the questions
GAMED_WEIGHT = 0.1  # of a row of either of the two gamed baselines, which together hold the model down by 0.2
STRENGTHS = np.logspace(-4, 4, 10)  # candidates for the loss's weight against the L1 norm of the coefficients
FOLDS = 5


def length_controlled(preferences: Sequence[float], differences: Sequence[float]) -> float:
    """The win rate at equal lengths, for any questions: AlpacaEval's model without their difficulty.

    differences: answer minus reference, in characters; divided by their spread and squashed by tanh, as
    there.
    """
    y, d = np.asarray(preferences, dtype=np.float64), np.asarray(differences, dtype=np.float64)
    if not d.std():
        return float(y.mean())
    x = np.stack([np.ones_like(y), np.tanh(d / d.std())], axis=1)
    ridge = np.diag([1e-3, 1e-3]) * len(y)  # keeps the optimum finite where one side always wins
    weights = np.zeros(2)
    for _ in range(50):  # Newton's method on a strictly convex function
        p = sigmoid(x @ weights)
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + ridge, x.T @ (y - p) - ridge @ weights)
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    return float(sigmoid(weights[0]))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


# ---- AlpacaEval's ------------------------------------------------------------------------------------------


class Gamed(NamedTuple):
    """What AlpacaEval publishes for its model: each question's difficulty, and judgements of the answers that
    its baseline gave when told to be brief, and to be verbose.

    difficulty: (805,). x: (n, 3), the columns of `design`. preference, weight: (n,).
    """

    difficulty: np.ndarray
    x: np.ndarray
    preference: np.ndarray
    weight: np.ndarray


def design(standard_difference: np.ndarray, difficulty: np.ndarray, is_model: np.ndarray) -> np.ndarray:
    """The model's three columns; the last one is 1 for a system, 0 for a gamed baseline, which is as good as
    what it is compared with.
    """
    return np.stack([np.tanh(standard_difference), difficulty, is_model], axis=1)


def read_gamed(path: Path) -> Gamed:
    """AlpacaEval's df_gamed.csv, whose row number k < 805 has the difficulty of question k.

    Raises UserError for a file that is another.
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
        raise UserError(f"{path}: holds what is no number ({error}); {remedy}") from None
    preference, difference, difficulty = numbers.T
    if not np.isfinite(numbers[:, 1:]).all() or (preference < 0).any() or (preference > 1).any():
        raise UserError(
            f"{path}: has a length or difficulty missing, or a preference not in [0, 1]; {remedy}"
        )
    is_model = np.array([row["not_gamed_baseline"] == "True" for row in rows], dtype=np.float64)
    judged = np.isfinite(preference)
    x = design(difference, difficulty, is_model)[judged]
    weight = np.where(is_model[judged] == 1, 1.0, GAMED_WEIGHT)
    return Gamed(difficulty[:QUESTIONS], x, preference[judged], weight)


def find_gamed(folder: Path, row_ids: Sequence[int], reference: str) -> Gamed | None:
    """`read_gamed` of the file beside AlpacaEval's questions; None, with a line that says why, where it is
    not there or the comparison is another than AlpacaEval's.

    row_ids: of the questions that are judged. reference: `evaluation.reference`.
    """
    what = "no lc_win_rate, AlpacaEval's length-controlled win rate"
    if list(row_ids) != list(range(QUESTIONS)):
        log.info(
            f"{what}: it is of all {QUESTIONS} questions in order, and {len(row_ids)} are evaluated here"
        )
    elif reference != "output":
        log.info(f"{what}: it is against the test file's answers, and evaluation.reference={reference}")
    elif not (folder / FILE).is_file():
        log.warning(
            f"{what}: it needs {folder / FILE}, which `python -m ram.data.prepare alpaca` fetches; or bring "
            "df_gamed.csv from the hub's data set tatsu-lab/alpaca_eval and put it there under that name"
        )
    else:
        return read_gamed(folder / FILE)
    return None


def alpaca_length_controlled(
    preferences: Sequence[float | None], differences: Sequence[float], gamed: Gamed
) -> dict[str, float]:
    """`lc_win_rate` and `lc_standard_error` of AlpacaEval's 805 questions, in order, as alpaca_eval 0.6.6's
    `get_length_controlled_winrate` computes them, in fractions.

    preferences: of each question, None where its judgement failed. differences: answer minus reference, in
    characters. The model is fitted to the judged answers and, with little weight, to the gamed ones. The
    standard error is that of the mean of the model's predictions over the questions, as there: it says
    nothing of the fit's own error.
    """
    y = np.array([math.nan if p is None else p for p in preferences], dtype=np.float64)
    d = -np.asarray(
        differences, dtype=np.float64
    )  # the published coefficients are for reference minus answer
    with np.errstate(divide="ignore", invalid="ignore"):  # all differences equal, or all 0
        d = np.nan_to_num(d / d.std(ddof=1))
    judged, ones = np.isfinite(y), np.ones(len(y))
    x = np.concatenate([gamed.x, design(d, gamed.difficulty, ones)[judged]])
    p = np.concatenate([gamed.preference, y[judged]])
    weight = np.concatenate([gamed.weight, ones[judged]])
    coefficients = fit(x, p, weight, best_strength(x, p, weight))
    found = sigmoid(design(0 * d, gamed.difficulty, ones) @ coefficients)
    error = found.std(ddof=1) / math.sqrt(len(found))
    return {"lc_win_rate": float(found.mean()), "lc_standard_error": float(error)}


def best_strength(x: np.ndarray, p: np.ndarray, weight: np.ndarray) -> float:
    """The candidate with the least weighted log-loss on rows left out, summed over five folds."""
    fold = (
        np.arange(len(p))[::-1] % FOLDS
    )  # scikit-learn's GroupKFold deals equal groups out from the last one
    losses = np.zeros(len(STRENGTHS))
    for out in (fold == number for number in range(FOLDS)):
        for index, strength in enumerate(STRENGTHS):
            z = x[out] @ fit(x[~out], p[~out], weight[~out], strength)
            losses[index] += np.mean(weight[out] * (np.logaddexp(0, z) - p[out] * z))
    return float(STRENGTHS[losses.argmin()])


def fit(x: np.ndarray, p: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """The coefficients b that minimise |b|_1 + strength * sum of weight * (log(1 + e^z) - p z), z = x b: the
    weighted logistic loss with an L1 norm, no intercept.

    Newton's method; the quadratic model of each step, with the norm kept whole, is minimised coordinate by
    coordinate (Friedman, Hastie and Tibshirani 2010).
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
    """The step s that minimises gradient s + s curvature s / 2 + |b + s|_1."""
    to = b.copy()
    for _ in range(1000):
        before = to.copy()
        for j, own in enumerate(np.diag(curvature)):
            free = to[j] - (gradient[j] + curvature[j] @ (to - b)) / own
            to[j] = np.sign(free) * max(abs(free) - 1 / own, 0.0)
        if np.abs(to - before).max() < 1e-12:
            break
    return to - b
