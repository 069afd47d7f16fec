#!/usr/bin/env bash
# Make the data files below _data from the hub, or with --from from local copies (paths relative to the project).
#   bash bin/prepare_data.sh [uc summ hh alpaca]                        without a name: all four
#   bash bin/prepare_data.sh hh --from downloads/helpful-base/test.jsonl.gz
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_python
exec "$PYTHON" -m ram.data.prepare "$@"
