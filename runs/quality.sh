#!/usr/bin/env bash
# The quality table of the packaged models, from scratch, on the evaluation subsets.
#   runs/quality.sh DATA [BUILD]      DATA: the folder with train/ and eval/; BUILD: that of runs/packaged.sh, for the baselines
set -eu
cd "$(dirname "$0")/.."
data=${1:?the folder with train/ and eval/}
build=${2:-build/packaged}
for stage in photos words cases examples; do
    [ -f "$build/$([ $stage = words ] && echo nouns || { [ $stage = cases ] && echo drawn || echo $stage; }).pt" ] ||
        .venv/bin/python -m runs.packaged "$stage" --data "$data/train" --build "$build"
done
.venv/bin/python -m runs.quality --data "$data" --build "$build"
