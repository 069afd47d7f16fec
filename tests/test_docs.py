"""README and docs: commands resolve, links exist, the Python example runs, the README is short."""

import re
import shlex
from pathlib import Path

import pytest
from small import ROOT
from tiny import byte_tokenizer, tiny_model

from ram.settings import compose, recipes
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


def commands(text: str) -> list[str]:
    """The commands in the bash blocks of a page that start one of our scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(bash bin/|python (?!- ))", line)]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_first_commands_are_in_the_readme():
    assert {"bash bin/demo.sh", "bash bin/test.sh"} <= set(commands(README))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_resolve(command):
    """Every training command selects its stages; every script exists; every override composes."""
    _, target, *arguments = shlex.split(command)
    if target == "-m":
        module = arguments[0].replace(".", "/")
        assert (ROOT / f"{module}.py").is_file()
        return
    assert (ROOT / target).is_file()
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if target.startswith("bin/train_"):
        overrides.insert(0, f"experiment={target.removeprefix('bin/train_').removesuffix('.sh')}")
    if target == "train.py" or target.startswith("bin/train_"):
        stages = recipes.resolve(compose.preflight(overrides), TABLES)
        recipes.select(stages, compose.compose(compose.preflight(overrides)).stages)
    elif target == "pipeline.py":
        compose.preflight(overrides)


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
