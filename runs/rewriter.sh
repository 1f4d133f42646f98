#!/usr/bin/env bash
# A small rewriter from authored transcripts, end to end on two cores: synthesis, supervised fine-tuning, GRPO.
#   runs/rewriter.sh PHOTOS [BUILD]      PHOTOS: the training photos that data/transcripts/samples.jsonl names
# Minutes as measured, and what came of it, stand in docs/results/rewriter.md.
set -eu
cd "$(dirname "$0")/.."
photos=${1:?the folder with caltech101, imagenet_samples, coco_mini_open, coco_mini_research, jailguard_benign}
build=${2:-build/rewriter}
run=.venv/bin/vlmguard
$run synthesize data/transcripts/samples.jsonl --images "$photos" --analyst authored:data/transcripts/answers.jsonl \
    --check form --check language_kept --check intent_kept --check judged_safe --judge-with packaged:rewriter --out "$build/dataset"
$run train sft "$build/dataset" --images "$photos" --preset packaged --out "$build/sft"
$run train grpo "$build/dataset" --images "$photos" --base "$build/sft" --target packaged:assistant --judge packaged \
    --generations 4 --batch 1 --max-completion-tokens 160 --steps "${STEPS:-100}" --out "$build/grpo"
