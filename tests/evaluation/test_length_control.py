"""Win rates with length taken out: known effects are found again, and AlpacaEval's own figures."""

import csv
import json
import logging
import math

import numpy as np
import pytest
from gamed import N, even, normal, write_gamed

from ram.errors import UserError
from ram.evaluation import length_control, statistics, tables
from ram.evaluation.judges.alpaca_eval import contained

# ---- any questions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength, effect", [(0.0, 0.0), (0.0, 1.5), (0.8, 1.5), (-0.6, -1.0)])
def test_known_effect_of_length_is_removed(strength, effect):
    """The bootstrap interval holds the true win rate at equal length.

    Outcomes are drawn with a known effect of length. The raw win rate misses the true one.
    """
    rng = np.random.default_rng(0)
    n = 4000
    longer = rng.normal(120, 200, n)  # the system writes more
    p = 1 / (1 + np.exp(-(strength + effect * np.tanh(longer / longer.std()))))
    y = (rng.random(n) < p).astype(float)
    truth = 1 / (1 + math.exp(-strength))
    picks = rng.integers(0, n, size=(200, n))
    found = [length_control.length_controlled(y[pick], longer[pick]) for pick in picks]
    low, high = np.quantile(found, [0.025, 0.975])
    assert low <= truth <= high and high - low < 0.06
    if effect:
        assert abs(y.mean() - truth) > 0.05


@pytest.mark.parametrize("n", [200, 20_000])
def test_rate_has_no_bias_that_stays(n):
    """The exact rate at equal length, however many rows; a few huge lengths count as any other."""
    longer = np.random.default_rng(0).standard_cauchy(n) * 100
    p = 1 / (1 + np.exp(-(-2 + 3 * np.tanh(longer / longer.std()))))
    assert length_control.length_controlled(p, longer) == pytest.approx(1 / (1 + math.exp(2)), abs=1e-4)
    assert length_control.length_controlled(p, 7 * longer) == pytest.approx(1 / (1 + math.exp(2)), abs=1e-4)


def test_one_sided_outcomes_give_a_finite_rate():
    assert 0.9 < length_control.length_controlled([1.0] * 20, list(range(20))) < 1
    assert length_control.length_controlled([0.5] * 20, [0.0] * 20) == pytest.approx(0.5)
    assert length_control.length_controlled([1.0] * 8 + [0.0] * 2, [50] * 10) == pytest.approx(0.8)


# ---- AlpacaEval's ------------------------------------------------------------------------------------------


def outcomes(strength, effect, by_difficulty, hard=False):
    """(difficulty, preferences, differences in characters) of a system with these coefficients."""
    difficulty = normal(N, 0.6180340)
    longer = np.round(400 + 600 * normal(N, 0.4142136))
    z = strength + effect * np.tanh(longer / longer.std(ddof=1)) + by_difficulty * difficulty
    p = length_control.sigmoid(z)
    return difficulty, (even(N, 0.3247180) < p).astype(float) if hard else p, longer


# (outcomes' arguments, every so many judgements failed) -> alpaca_eval 0.6.6's figures, scikit-learn 1.9.1
TOLERANCE = 3e-4  # liblinear, which AlpacaEval fits with, stops that far from the optimum
MEASURED = {
    (-0.6, 1.0, 0.5, False, None): (0.357179, 0.002334),
    (-1.8, 2.0, -0.7, True, None): (0.180812, 0.002228),
    (0.4, -0.8, 0.0, True, 7): (0.54951, 0.000124),
    (-5.0, 0.0, 0.0, True, None): (0.005095, 0.000002),
    (1.0, 0.0, 1.5, False, 3): (0.663822, 0.005235),
}


@pytest.fixture
def world(tmp_path):
    """Return (preferences with None for those that failed, differences, path of the gamed answers)."""

    def made(strength, effect, by_difficulty, hard, failed):
        difficulty, y, longer = outcomes(strength, effect, by_difficulty, hard)
        path = write_gamed(tmp_path / length_control.FILE, difficulty)
        preferences = [None if failed and i % failed == 0 else float(p) for i, p in enumerate(y)]
        return preferences, longer, path

    return made


@pytest.mark.parametrize("case", MEASURED)
def test_rates_equal_recorded_rates_of_alpaca_eval(world, case):
    preferences, longer, path = world(*case)
    found = length_control.alpaca_length_controlled(preferences, longer, length_control.read_gamed(path))
    rate, error = MEASURED[case]
    assert found["lc_win_rate"] == pytest.approx(rate, abs=TOLERANCE)
    assert found["lc_standard_error"] == pytest.approx(error, abs=TOLERANCE)


