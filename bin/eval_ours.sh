#!/usr/bin/env bash
# Evaluate the eight published settings: two pairs on UltraChat, TL;DR, HH helpful and HH harmless. An evaluation that
# was stopped is resumed. A pair that is not trained yet is reported, and the others run. _output/all_systems.csv is the
# leaderboard of all.
set -uo pipefail
source "$(dirname "$0")/env.sh"
use_python
failed=()
for recipe in llama_uc llama_summ llama_hh qwen_uc qwen_summ qwen_hh; do
    "$PYTHON" -m ram.distributed.launch pipeline.py experiment="$recipe" "$@" || failed+=("$recipe")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "not evaluated: ${failed[*]} (see the errors above)" >&2
    exit 1
fi
