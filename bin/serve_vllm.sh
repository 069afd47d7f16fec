#!/usr/bin/env bash
# Serve a pair inside vLLM, by the Python of vLLM's own environment, active or in PYTHON (docs/vllm.md). Prints the
# `vllm serve` command and runs it.
#   bash bin/serve_vllm.sh proposal=FOLDER aligner=FOLDER sample_mode=par
#   bash bin/serve_vllm.sh proposal=FOLDER aligner=FOLDER sample_mode=par tensor_parallel=4 drafts=4 -- --port 8001
set -euo pipefail
unset CDPATH # with it, `cd bin/..` may go elsewhere
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m ram.vllm.launch "$@"
