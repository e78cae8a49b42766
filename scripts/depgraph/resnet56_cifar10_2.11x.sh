#!/usr/bin/env bash
# DepGraph's chain on ResNet-56: dense training, group sparse training, pruning to 1/2.11 of the MACs, finetuning.
# Hardware: 1 GPU, hours, for CIFAR-10, which CIFAR10=DIR names: 128 images a step, 391 steps an epoch, 400 epochs.
#   Without it: handwritten digits at half of the width, 22 epochs of 23 steps; 2 CPU cores, no GPU, minutes.
# Published (paper's counter): MACs 127.12 M => 59.88 M, params 0.86 M => 0.43 M; top-1 93.53 dense, 93.24 after the
#   sparse phase, 88.85 just pruned, 93.89 finetuned (table: 93.77 at 2.13 times; without a sparse phase 93.46).
# Found on digits: 97.8 and 98.9 (two processors), 97.8 and 98.6, 61.4 and 96.7, 98.3 twice.
# Flags that you append go to every command, those after a lone -- to the trainings alone. The same command again goes
#   on after an interruption. resnet56_cifar10_2.57x.sh shares the dense and the sparse model.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh
network=resnet56 dataset=cifar10 digits_width=8
cut=2.11x budget=47.39%
source scripts/depgraph/cifar.sh
source scripts/depgraph/chain.sh "$@"
