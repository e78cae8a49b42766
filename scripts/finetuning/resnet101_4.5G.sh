#!/usr/bin/env bash
# Finetunes the pruned ResNet-101-4.5G on ImageNet-1K for 100 epochs, without a teacher.
# Run scripts/pruning/resnet101_4.5G.sh first.
# Random crops and flips only; the dropout of 0.1 before the classifier was built in when pruning.
# Hardware: 4 GPUs. Batch: 4 processes × 256 images = 1024 a step, 1252 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=2 … --batch-size 512
# Expected: MACs 4.48 G, params 29.14 M (paper's counter), top-1 77.56.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-4}" finetune.py \
  --model output/pruned/resnet101_4.5G.safetensors \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear \
  --epochs 100 --batch-size 256 --opt sgd --momentum 0.9 --lr 0.04 --weight-decay 1e-4 \
  --lr-scheduler steplr --lr-step-size 30 --lr-gamma 0.1 --amp \
  --output-dir output/finetuned/resnet101_4.5G \
  "$@"
