#!/usr/bin/env bash
# The paper's recipe at its full size: about 10,000 rows, one Qwen2-VL-7B. NOT RUN HERE: it needs GPUs, the hub, and an analyst.
#   runs/paper.sh ANALYST TARGET JUDGE OUT      the first three: specs of models behind endpoints, as http://host/v1#model
#
# What to expect, reckoned and not measured:
#   synthesis   11,500 samples x 3 calls of a 38 B analyst (the paper's is InternVL2.5-38B), about 1,500 tokens each: 10 h on 4 x 80 GB
#   answers     VLGuard and VLSBench have no unsafe answers: one call each of TARGET
#   sft         9,881 rows, 3 epochs, LoRA: 6 h on 1 x 80 GB, 1 h on 8
#   grpo        (ours; the paper has none) 500 steps of 16 prompts and 8 completions: 20 h on 8 x 80 GB
set -eu
cd "$(dirname "$0")/.."
analyst=${1:?the analyst, as http://host/v1#model} target=${2:?the target} judge=${3:?the judge of answers} out=${4:?a folder}
run=.venv/bin/vlmguard
for source in spa-vl vlguard vlsbench; do  # the paper's sources; VLGuard is gated: accept its terms, then hf auth login
    $run synthesize "$source" --limit 4000 --analyst "$analyst" --concurrency 128 --out "$out/$source" \
        --unsafe-from "$target" --safe-from "$analyst" --verify-with "$target" --judge "$judge" --resume
done
mkdir -p "$out/dataset"
for source in spa-vl vlguard vlsbench; do
    ln -sfn "../$source/images" "$out/dataset/images-$source"
    sed "s#\"path\": \"images/#\"path\": \"images-$source/#g" "$out/$source/dataset.jsonl"
done >"$out/dataset/dataset.jsonl"
accelerate launch -m vlmguard train sft "$out/dataset" --preset qwen2-vl-7b --out "$out/sft"
$run train merge "$out/sft" --out "$out/merged"
accelerate launch -m vlmguard train grpo "$out/dataset" --base "$out/sft" --target "$target" --judge "$judge" \
    --steps 500 --batch 16 --out "$out/grpo"
