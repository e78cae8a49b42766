#!/usr/bin/env bash
# What the CIFAR scripts beside this one have in common. They source it after scripts/setup.sh and before chain.sh, with
# `network` set, the model of examples/cifar_models.py, `dataset`, cifar10 or cifar100, and `digits_width`, that of its
# first layer on the digits.
#
# CIFAR10=DIR or CIFAR100=DIR takes the images from DIR, which holds cifar-10-batches-py/ or cifar-100-python/
# (nothing is downloaded), and the published recipe: SGD, 128 images a step, weight decay 5e-4; 200 epochs from 0.1
# with drops at 120, 150 and 180, then twice 100 epochs from 0.01 with drops at 60 and 80; 400 steps of pruning.
# Otherwise it is the handwritten digits that ship with the project, for a few epochs. So few steps shrink little by
# 5e-4: there it is 2e-2.
set -euo pipefail
case "$dataset" in
  cifar10) images="${CIFAR10:-}" ;;
  cifar100) images="${CIFAR100:-}" ;;
esac
builder=(--builder-file examples/cifar_models.py)
model=(--model "examples/cifar_models.py:$network" --no-pretrained --input-size 32 --val-resize-size 32)
training=(--opt sgd --momentum 0.9 --weight-decay 5e-4 --lr-scheduler multisteplr)
if [ -n "$images" ]; then
  case "$images" in /*) ;; *) images="$ISOMORPHIC_USER_FOLDER/$images" ;; esac
  out="output/depgraph/${network}_$dataset"
  data=(--dataset "torch/$dataset" --data-path "$images")
  training+=(--batch-size 128 --crop-padding 4)
  dense=(--lr 0.1 --epochs 200 --lr-milestones 120 150 180)
  sparse=(--sparsify group --sparsify-reg 5e-4 --lr 0.01 --epochs 100 --lr-milestones 60 80)
  finetuning=(--lr 0.01 --epochs 100 --lr-milestones 60 80)
  steps=400
else
  out="output/depgraph/${network}_digits"
  data=(--dataset digits --workers 0)
  training+=(--batch-size 64 --crop-padding 2 --hflip 0)
  dense=(--model-kwargs "width=$digits_width" --lr 0.1 --epochs 10 --lr-milestones 6 8)
  sparse=(--sparsify group --sparsify-reg 2e-2 --lr 0.01 --epochs 6 --lr-milestones 4 5)
  finetuning=(--lr 0.01 --epochs 6 --lr-milestones 4 5)
  steps=20
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
fi
