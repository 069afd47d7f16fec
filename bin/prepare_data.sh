#!/usr/bin/env bash
# Makes the data files below _data: from the hub, or with --from from local copies (paths from the project's folder).
#   bash bin/prepare_data.sh [uc summ hh alpaca]                        none named = all four
#   bash bin/prepare_data.sh hh --from downloads/helpful-base/test.jsonl.gz
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m ram.data.prepare "$@"
