#!/usr/bin/env bash
# Evaluates torchvision's dense MobileNet-v2 on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 0.32 G, params 3.50 M; top-1 not known.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model mobilenet_v2 --is-torchvision \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear --batch-size 64 \
  "$@"
