#!/usr/bin/env bash
# Evaluates the dense DeiT-Base (distilled) on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 17.69 G, params 87.34 M, top-1 83.32.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model deit_base_distilled_patch16_224.fb_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic --batch-size 64 \
  "$@"
