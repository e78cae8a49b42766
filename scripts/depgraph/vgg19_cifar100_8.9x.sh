#!/usr/bin/env bash
# DepGraph's chain on VGG-19-BN: dense training, group sparse training, pruning to 1/8.9 of the MACs, finetuning.
# Hardware: 1 GPU, hours, for CIFAR-100, which CIFAR100=DIR names: 128 images a step, 391 steps an epoch, 400 epochs.
#   Without it: handwritten digits at a quarter of the width, 22 epochs of 23 steps; 2 CPU cores, no GPU, minutes.
# Published (paper's counter): MACs 512.73 M => 57.16 M, params 20.09 M => 1.18 M; top-1 73.50 dense, 72.71 after the
#   sparse phase, 2.40 just pruned, 70.60 finetuned (table: 70.39 at 8.92 times; without a sparse phase 67.60).
# Expected on digits, about: 98.6, 98.9, 10.0, 97.2.
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
network=vgg19_bn dataset=cifar100 digits_width=16
cut=8.9x budget=11.23%
source scripts/depgraph/cifar.sh
source scripts/depgraph/chain.sh "$@"
