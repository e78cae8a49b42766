#!/usr/bin/env bash
# Prunes ConvNeXt-Base to 4.2 G MACs in one shot: Taylor scores, ranked within isomorphic groups.
# First removes 18 of the 27 blocks of the third stage, which leaves depths 3, 3, 9, 3; drop-path is built in.
# (The released file, convnext_tiny_4.2G_isomorphic.pth, is cut from ConvNeXt-Base, too.)
# Hardware: 1 GPU, minutes (a CPU will do). Scores 50 batches × 64 = 3,200 training images, evaluation transform.
# Expected (paper's counter): MACs 15.36 G => 4.19 G, params 88.59 M => 25.32 M;
#   top-1 after scripts/finetuning/convnext_4.2G.sh: 82.19 (dense: 83.83).
# The published batches were unseeded: expect about these sizes, or append --target-macs 4.19G to fix them.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" prune.py \
  --model convnext_base.fb_in1k --model-kwargs drop_path_rate=0.1 \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic \
  --pruning-type taylor --taylor-batches 50 --batch-size 64 \
  --ranking isomorphic --pruning-ratio 0.25 --remove-blocks 18 --round-to 2 \
  --save-as output/pruned/convnext_4.2G.safetensors \
  "$@"
