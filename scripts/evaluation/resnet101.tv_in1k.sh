#!/usr/bin/env bash
# Evaluates the dense ResNet-101 on the ImageNet-1K validation images: resize 256, crop 224, fp32.
# Hardware: 1 GPU (a CPU will do, slower).
# Expected (paper's counter): MACs 7.85 G, params 44.55 M, top-1 77.38.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" evaluate.py \
  --model resnet101.tv_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear --batch-size 64 \
  "$@"
