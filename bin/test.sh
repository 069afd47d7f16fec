#!/usr/bin/env bash
# Check the style, then run the tests. Arguments go to pytest: `bash bin/test.sh -m slow` runs the long tests.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_python dev
export PYTHON
bash bin/style.sh
"$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
