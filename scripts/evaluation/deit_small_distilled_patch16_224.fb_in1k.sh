#!/usr/bin/env bash
# Evaluates the dense DeiT-Small (distilled) on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 4.6391 G, params 22.4364 M, top-1 81.17.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model deit_small_distilled_patch16_224.fb_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic --batch-size 64 \
  "$@"
