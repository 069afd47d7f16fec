#!/usr/bin/env bash
# Lint, then the tests; arguments go to pytest (`bash bin/test.sh -m slow` runs the long ones).
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv
.venv/bin/ruff check .
.venv/bin/ruff format --check .
"$PYTHON" -m pytest "$@"
