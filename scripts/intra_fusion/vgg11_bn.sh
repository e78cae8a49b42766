#!/usr/bin/env bash
# Intra-Fusion beside plain pruning on VGG11-BN: ℓ1 and Taylor, one of 8 groups at a time, without finetuning.
# Hardware: 2 CPU cores, no GPU; some minutes on the handwritten digits. CIFAR10=DIR takes CIFAR-10: 1 GPU.
# Expected on digits, about (dense 99.2; ℓ1, mean of the groups, plain => source):
#   30%: 86.6 => 98.1, 50%: 49.9 => 91.0, 70%: 27.4 => 76.0.
# Published for CIFAR-10 (ℓ1, mean of the groups): 30%: 86.2 => 86.7, 50%: 76.3 => 80.3, 70%: 51.9 => 73.5.
# Flags that you append go to the comparison (`--groups 1 2 3 --sparsities 0.5`); rows land in intra_fusion.csv.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

bash scripts/intra_fusion/compare.sh vgg11_bn \
  --groups 0 1 2 3 4 5 6 7 --sparsities 0.3 0.4 0.5 0.6 0.7 --criteria l1 taylor --taylor-batches 5 \
  --normalizations source mass \
  "$@"
