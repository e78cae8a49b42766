#!/usr/bin/env bash
# Evaluates the dense ConvNeXt-Small on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 8.69 G, params 50.22 M; top-1 not known.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model convnext_small.fb_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic --batch-size 64 \
  "$@"
