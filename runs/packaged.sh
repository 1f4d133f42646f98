#!/usr/bin/env bash
# The packaged models from scratch: tower features, gate, projector, assistant, rewriter, package. Two cores, no GPU.
#   runs/packaged.sh DATA [BUILD]      DATA: the folder data/train; our own data is in data/
# Minutes of each stage as measured stand in src/vlmguard/packaged/MODEL_CARD.md.
set -eu
cd "$(dirname "$0")/.."
data=${1:?the folder data/train, with caltech101, imagenet_samples, coco_mini_open, coco_mini_research, jailguard_benign}
build=${2:-build/packaged}
for stage in photos words cases align examples gate name told assist rewrite verdicts look pack; do
    .venv/bin/python -m runs.packaged "$stage" --data "$data" --build "$build"
done
