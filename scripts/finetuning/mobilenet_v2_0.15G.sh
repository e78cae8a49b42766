#!/usr/bin/env bash
# Finetunes the pruned MobileNet-v2-0.15G on ImageNet-1K for 300 epochs, without a teacher.
# Run scripts/pruning/mobilenet_v2_0.15G.sh first.
# Random crops and flips only; torchvision's own dropout of 0.2 before the classifier stays.
# Hardware: 4 GPUs. Batch: 4 processes × 512 images = 2048 a step, 626 steps an epoch; the learning rate
#   belongs to that batch. With fewer GPUs raise the second factor: NPROC_PER_NODE=2 … --batch-size 1024
# Expected: MACs about 0.15 G (paper's counter), params and top-1 not known.
# To go on after an interruption, append --resume auto.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-4}" finetune.py \
  --model output/pruned/mobilenet_v2_0.15G.safetensors \
  --data-path data/imagenet --val-resize-size 256 --interpolation bilinear \
  --epochs 300 --batch-size 512 --opt sgd --momentum 0.9 --lr 0.036 --weight-decay 2e-5 \
  --lr-scheduler cosineannealinglr --amp \
  --output-dir output/finetuned/mobilenet_v2_0.15G \
  "$@"
