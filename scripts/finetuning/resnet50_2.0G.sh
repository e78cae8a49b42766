#!/usr/bin/env bash
# Finetunes the pruned ResNet-50-2.0G on ImageNet-1K for 100 epochs, without a teacher.
# Run scripts/pruning/resnet50_2.0G.sh first.
# (The published file trains the ResNet-152 checkpoint by mistake; this one trains ResNet-50.)
# Random crops and flips only; the dropout of 0.1 before the classifier was built in when pruning.
# Hardware: 4 GPUs. Batch: 4 processes × 64 images = 256 a step, 5005 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=2 … --batch-size 128
# Expected: MACs 2.06 G, params 15.05 M (paper's counter), top-1 75.91.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-4}" finetune.py \
  --model output/pruned/resnet50_2.0G.safetensors \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear \
  --epochs 100 --batch-size 64 --opt sgd --momentum 0.9 --lr 0.04 --weight-decay 1e-4 \
  --lr-scheduler steplr --lr-step-size 30 --lr-gamma 0.1 --amp \
  --output-dir output/finetuned/resnet50_2.0G \
  "$@"
