#!/usr/bin/env bash
# Reproduce the paper's table: train all of its systems, baselines included, evaluate them, and print published and
# measured figures side by side (report_dir/paper_table.md). A run that was stopped is resumed.
#   bash bin/paper_table.sh toy facts                 minutes on two cores
#   bash bin/paper_table.sh llama uc judge=endpoint   FAMILY: llama, qwen; TASK: uc, summ, hh; any key=value follows
set -euo pipefail
if [ $# -lt 2 ] || [ ! -f "$(dirname "$0")/../config/experiment/$1_$2.yaml" ]; then
    echo "usage: bash bin/paper_table.sh FAMILY TASK [key=value ...], with FAMILY TASK one of:" \
        "toy facts, {llama,qwen} {uc,summ,hh}" >&2
    exit 2
fi
experiment="$1_$2"
shift 2
source "$(dirname "$0")/env.sh"
use_python
"$PYTHON" -m ram.distributed.launch train.py experiment="$experiment" baselines=true "$@"
exec "$PYTHON" -m ram.distributed.launch pipeline.py experiment="$experiment" baselines=true "$@"
