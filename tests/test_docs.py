"""README and docs: commands resolve, links exist, the Python example runs, the README is short."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from pages import commands
from small import ROOT, settings
from tiny import byte_tokenizer, tiny_model

from ram.data import prepare
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.evaluation.systems import resolve_systems
from ram.settings import compose, recipes, serving
from ram.settings.checks import nested
from ram.vllm import launch
from utils import TABLES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "_data" / "README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Wording that a reader stumbles over and that must not return.
STUMBLING_BLOCKS = [
    "as many keys and values are held",
    "Who comes when the queue is full",
    "The loss has no minimum where the data never goes",
    "what is finished is left alone",
    "as long a one as the published recipes have",
    "It is not the paper's on top of",
    "tokens part in bfloat16",
    "The first token comes after",
    "which suits fixed batches best",
    "would have drawn likewise",
]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_first_commands_are_in_the_readme():
    assert {"bash bin/demo.sh", "bash bin/test.sh"} <= set(commands(README))


def arguments_of(command: str) -> tuple[str, list[str], list[str]]:
    """The script or module of a command, its words, and its overrides, those that a script adds included."""
    _, target, *words = shlex.split(command)
    if target == "-m":
        return words[0], words[1:], []
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    script = Path(target).stem
    if script.startswith("train_"):
        overrides.insert(0, f"experiment={script.removeprefix('train_')}")
    if script == "paper_table":
        overrides[:0] = [f"experiment={words[0]}_{words[1]}", "baselines=true"]
    if script == "demo":
        overrides.insert(0, "experiment=demo")
    return target, words, overrides


def resolved(overrides: list[str], evaluates: bool) -> dict[str, Any]:
    """All that a command line decides: stages with what they read, the selected ones, systems, other keys."""
    overrides = compose._values(compose.preflight(overrides))[-1]  # the last point of an ablation
    config = settings(*overrides)
    stages = recipes.resolve(overrides, TABLES)
    facts = nested(config)
    for key in ("sampling", "stage", "pair"):  # stages and systems have what they use of these
        facts.pop(key, None)
    given = {compose.key_of(override) for override in overrides}
    by_name = {stage.name: stage for stage in stages}
    tasks = config.evaluation.tasks if evaluates else {}
    return {
        "keys": facts | {"evaluation": {k: v for k, v in facts["evaluation"].items() if k != "systems"}},
        "stages": {
            stage.name: [recipes.identity(stage.config), stage.output, stage.source, stage.reads]
            + ([stage.config.sampling] if stage.kind == "sample" else [])
            for stage in stages
        },
        "selected": [stage.name for stage in recipes.select(stages, config.stages)],
        "systems": {task: resolve_systems(config, task, by_name, given) for task in tasks},
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_command_changes_what_it_resolves_to(command):
    """The README once had `sampling.sample_mode=par`, which every system's own setting beat."""
    target, words, overrides = arguments_of(command)
    if not target.endswith((".py", ".sh")):  # a module
        assert (ROOT / f"{target.replace('.', '/')}.py").is_file()
        return
    assert (ROOT / target).is_file(), target
    if Path(target).stem == "real_example":
        assert [word for word in words if "=" in word] in ([], ["quick=true"])  # the script's own key
        return
    if Path(target).stem == "prepare_data":
        assert set(itertools.takewhile(lambda word: not word.startswith("-"), words)) <= set(prepare.SOURCES)
        return
    if Path(target).stem == "serve" and not any(word.startswith("experiment=") for word in words):
        full = serving.read_settings(overrides)
        for left_out in overrides:
            rest = [override for override in overrides if override != left_out]
            if not left_out.startswith("proposal="):  # is required
                assert serving.read_settings(rest) != full, left_out
        return
    if Path(target).stem == "serve_vllm":
        keys = {override.partition("=")[0] for override in overrides}
        assert keys <= {*launch.KEYS, *PARParams.field_names()}
        return
    own = [override for override in overrides if override in words]
    if not own or own[0].startswith("report="):
        return
    evaluates = Path(target).stem in ("pipeline", "paper_table", "demo", "serve")
    full = resolved(overrides, evaluates)
    for left_out in own:
        if left_out.split("=")[0] in ("experiment", "model", "datasets"):  # are required
            continue
        try:
            rest = resolved([override for override in overrides if override != left_out], evaluates)
        except UserError:  # the others need it
            continue
        assert rest != full, left_out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_can_be_pasted_into_zsh(page):
    """zsh takes brackets and stars outside quotes for names of files, and ends with "no matches found"."""
    for command in commands(page.read_text(encoding="utf-8")):
        assert not re.search(r"[][{}*?]", re.sub(r"'[^']*'|\"[^\"]*\"", "", command)), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_links_every_page_of_the_docs():
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= set(
        re.findall(r"\]\((docs/[\w.]+)\)", README)
    )


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_readme_names_every_top_level_file_and_script():
    for path in [*ROOT.glob("*.py"), *(ROOT / "bin").glob("*.sh")]:
        assert path.name in README or path.name.startswith("train_"), path.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_old_wording_does_not_return(page):
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert not [wording for wording in STUMBLING_BLOCKS if wording in text]


def test_python_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    tokenizer = byte_tokenizer()
    models = {
        name: tiny_model(len(tokenizer), seed=seed) for seed, name in enumerate(("proposal", "aligner"))
    }
    exec(example, {"tokenizer": tokenizer, **models})
    assert "proposal_forwards" in capsys.readouterr().out
