"""Keys of a command line that change nothing are refused; a system's key can be given whatever its name."""

import shlex

import pytest
from small import settings

from ram.errors import UserError
from ram.evaluation.statistics import gate_warning
from ram.evaluation.systems import resolve_systems
from ram.settings import compose, recipes
from ram.settings.overrides import system_override
from utils import TABLES

GATED = "proposal+aligner[par_kl]"


def resolve(line):
    return recipes.resolve(compose.preflight(shlex.split(line)), TABLES)


def systems(line):
    """The systems of an evaluation, by name."""
    overrides = shlex.split(line)
    config, given = settings(*overrides), {compose.key_of(override) for override in overrides}
    stages = {stage.name: stage for stage in resolve(line)}
    return resolve_systems(config, next(iter(config.evaluation.tasks)), stages, given)


@pytest.mark.parametrize(
    "line, reason",
    [
        (
            "experiment=demo sampling.sample_mode=par",
            "par_kl], .* set sample_mode themselves; give it for one",
        ),
        ("experiment=llama_uc evaluation.tasks.helpful.sample_mode=par", "set sample_mode themselves"),
        ("experiment=demo_mixture sampling.div_threshold=3", "no stage or system here reads div_threshold"),
        ("experiment=demo 'sampling={n_candidates: 4}'", "no stage or system here reads n_candidates"),
        ("model=llama1b datasets=[uc] sampling.top_p=0.5", "no stage or system here reads top_p"),
        ("experiment=demo evaluation.systems.proposal.temperature=1", "proposal does not read temperature"),
        ("experiment=demo evaluation.systems.proposal_dpo.dtype=float32", "unless baselines=true"),
        (
            "experiment=demo stage.proposal_dpo.lr=1",
            "stage 'proposal_dpo' is left out, unless baselines=true",
        ),
        ("experiment=demo n_epochs=2", "n_examples decides the length of every stage"),
        ("experiment=demo stage.aligner.n_epochs=2", "n_examples decides"),
    ],
)
def test_key_that_changes_nothing_is_refused(line, reason):
    """Without a word, every system's own setting used to win, as if the key had not been given."""
    with pytest.raises(UserError, match=f": changes nothing: .*{reason}"):
        resolve(line)


@pytest.mark.parametrize(
    "line",
    [
        "experiment=demo sampling.base_temperature=1 sampling.top_p=0.5 sampling.div_threshold=3",
        "experiment=demo baselines=true stage.proposal_dpo.lr=1 evaluation.systems.proposal_dpo.base_top_p=1",
        "experiment=llama_uc n_epochs=2 sampling.n_candidates=null 'sampling={top_k: 3, n_candidates: 4}'",
        "model=llama1b datasets=[uc] sampling.top_p=0.5 sample_during_eval=true",
        "experiment=demo 'evaluation.systems={proposal+aligner\\[par\\]: {drafter: aligner}}'",
        "experiment=demo 'evaluation.systems={new: {proposal: proposal, aligner: aligner}}'"
        " evaluation.tasks.facts.sample_mode=snis evaluation.tasks.facts.n_candidates=4",
    ],
)
def test_key_that_something_uses_is_accepted(line):
    resolve(line)


@pytest.mark.parametrize("name", [GATED, "a b=c:d,e(f){g}\\h"])
def test_key_of_one_system_reaches_it_whatever_its_name(name):
    new = "" if name == GATED else system_override(name, "aligner", "aligner")
    line = f"experiment=demo {new} {system_override(name, 'temperature', 0.25)}"
    found = systems(line)
    assert {key for key, system in found.items() if system.settings.temperature == 0.25} == {name}


def test_command_of_a_warning_works_when_pasted():
    row = {"system": GATED, "fallback_fraction": 0.9, "changed_fraction": 0.0}
    command = gate_warning(row).partition("compare ")[2]
    assert command == r"'evaluation.systems={proposal+aligner\[par_kl\]: {sample_mode: par}}'"
    assert systems(f"experiment=demo {command}")[GATED].params.sample_mode == "par"


def test_command_of_a_refusal_works_when_pasted():
    with pytest.raises(UserError) as refusal:
        resolve("experiment=llama_uc sampling.sample_mode=par")
    command = str(refusal.value).partition("as in ")[2].replace("VALUE", "par")
    assert systems(f"experiment=llama_uc {command}")[GATED].params.sample_mode == "par"


def test_pair_that_no_server_can_keep_is_refused_with_a_command_that_works():
    """A server of a pair has no tokens where `product` and the gate of `par_kl` need them for the penalty."""
    line = "experiment=demo sampling.backend=endpoint sampling.endpoint.urls=[http://a/v1]"
    assert {system.settings.backend for system in systems(line).values()} == {"endpoint"}
    line += " sampling.repetition_penalty=1.1"
    while True:
        try:
            assert {system.settings.backend for system in systems(line).values()} == {"local", "endpoint"}
            return
        except UserError as refusal:
            line += f" {str(refusal).partition('; or give ')[2]}"


def test_misspelt_system_is_refused():
    with pytest.raises(
        UserError, match=r"unknown system 'proposal\+aligner\[pr\]': did you mean 'pro.*par\]'"
    ):
        resolve(f"experiment=demo {system_override('proposal+aligner[pr]', 'top_p', 1)}")
