#!/usr/bin/env bash
# Prunes Swin-Base to 4.5 G MACs in one shot: Taylor scores, ranked within isomorphic groups.
# All heads stay; their dims follow the ratio of the widths.
# Hardware: 1 GPU, minutes (a CPU will do). Scores 50 batches × 64 = 3,200 training images, evaluation transform.
# Expected (paper's counter): MACs 15.48 G => about 4.5 G, params 87.77 M => not known;
#   top-1 after scripts/finetuning/swin_4.5G.sh: not known.
# The published batches were unseeded: expect about these sizes, or append --target-macs 4.5G to fix them.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" prune.py \
  --model swin_base_patch4_window7_224.ms_in1k \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic \
  --pruning-type taylor --taylor-batches 50 --batch-size 64 \
  --ranking isomorphic --pruning-ratio 0.47 --head-pruning-ratio 0 --round-to 2 \
  --save-as output/pruned/swin_4.5G.safetensors \
  "$@"
