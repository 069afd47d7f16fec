#!/usr/bin/env bash
# Serve a proposal with any number of aligners over OpenAI's protocol; config/serve.yaml has every key.
#   bash bin/serve.sh proposal=FOLDER aligners='{helpful: FOLDER, harmless: FOLDER}'
#   bash bin/serve.sh chat proposal=FOLDER aligner=FOLDER       chat in the terminal
#   bash bin/serve.sh worker proposal=FOLDER aligner=FOLDER     a worker for FastChat's controller
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_python
exec "$PYTHON" serve.py "$@"
