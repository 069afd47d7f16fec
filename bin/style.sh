#!/usr/bin/env bash
# Check lint, format, types, spelling and shell scripts.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_python dev
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # of the tools
ruff check .
ruff format --check .
pyright --pythonpath "$PYTHON"
codespell
shellcheck bin/*.sh .ci/run
