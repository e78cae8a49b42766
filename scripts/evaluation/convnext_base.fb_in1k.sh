#!/usr/bin/env bash
# Evaluates the dense ConvNeXt-Base on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 15.36 G, params 88.59 M, top-1 83.83.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model convnext_base.fb_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic --batch-size 64 \
  "$@"
