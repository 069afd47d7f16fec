#!/usr/bin/env bash
# Try learning rates for the toy's baselines in the world of seed 10, other facts and other weights than those of any
# table. Prints the share of right and aligned answers by rate; config/experiment/demo.yaml has the best of each.
#   bash benchmarks/tune_toy.sh FOLDER [SEED]    half an hour on two cores; a run that was stopped is resumed
set -euo pipefail
folder="${1:?usage: bash benchmarks/tune_toy.sh FOLDER [SEED]}"
seed="${2:-10}"
source "$(dirname "$0")/../bin/env.sh"
use_python
stages=(proposal_sft proposal_dpo aligner_sft_only corrector)
systems=(proposal_sft proposal_dpo aligner_sft_only proposal+corrector)
for point in "1e-3 5e-4 4e-3 4e-3" "5e-4 2e-4 2e-3 2e-3" "2e-4 1e-4 1e-3 1e-3" "1e-4 5e-5 5e-4 5e-4" "2e-4 2e-5 2e-3 2.5e-4"; do
    read -r -a rates <<< "$point"
    report="$folder/point/${point// /_}"
    arguments=(experiment=toy_facts "seed=$seed" "output_dir=$folder" "report_dir=$report")
    for i in "${!stages[@]}"; do arguments+=("stage.${stages[i]}.lr=${rates[i]}"); done
    "$PYTHON" train.py "${arguments[@]}"
    "$PYTHON" pipeline.py "${arguments[@]}" "evaluation.steps=[generate,leaderboard]" evaluation.verify_rows=0
    for i in "${!systems[@]}"; do
        "$PYTHON" - "$report/leaderboard.csv" "${systems[i]}" "${rates[i]}" <<'END'
import csv, sys

print(*sys.argv[2:], *(row["both"] for row in csv.DictReader(open(sys.argv[1])) if row["system"] == sys.argv[2]))
END
    done
done
