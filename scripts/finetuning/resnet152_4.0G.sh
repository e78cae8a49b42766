#!/usr/bin/env bash
# Finetunes the pruned ResNet-152-4.0G on ImageNet-1K for 100 epochs, without a teacher.
# Run scripts/pruning/resnet152_4.0G.sh first.
# Random crops and flips only; the dropout of 0.1 before the classifier was built in when pruning.
# Hardware: 4 GPUs. Batch: 4 processes × 256 images = 1024 a step, 1252 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=2 … --batch-size 512
# Expected: MACs about 4.0 G (paper's counter), params and top-1 not known.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-4}" finetune.py \
  --model output/pruned/resnet152_4.0G.safetensors \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear \
  --epochs 100 --batch-size 256 --opt sgd --momentum 0.9 --lr 0.04 --weight-decay 1e-4 \
  --lr-scheduler steplr --lr-step-size 30 --lr-gamma 0.1 --amp \
  --output-dir output/finetuned/resnet152_4.0G \
  "$@"
