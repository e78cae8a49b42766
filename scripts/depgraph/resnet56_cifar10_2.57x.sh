#!/usr/bin/env bash
# DepGraph's chain on ResNet-56: dense training, group sparse training, pruning to 1/2.57 of the MACs, finetuning.
# Hardware: 1 GPU, hours, for CIFAR-10, which CIFAR10=DIR names: 128 images a step, 391 steps an epoch, 400 epochs.
#   Without it: handwritten digits at half of the width, 22 epochs of 23 steps; 2 CPU cores, no GPU, minutes.
# Published (paper's counter): MACs 127.12 M => 48.69 M, params 0.86 M => 0.29 M; top-1 93.53 dense, 93.56 after the
#   sparse phase, 79.60 just pruned, 93.57 finetuned (table: 93.64 at 2.57 times; without a sparse phase 93.36).
# Found on digits: 97.8 and 98.9 (two processors), 97.8 and 98.6, 42.5 and 95.3, 99.2 and 97.8.
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption. resnet56_cifar10_2.11x.sh shares the dense and the sparse model.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
network=resnet56 dataset=cifar10 digits_width=8
cut=2.57x budget=38.91%
source scripts/depgraph/cifar.sh
source scripts/depgraph/chain.sh "$@"
