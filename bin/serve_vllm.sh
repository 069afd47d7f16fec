#!/usr/bin/env bash
# Serve a pair inside vLLM, from vLLM's own environment (docs/vllm.md). Prints the `vllm serve` command and runs it.
#   bash bin/serve_vllm.sh proposal=FOLDER aligner=FOLDER sample_mode=par
#   bash bin/serve_vllm.sh proposal=FOLDER aligner=FOLDER sample_mode=par tensor_parallel=4 drafts=4 -- --port 8001
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m ram.vllm.launch "$@"
