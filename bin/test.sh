#!/usr/bin/env bash
# Lint, then the tests. Arguments go to pytest: `bash bin/test.sh -m slow` runs the long tests.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv
# The tools for tests and development, in the versions that pyproject.toml pins.
if ! cmp -s pyproject.toml .venv/pyproject.installed; then
    echo "installing the development tools into .venv"
    .venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
    cp pyproject.toml .venv/pyproject.installed
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
"$PYTHON" -m pytest "$@"