@pytest.mark.parametrize("case", MEASURED)
def test_rates_equal_those_of_the_package(world, case, monkeypatch):
    """The package's own function on the same answers and the same file."""
    preferences, longer, path = world(*case)
    with contained():
        pytest.importorskip("alpaca_eval")
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(path))
        rows = [
            {"preference": math.nan if p is None else p + 1, "output_1": "x" * 3000}
            | {"output_2": "x" * (3000 + int(d)), "generator_1": "reference", "generator_2": "system"}
            for p, d in zip(preferences, longer, strict=True)
        ]
        theirs = glm_winrate.get_length_controlled_winrate(rows, save_weights_dir=None)
    ours = length_control.alpaca_length_controlled(preferences, longer, length_control.read_gamed(path))
    assert ours["lc_win_rate"] == pytest.approx(theirs["length_controlled_winrate"] / 100, abs=TOLERANCE)
    assert ours["lc_standard_error"] == pytest.approx(theirs["lc_standard_error"] / 100, abs=TOLERANCE)


@pytest.mark.parametrize("strength, effect, by_difficulty", [(-0.8, 1.2, 0.6), (0.3, -1.0, -0.5)])
def test_alpaca_model_recovers_a_known_effect(tmp_path, strength, effect, by_difficulty):
    """The bootstrap interval over questions holds the true win rate at equal length.

    Outcomes are drawn with known effects of length and difficulty. The raw win rate misses the true one.
    """
    rng = np.random.default_rng(1)
    difficulty, p, longer = outcomes(strength, effect, by_difficulty)
    y = (rng.random(N) < p).astype(float)
    gamed = length_control.read_gamed(write_gamed(tmp_path / "x.csv", difficulty, effect=-effect))
    truth = length_control.sigmoid(strength + by_difficulty * difficulty).mean()
    found = []
    for _ in range(24):
        pick = rng.integers(0, N, N)
        again = gamed._replace(difficulty=gamed.difficulty[pick])
        found.append(length_control.alpaca_length_controlled(y[pick], longer[pick], again)["lc_win_rate"])
    low, high = np.quantile(found, [0.025, 0.975])
    assert low <= truth <= high and high - low < 0.12
    assert not low <= y.mean() <= high


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0, 1e4])
def test_fit_is_the_optimum(strength):
    """The fit satisfies the optimality conditions of loss + L1 norm.

    The loss's slope is minus a coefficient's sign; if the coefficient is 0, the slope is below 1 in size.
    """
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(300, 3)), rng.random(300)
    p = length_control.sigmoid(x @ [2.0, -1.0, 0.2])
    b = length_control.fit(x, p, weight, strength)
    slope = strength * x.T @ (weight * (length_control.sigmoid(x @ b) - p))
    for coefficient, s in zip(b, slope, strict=True):
        assert abs(s) <= 1 if coefficient == 0 else s == pytest.approx(-np.sign(coefficient), abs=1e-5)
    assert (b == 0).all() == (strength == 1e-3) and (b != 0).all() == (strength >= 10)


def test_equal_lengths_and_one_sided_outcomes_have_a_rate(tmp_path):
    gamed = length_control.read_gamed(write_gamed(tmp_path / "x.csv", normal(N, 0.6180340)))
    equal = length_control.alpaca_length_controlled([0.7] * N, [0] * N, gamed)["lc_win_rate"]
    assert equal == pytest.approx(0.7, abs=0.005)
    # All longer by the same: the length takes what the gamed answers say of it, tanh(-inf) = -1 times -1.
    longer = length_control.alpaca_length_controlled([0.7] * N, [40] * N, gamed)["lc_win_rate"]
    assert longer == pytest.approx(length_control.sigmoid(math.log(0.7 / 0.3) - 1), abs=0.01)
    assert length_control.alpaca_length_controlled([0.0] * N, [0] * N, gamed)["lc_win_rate"] < 0.005


