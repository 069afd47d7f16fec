#!/usr/bin/env bash
# Train the pair of config/experiment/llama_uc.yaml, stage by stage; any key=value is passed on.
#   bash bin/train_llama_uc.sh dry_run=true        print the stages with their inputs and outputs
#   bash bin/train_llama_uc.sh 'stages=[aligner]'    one stage
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_python
exec "$PYTHON" -m ram.distributed.launch train.py experiment=llama_uc "$@"
