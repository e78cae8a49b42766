#!/usr/bin/env bash
# DepGraph's chain on torchvision's pretrained MobileNet-v2: group sparse training, pruning to 0.15 G MACs, finetuning.
# Hardware: 4 GPUs, days. Batch: 4 processes × 512 images = 2048 a step, 626 steps an epoch, 30 + 300 epochs; the
#   learning rates belong to that batch. Fewer GPUs, more images: NPROC_PER_NODE=2 … -- --batch-size 1024
# Expected (paper's counter): MACs 0.32 G => 0.15 G, params 3.50 M => not known. No figures come with the published
#   script; recipes and steps are ours (finetuning: scripts/finetuning/mobilenet_v2_0.15G.sh's).
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
model=(--model mobilenet_v2 --is-torchvision) builder=() processes=4
data=(--data-path data/imagenet --val-resize-size 256 --interpolation bilinear)
out=output/depgraph/mobilenet_v2 cut=0.15G budget=0.15G steps=100
training=(--opt sgd --momentum 0.9 --weight-decay 2e-5 --batch-size 512 --amp)
dense=()
sparse=(--sparsify group --sparsify-reg 5e-4 --lr 0.01 --epochs 30 --lr-scheduler multisteplr --lr-milestones 20 25)
finetuning=(--lr 0.036 --epochs 300 --lr-scheduler cosineannealinglr)
source scripts/depgraph/chain.sh "$@"