def test_rate_is_shown_in_the_table(world):
    preferences, longer, path = world(-0.6, 1.0, 0.5, False, 100)
    judgements = [{"failed": "x"} if p is None else {"preference": p} for p in preferences]
    answers = [{"text": "x" * (3000 + int(d)), "stats": {"drafted": 0}} for d in longer]
    references, gamed = ["y" * 3000] * N, length_control.read_gamed(path)
    figures = statistics.alpaca_figures(judgements, answers, references, gamed)
    assert figures == length_control.alpaca_length_controlled(preferences, longer, gamed)
    row = {"system": "x", **statistics.summarise(judgements, answers, references), **figures}
    heading, line = tables.cells([row])
    assert line[heading.index("AlpacaEval LC")] == f"{figures['lc_win_rate']:.3f}"
    del row["lc_win_rate"]
    assert "AlpacaEval LC" not in tables.cells([row])[0]


# ---- the file ----------------------------------------------------------------------------------------------


def test_reason_for_a_missing_rate_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    whole = list(range(N))
    for given, said in {
        (tuple(whole[:300]), "output"): "it needs all 805 questions in order, 300 are evaluated here",
        (tuple(whole[::-1]), "output"): "it needs all 805 questions in order",
        (tuple(whole), "proposal"): "it compares with the test file's answers, not with proposal",
        (
            tuple(whole),
            "output",
        ): f"it needs {tmp_path / length_control.FILE}, which `python -m ram.data.prepare",
    }.items():
        caplog.clear()
        assert length_control.find_gamed(tmp_path, *given) is None
        assert len(caplog.messages) == 1 and said in caplog.messages[0]
    write_gamed(tmp_path / length_control.FILE, normal(N, 0.6180340))
    caplog.clear()
    assert len(length_control.find_gamed(tmp_path, whole, "output").difficulty) == N and not caplog.messages


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("preference", "x", 1), "has no column preference; expected AlpacaEval's"),
        (lambda text: "\n".join(text.split("\n")[:800]), "has 799 rows, fewer than 805"),
        (lambda text: text.replace(",False", ",False\n0,a,b,c,d,False", 1), "is not a number"),
        (
            lambda text: text.replace(",False", ",False\n0,a,0.5,,1,False", 1),
            "a length or difficulty is missing",
        ),
        (lambda text: text.replace(",False", ",False\n0,a,1.5,1,1,False", 1), "a preference is not in"),
        (lambda text: text[: len(text) * 3 // 4], "is not a number|is missing"),
        (lambda text: "", "has no column"),
    ],
)
def test_other_file_is_refused(tmp_path, change, message):
    path = write_gamed(tmp_path / "x.csv", normal(N, 0.6180340))
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        length_control.read_gamed(path)


def test_gamed_answers_without_judgement_are_left_out(tmp_path):
    path = write_gamed(tmp_path / "x.csv", normal(N, 0.6180340))
    lines = path.read_text().split("\n")
    lines[2] = ",".join([*lines[2].split(",")[:2], "", *lines[2].split(",")[3:]])
    path.write_text("\n".join(lines))
    gamed = length_control.read_gamed(path)
    assert len(gamed.preference) == len(gamed.x) == len(gamed.weight) == 2 * N - 1
    assert len(gamed.difficulty) == N and (gamed.weight == 0.1).all() and (gamed.x[:, 2] == 0).all()


# ---- from the command line ---------------------------------------------------------------------------------


def test_leaderboards_have_the_rate_if_the_file_exists(evaluate, tmp_path, caplog):
    """Without the file one warning, and no column; with it the figure in every table; none for a part."""
    caplog.set_level(logging.INFO, "ram")
    report = evaluate() / "out" / "report" / "llama_uc"
    assert sum("no lc_win_rate" in message for message in caplog.messages) == 1
    assert "lc_win_rate" not in (report / "leaderboard.csv").read_text()
    write_gamed(tmp_path / "data" / "test" / length_control.FILE, normal(N, 0.6180340))
    caplog.clear()
    evaluate()
    assert not [message for message in caplog.messages if "no lc_win_rate" in message]
    with open(report / "leaderboard.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    systems = json.loads((report / "results.json").read_text())["systems"]
    for row in rows:
        assert 0 < float(row["lc_win_rate"]) < 1 and 0 < float(row["lc_standard_error"]) < 0.1
        assert systems[row["system"]]["lc_win_rate"] == float(row["lc_win_rate"])
    assert "AlpacaEval LC" in (report / "report.html").read_text()
    assert "| AlpacaEval LC |" in (report / "leaderboard.md").read_text()
    caplog.clear()
    evaluate("sampling.limit=20")
    said = [message for message in caplog.messages if "no lc_win_rate" in message]
    assert len(said) == 1 and "20 are evaluated here" in said[0]
    assert "lc_win_rate" not in (report / "leaderboard.csv").read_text()
