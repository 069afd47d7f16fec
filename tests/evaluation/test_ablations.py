"""A recipe repeated over the values of a key: its points, the plot, what is refused."""

import csv
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from small import ROOT, SMALL, settings

from ram.errors import UserError
from ram.evaluation import ablations
from ram.settings import compose, recipes
from utils import TABLES


def board(pair, **more):
    still = {"system": "proposal", "win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5}
    return [
        still,
        {"system": "pair", "win_rate": pair, "win_rate_low": pair - 0.1, "win_rate_high": 1.0, **more},
    ]


def config(tmp_path, value, **more):
    """The root configuration with a point's value."""
    ablation = {"name": "gate", "key": "sampling.div_threshold", **more}
    return settings(
        "experiment=demo",
        f"sampling.div_threshold={value}",
        f"report_dir={tmp_path / 'gate' / str(value)}",
        *(f"++evaluation.ablation.{key}={text}" for key, text in ablation.items()),
    )


def add(tmp_path, value, rate, task="facts", **more):
    given = config(tmp_path, value, **more)
    ablations.add_point(tmp_path / "gate" / str(value), task, board(rate, fallback_fraction=1 - rate), given)


def test_points_are_drawn_in_order_of_the_values(tmp_path):
    """Points are sorted by numeric value, whatever the order of the runs; each task has its own file."""
    for value, rate in ((10.0, 0.9), (0.3, 0.6), (2.0, 0.75)):
        add(tmp_path, value, rate)
    add(tmp_path, 7.0, 0.1, task="other")
    page = (tmp_path / "gate" / "facts.html").read_text()
    places = [page.index(f">{value}</text>") for value in (0.3, 2.0, 10.0)]
    assert places == sorted(places) and ">7.0</text>" not in page
    assert "pair, 0.3: 0.600" in page and "pair, 10.0: 0.900" in page
    assert "Tokens that fell back" in page and "Acceptance" not in page
    with open(tmp_path / "gate" / "facts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["value"], row["system"]) for row in rows} == {
        (value, system) for value in ("0.3", "2.0", "10.0") for system in ("proposal", "pair")
    }
    add(tmp_path, 0.3, 0.65)  # run again: the same point
    assert "pair, 0.3: 0.650" in (tmp_path / "gate" / "facts.html").read_text()


def test_second_key_gives_separate_curves():
    """One section per system that changes, one curve per value of `by`, in their order."""
    points = [{"key": k, "by": b, "rows": board(0.1 * k * b)} for k in (1, 2) for b in (3.0, 0.5)]
    sections = ablations.sections_of(points)
    assert list(sections) == ["pair"] and list(sections["pair"]) == ["0.5", "3.0"]
    assert [x for x, _ in sections["pair"]["3.0"]] == [1, 2]


def test_constant_systems_are_left_out():
    """Only the first of them stays, to compare with."""
    points = [{"key": k, "rows": [*board(0.1 * k), {"system": "still", "win_rate": 0.4}]} for k in (1, 2)]
    assert list(ablations.sections_of(points)["All systems"]) == ["proposal", "pair"]


def test_unknown_key_is_refused(tmp_path):
    """Rather than a plot over nothing."""
    given = config(tmp_path, 1.0, key="sampling.threshold")
    with pytest.raises(UserError, match=r"evaluation.ablation.key='sampling.threshold': no such key"):
        ablations.add_point(tmp_path, "facts", board(0.5), given)


@pytest.mark.parametrize("name", sorted(p.stem for p in (compose.CONFIG_DIR / "ablation").glob("*.yaml")))
def test_shipped_ablations_vary_an_existing_key(name):
    """Each composes with a recipe, names what it varies, and keeps runs of different values apart."""
    values = {"n_examples": "stage.aligner.n_examples=", "alpha": "stage.aligner.loss_settings.alpha="}
    values |= {
        "sampled_fraction": "stage.aligner.loss_settings.sampled_fraction=",
        "aligner_size": "pair.aligner=",
    }
    values |= {"div_threshold": "sampling.div_threshold=", "temperatures": "sampling.temperature="}
    two = {"aligner_size": ("llama1b", "llama3b"), "n_examples": ("640", "1280")}.get(name, ("0.25", "0.5"))
    places, reports = set(), set()
    for value in two:
        arguments = compose.preflight(["experiment=llama_uc", f"ablation={name}", f"{values[name]}{value}"])
        found = compose.compose(arguments)
        assert found.evaluation.ablation.name == name
        assert str(OmegaConf.select(found, found.evaluation.ablation.key)) == value
        stages = {stage.name: stage for stage in recipes.resolve(arguments, TABLES)}
        places.add(stages["aligner"].output), reports.add(found.report_dir)
    decoding_alone = name in ("div_threshold", "temperatures")
    assert len(places) == (1 if decoding_alone else 2) and len(reports) == 2
    assert (found.stages == []) == decoding_alone  # the sample stage would read the temperatures too


@pytest.mark.slow
def test_ablation_from_the_command_line(tmp_path):
    """Both entry points run every value, each into its own folder, and the plot has them all."""
    arguments = ["experiment=demo", f"output_dir={tmp_path}", *SMALL, "ablation=n_examples"]
    for entry in ("train.py", "pipeline.py"):
        command = [sys.executable, entry, *arguments, "stage.aligner.n_examples=32,64"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    page = (tmp_path / "report" / "demo_ablation" / "n_examples" / "facts.html").read_text()
    assert ">32</text>" in page and ">64</text>" in page
    assert len(list((tmp_path / "model").glob("n*_ours_sft_toy_*"))) == 2


def test_misspelt_key_with_several_values_is_refused():
    """A key with several values is checked like any other."""
    with pytest.raises(UserError, match="unknown key 'sampling.div_treshold': did you mean"):
        compose.preflight(["experiment=llama_uc", "ablation=div_threshold", "sampling.div_treshold=0.1,0.2"])


def test_values_are_sorted_numbers_before_words():
    assert sorted(["reverse", "10", "9", "forward"], key=ablations.in_order) == [
        "9",
        "10",
        "forward",
        "reverse",
    ]
