#!/usr/bin/env bash
# The eight published settings: two pairs on UltraChat, TL;DR, HH helpful and HH harmless. Each goes on where it
# stopped; a pair that is not trained yet is named and the others run. Leaderboard of all: _output/all_systems.csv.
set -uo pipefail
source "$(dirname "$0")/env.sh"
failed=()
for recipe in llama_uc llama_summ llama_hh qwen_uc qwen_summ qwen_hh; do
    "$PYTHON" -m ram.distributed.launch pipeline.py experiment="$recipe" "$@" || failed+=("$recipe")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "not evaluated: ${failed[*]} (the reason stands above each)" >&2
    exit 1
fi
