"""`python -m ram.evaluation.choices`: what a sweep chose becomes arguments that change the systems."""

import pytest
from small import settings

from ram.errors import UserError
from ram.evaluation import choices
from ram.storage.files import write_csv

NAME = "proposal+aligner[product]"


def sweep(folder):
    def line(system, key, value, nll, chosen=""):
        return {"system": system, "key": key, "value": value, "nll": nll, "nll_even": nll, "chosen": chosen}

    path = folder / "likelihood_sweep.csv"
    write_csv(
        path,
        [
            line(NAME, "temperature", 1.0, 3.2),
            line(NAME, "temperature", 2.0, 3.0),  # the lowest over all rows, though another was chosen
            line(NAME, "temperature", 5.0, 3.1, "yes"),
            line(NAME, "top_p", 0.9, 3.0),
            line("pair", "mixture_weight", 0.2, 2.9, "yes"),
        ],
    )
    return path


def test_arguments_set_the_lowest_value_of_each_key_that_may_be_chosen(tmp_path):
    arguments = choices.choices(sweep(tmp_path))
    config = settings("experiment=demo", "evaluation.systems={pair: {proposal: proposal}}", *arguments)
    assert config.evaluation.systems[NAME]["temperature"] == 2.0
    assert "top_p" not in config.evaluation.systems[NAME]
    assert config.evaluation.systems["pair"] == {"proposal": "proposal", "mixture_weight": 0.2}
    assert len(arguments) == 2


def test_missing_and_other_files_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist: run pipeline.py with evaluation.likelihood_sweep"):
        choices.choices(tmp_path / "none.csv")
    write_csv(tmp_path / "other.csv", [{"system": "a"}])
    with pytest.raises(UserError, match="is not a likelihood_sweep.csv"):
        choices.choices(tmp_path / "other.csv")
