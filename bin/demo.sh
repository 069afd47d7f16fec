#!/usr/bin/env bash
# Run the whole method on toy data: train both models from scratch in all stages, evaluate every system, write a report.
#   bash bin/demo.sh            results in _output/demo
#   bash bin/demo.sh seed=1     other data and other weights
set -euo pipefail
source "$(dirname "$0")/env.sh"
# shellcheck disable=SC2119 # no argument is meant
make_python
"$PYTHON" train.py experiment=demo "$@"
"$PYTHON" pipeline.py experiment=demo "$@"
"$PYTHON" train.py experiment=demo_mixture "$@"
"$PYTHON" pipeline.py experiment=demo_mixture "$@"
