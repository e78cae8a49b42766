#!/usr/bin/env bash
# Masks 35% of Swin-Base's attention and MLP weights with DIMAP, without data, then finetunes for 30 epochs (DIMAP2).
# Hardware: pruning: a CPU, 1 minute; finetuning: 8 GPUs. Batch: 8 processes × 128 images = 1024 a step, 1252 steps an
#   epoch (ours, none is published). With fewer GPUs raise the second factor: NPROC_PER_NODE=4 … -- --batch-size 256
# Expected, as published (non-zero): top-1 83.43 (dense: 83.48), params 87.8 M => 58.4 M, MACs 15.4 G => 10.2 G.
#   The published MACs are those of layers that all lose 35%. Ours are counted layer by layer, and are more, because
#   early layers, small with many MACs, are spared (random weights of Swin-Tiny, DIMAP3: 2.95 G).
# Flags that you append go to both commands, those after a lone -- to finetune.py alone: to go on after an interruption,
#   append -- --resume auto
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
source scripts/dimap/swin.sh base 35 "$@"
