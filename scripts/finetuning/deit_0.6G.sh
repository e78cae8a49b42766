#!/usr/bin/env bash
# Finetunes the pruned DeiT-0.6G on ImageNet-1K for 300 epochs, hard distillation from RegNetY-16GF.
# Run scripts/pruning/deit_0.6G.sh first.
# Hardware: 8 GPUs. Batch: 8 processes × 512 images = 4096 a step, 313 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=4 … --batch-size 1024
# Expected: MACs 0.62 G, params 3.08 M (paper's counter), top-1 72.60.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-8}" finetune.py \
  --model output/pruned/deit_0.6G.safetensors \
  --teacher-model regnety_160.deit_in1k --distillation hard \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic \
  --epochs 300 --batch-size 512 --opt adamw --lr 5e-4 --weight-decay 0.05 --lr-scheduler cosineannealinglr \
  --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 --auto-augment ra --random-erase 0.25 \
  --ra-sampler --ra-reps 3 --amp \
  --output-dir output/finetuned/deit_0.6G \
  "$@"
