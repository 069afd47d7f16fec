#!/usr/bin/env bash
# Train the pair of config/experiment/llama_summ.yaml, stage by stage; any key=value is passed on.
#   bash bin/train_llama_summ.sh dry_run=true        print the stages with their inputs and outputs
#   bash bin/train_llama_summ.sh 'stages=[aligner]'    one stage
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_python
exec "$PYTHON" -m ram.distributed.launch train.py experiment=llama_summ "$@"
