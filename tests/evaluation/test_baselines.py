"""The paper's baselines: their stages and systems, what a corrector is given to correct, the table."""

import json

import pytest
import small
from small import SMALL, run

import pipeline
import train
from ram.answers.answer_files import read_answers
from ram.errors import UserError
from ram.evaluation.context import read_test_rows
from ram.evaluation.judges.dummy import DummyJudge
from ram.evaluation.systems import job_of, resolve_systems
from ram.settings import compose, recipes
from ram.storage.files import BadRows
from utils import TABLES

SMALLER = [*SMALL, "stage.proposal_dpo.n_examples=32", "stage.aligner_dpo.n_examples=32"]
METHOD = {
    "uc": ["proposal", "sample", "aligner"],
    "summ": ["proposal", "sample", "aligner"],
    "hh": ["aligner_sft", "proposal", "aligner"],
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The toy's table in small: the arguments, and where its outputs lie."""
    folder = tmp_path_factory.mktemp("toy")
    arguments = ["experiment=toy_facts", f"output_dir={folder}", *SMALLER]
    for entry in (train, pipeline):
        run(entry, *arguments)
    return arguments, folder


def systems_of(*arguments):
    config = small.settings(*arguments)
    stages = {stage.name: stage for stage in recipes.resolve(arguments, TABLES)}
    return config, resolve_systems(config, next(iter(config.evaluation.tasks)), stages, set())


def rows_of(systems, config):
    settings = [system.settings for system in systems.values()]
    return read_test_rows(pipeline.test_file(config, "facts"), settings, DummyJudge(), BadRows())


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("task", METHOD)
def test_baselines_flag_adds_stages(family, task):
    """Without `baselines` the published stages alone; with it all that the paper's table needs."""
    recipe = f"experiment={family}_{task}"
    assert [stage.name for stage in recipes.resolve([recipe], TABLES)] == METHOD[task]
    stages = {stage.name: stage for stage in recipes.resolve([recipe, "baselines=true"], TABLES)}
    large, small = (stages[METHOD[task][i]].config.model.name for i in ((1, 0) if task == "hh" else (0, 2)))
    assert stages["corrector_warmup"].config.model.name == stages["corrector"].config.model.name == small
    assert stages["corrector"].source == str(stages["corrector_warmup"].weights)
    assert list(stages["corrector"].config.datasets)[0].endswith("_aligner_common")
    if task == "hh":
        dpo, preferences = stages["proposal_dpo"], stages["aligner_dpo"]
        assert dpo.config.model.name == large and not dpo.config.loss.reference_free
        assert dpo.source == str(stages["proposal"].weights)
        assert preferences.config.loss.name == "ours_dpo" and preferences.config.loss.reference_free
    else:
        assert stages["proposal_sft"].config.model.name == large
        assert stages["aligner_sft_only"].config.model.name == small
        sampled = f"{'uc' if task == 'uc' else 'summ-sft'}_{large}"
        assert list(stages["corrector_warmup"].config.datasets) == [f"{sampled}_aligner_warmup"]
        assert stages["corrector"].reads == [stages["sample"].output]
    runs = [stage.output for stage in stages.values()]
    assert len(set(runs)) == len(runs)
    # A corrector's prompt holds a whole prompt, a whole answer and the request; its answer is as long as any.
    config, corrector = stages["aligner"].config, stages["corrector"].config
    assert corrector.max_prompt_length >= config.max_length + 16
    assert corrector.max_length - corrector.max_prompt_length == config.max_length - config.max_prompt_length


@pytest.mark.parametrize("name", [f"{f}_{t}" for f in ("llama", "qwen") for t in METHOD] + ["toy_facts"])
def test_names_in_the_paper_table_are_systems(name):
    """Every line of a table is a system of its recipe."""
    config = compose.compose([f"experiment={name}", "baselines=true"])
    assert set(config.evaluation.paper) == set(config.evaluation.tasks)
    for lines in config.evaluation.paper.values():
        assert set(lines) <= set(config.evaluation.systems)


def test_corrector_prompts_contain_the_answers_of_its_system(table):
    """Each prompt is the question, that system's answer to it and the request; the reference is not seen."""
    arguments, folder = table
    config, systems = systems_of(*arguments)
    rows = rows_of(systems, config)
    for name, corrected in (
        ("proposal+corrector", "proposal"),
        ("proposal_dpo+corrector", "proposal_dpo"),
    ):
        assert systems[name].corrects == corrected
        drafts = read_answers(systems[corrected].output, job_of(systems[corrected], rows, config))
        drafts = [answer["text"] for answer in drafts]
        job = job_of(systems[name], rows, config, drafts)
        for (_, row), draft, prompt in zip(rows, drafts, job.prompts, strict=True):
            question = f"\n\nHuman: {row['instruction']}\n\nAssistant: "
            assert prompt == f"{question}{draft}\n\nCorrection: "
        assert len(read_answers(systems[name].output, job)) == len(rows)
        # The file in AlpacaEval's format asks the same questions as all others, and holds the corrections.
        written = json.loads(systems[name].output.read_text())
        assert [row["instruction"] for row in written] == [row["instruction"] for _, row in rows]
    assert systems["proposal+corrector"].folder != systems["proposal_dpo+corrector"].folder


def test_corrections_of_other_answers_are_refused(table):
    """Corrections of answers that have changed are no longer those wanted."""
    arguments, folder = table
    config, systems = systems_of(*arguments)
    rows = rows_of(systems, config)
    drafts = ["Just blue."] * len(rows)
    with pytest.raises(UserError, match=r"made from other inputs \(rows: "):
        read_answers(
            systems["proposal+corrector"].output, job_of(systems["proposal+corrector"], rows, config, drafts)
        )


def test_paper_table_is_written(table):
    """One line per system of the paper's table, with what the leaderboard says of it."""
    _, folder = table
    lines = (folder / "table" / "paper_table.md").read_text().splitlines()
    found = json.loads((folder / "table" / "results.json").read_text())["systems"]
    assert len(lines) == 2 + 10 + 2
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:12]}
    for name, system in (("W.Up large + Aligner small", "proposal+corrector"), ("DPO large", "proposal_dpo")):
        assert cells[name][0].startswith(f"{100 * found[system]['win_rate']:.1f} (")
        assert cells[name][2].startswith(f"{100 * found[system]['both']:.1f} (")
        assert cells[name][3] == "12 |"


WRONG = [
    ("++evaluation.systems.x={corrects: nobody, aligner: corrector}", "corrects='nobody': no earlier system"),
    ("++evaluation.systems.x={corrects: x, aligner: corrector}", "corrects='x': no earlier system"),
    (
        "++evaluation.systems.x={corrects: proposal+corrector, aligner: corrector}",
        r"corrects='proposal\+corrector': no earlier system",
    ),
    (
        "++evaluation.systems.x={corrects: proposal, aligner: corrector, proposal: proposal}",
        "rewrites answers; give `aligner` alone",
    ),
    ("++evaluation.systems.x={corrects: proposal, proposal: proposal}", "give `aligner` alone"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_corrector_without_a_system_is_refused(override, message):
    """Named before any model loads."""
    with pytest.raises(UserError, match=message):
        systems_of("experiment=demo", override)
