#!/usr/bin/env bash
# Run the whole method on toy data: train both models from scratch in all stages, evaluate every system, write a report.
#   bash bin/demo.sh            results in _output/demo
#   bash bin/demo.sh seed=1     other data and other weights
set -euo pipefail
source "$(dirname "$0")/env.sh"
# shellcheck disable=SC2119 # no argument is meant
make_python
for command in "train.py experiment=demo" "train.py experiment=demo_mixture" \
    "pipeline.py experiment=demo_mixture" "pipeline.py experiment=demo"; do
    # shellcheck disable=SC2086 # two words
    "$PYTHON" $command console=brief "$@"
done
