#!/usr/bin/env bash
# Finetunes the pruned Swin-4.5G on ImageNet-1K for 300 epochs, soft distillation from RegNetY-16GF.
# Run scripts/pruning/swin_4.5G.sh first.
# The recipe is ours, as none is published: DeiT's, with soft distillation, because Swin has no distillation token.
# Its one head learns from labels and teacher, half and half (--distillation-alpha 0.5 --distillation-tau 1).
# Hardware: 8 GPUs. Batch: 8 processes × 256 images = 2048 a step, 626 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=4 … --batch-size 512
# Expected: MACs about 4.5 G (paper's counter), params and top-1 not known.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-8}" finetune.py \
  --model output/pruned/swin_4.5G.safetensors \
  --teacher-model regnety_160.deit_in1k --distillation soft \
  --data-path data/imagenet --val-resize-size 256 --interpolation bicubic \
  --epochs 300 --batch-size 256 --opt adamw --lr 5e-4 --weight-decay 0.05 --lr-scheduler cosineannealinglr \
  --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 --auto-augment ra --random-erase 0.25 \
  --ra-sampler --ra-reps 3 --amp \
  --output-dir output/finetuned/swin_4.5G \
  "$@"
