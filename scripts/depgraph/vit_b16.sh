#!/usr/bin/env bash
# DepGraph's chain on ImageNet-1K's pretrained ViT-B/16: group sparse training, pruning to 60% of the MACs, finetuning.
# Hardware: 8 GPUs, days. Batch: 8 processes × 128 images = 1024 a step, 1252 steps an epoch, 30 + 300 epochs; the
#   learning rates belong to that batch. Fewer GPUs, more images: NPROC_PER_NODE=4 … -- --batch-size 256
# Expected (paper's counter): MACs 17.59 G => 10.56 G, params 86.57 M => not known. No figures come with the published
#   script; recipes and steps are ours. The sparse phase is SGD: AdamW would divide the penalty's gradient by its size.
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
model=(--model vit_base_patch16_224.augreg_in1k) builder=() processes=8
data=(--data-path data/imagenet --val-resize-size 248 --interpolation bicubic --no-imagenet-mean-std)
out=output/depgraph/vit_b16 cut=60% budget=60% steps=100
training=(--batch-size 128 --lr-scheduler cosineannealinglr --auto-augment ra --clip-grad-norm 1 --amp)
dense=()
sparse=(--sparsify group --sparsify-reg 5e-4 --opt sgd --lr 0.01 --weight-decay 1e-4 --epochs 30)
finetuning=(--opt adamw --lr 5e-4 --weight-decay 0.05 --epochs 300 --lr-warmup-epochs 5 --lr-warmup-method linear
  --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 --random-erase 0.25 --model-ema)
source scripts/depgraph/chain.sh "$@"
