#!/usr/bin/env bash
# The whole method on a toy world: both models from nothing, all stages, every system, a report.
#   bash bin/demo.sh            results in _output/demo
#   bash bin/demo.sh seed=1     another world, other weights
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_venv
"$PYTHON" train.py experiment=demo "$@"
"$PYTHON" pipeline.py experiment=demo "$@"
"$PYTHON" train.py experiment=demo_mixture "$@"
"$PYTHON" pipeline.py experiment=demo_mixture "$@"
