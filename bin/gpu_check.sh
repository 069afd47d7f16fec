#!/usr/bin/env bash
# Check kernels, decoding and training on this machine's GPU in about ten minutes, with random weights of 8B and 1B
# shapes and no downloads, and measure their speed and memory. Without a GPU: tiny shapes, a minute.
#   bash bin/gpu_check.sh
#   bash bin/gpu_check.sh --sizes Qwen2.5-14B Llama-3.2-3B
set -euo pipefail
source "$(dirname "$0")/env.sh"
use_python
exec "$PYTHON" benchmarks/gpu_check.py "$@"
