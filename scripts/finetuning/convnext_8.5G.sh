#!/usr/bin/env bash
# Finetunes the pruned ConvNeXt-8.5G on ImageNet-1K for 300 epochs, without a teacher.
# Run scripts/pruning/convnext_8.5G.sh first.
# (The published colour jitter of 0.4 has no effect beside RandAugment: 0 here.)
# Hardware: 8 GPUs. Batch: 8 processes × 128 images × 2 accumulated = 2048 a step, 626 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the last factor: NPROC_PER_NODE=4 … --accumulate 4
# Expected: MACs 8.48 G, params 47.36 M (paper's counter), top-1 83.17, of the moving average of the weights.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-8}" convnext_train.py \
  --model output/pruned/convnext_8.5G.safetensors \
  --data-path data/imagenet --val-resize-size 256 --train-interpolation bicubic --interpolation bicubic \
  --epochs 300 --batch-size 128 --accumulate 2 --opt adamw --lr 2e-3 --weight-decay 0.05 \
  --lr-scheduler cosineannealinglr --lr-min 1e-6 --amp --model-ema --model-ema-decay 0.9999 \
  --label-smoothing 0.1 --mixup-alpha 0.2 --cutmix-alpha 1.0 --auto-augment rand-m9-mstd0.5-inc1 \
  --random-erase 0.25 --color-jitter 0 --drop 0.1 --drop-path 0.4 \
  --output-dir output/finetuned/convnext_8.5G \
  "$@"
