#!/usr/bin/env bash
# DepGraph's chain on ImageNet-1K's pretrained ResNeXt-50 (32×4d): group sparse training, pruning to half, finetuning.
# Hardware: 4 GPUs, days. Batch: 4 processes × 64 images = 256 a step, 5005 steps an epoch, 30 + 100 epochs; the
#   learning rates belong to that batch. Fewer GPUs, more images: NPROC_PER_NODE=2 … -- --batch-size 128
# Expected (paper's counter): MACs 4.27 G => 2.14 G, params 25.03 M => not known. No figures come with the published
#   script; recipes and steps are ours.
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
model=(--model resnext50_32x4d.tv_in1k) builder=() processes=4
data=(--data-path data/imagenet --val-resize-size 256 --interpolation bilinear)
out=output/depgraph/resnext50 cut=50% budget=50% steps=100
training=(--opt sgd --momentum 0.9 --weight-decay 1e-4 --batch-size 64 --amp)
dense=()
sparse=(--sparsify group --sparsify-reg 5e-4 --lr 0.01 --epochs 30 --lr-scheduler multisteplr --lr-milestones 20 25)
finetuning=(--lr 0.04 --epochs 100 --lr-scheduler steplr --lr-step-size 30)
source scripts/depgraph/chain.sh "$@"
