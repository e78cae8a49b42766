#!/usr/bin/env bash
# Intra-Fusion beside plain pruning on ResNet-18: ℓ1 and Taylor, one of 12 groups at a time, without finetuning.
# Hardware: 2 CPU cores, no GPU; some minutes on the handwritten digits. CIFAR10=DIR takes CIFAR-10: 1 GPU.
# Expected on digits, about (dense 99.2; ℓ1, mean of the groups, plain => source):
#   30%: 75.6 => 97.9, 50%: 61.3 => 85.9, 70%: 40.8 => 68.6.
# Published for CIFAR-10 (ℓ1, mean of 11 groups): 30%: 92.3 => 94.2, 50%: 86.8 => 91.0, 70%: 75.2 => 83.8.
# Flags that you append go to the comparison (`--groups 1 2 3 --sparsities 0.5`); rows land in intra_fusion.csv.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

bash scripts/intra_fusion/compare.sh resnet18 \
  --groups 0 1 2 3 4 5 6 7 8 9 10 11 --sparsities 0.3 0.4 0.5 0.6 0.7 --criteria l1 taylor --taylor-batches 5 \
  --normalizations source mass \
  "$@"
