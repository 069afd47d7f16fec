#!/usr/bin/env bash
# Check lint, format, types, spelling and shell scripts. Installs the development tools into .venv if they are missing.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv
if ! cmp -s pyproject.toml .venv/pyproject.installed; then
    echo "installing the development tools into .venv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
    cp pyproject.toml .venv/pyproject.installed
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
.venv/bin/codespell
.venv/bin/shellcheck bin/*.sh .ci/run
