#!/usr/bin/env bash
# Prunes ResNet-152 to 4.0 G MACs in one shot: Taylor scores, ranked within isomorphic groups.
# Finetuning's dropout before the classifier is built in here.
# Hardware: 1 GPU, minutes (a CPU will do). Scores 100 batches × 64 = 6,400 training images, evaluation transform.
# Expected (paper's counter): MACs 11.58 G => about 4.0 G, params 60.19 M => not known;
#   top-1 after scripts/finetuning/resnet152_4.0G.sh: not known.
# The published batches were unseeded: expect about these sizes, or append --target-macs 4.0G to fix them.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" prune.py \
  --model resnet152.tv_in1k --model-kwargs drop_rate=0.1 \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear \
  --pruning-type taylor --taylor-batches 100 --batch-size 64 \
  --ranking isomorphic --pruning-ratio 0.4 --round-to 2 \
  --save-as output/pruned/resnet152_4.0G.safetensors \
  "$@"
