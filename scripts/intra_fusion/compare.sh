#!/usr/bin/env bash
# compare.sh MODEL TOOL_FLAGS…: what the scripts beside it share. Trains examples/cifar_models.py:MODEL once, where
# output/intra_fusion/ does not have it, and compares Intra-Fusion with plain pruning on it.
# CIFAR10=DIR takes CIFAR-10 from DIR, which holds cifar-10-batches-py/ (nothing is downloaded), and the published width;
# otherwise it is the handwritten digits that ship with the project, and a quarter of the width.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/setup.sh

model="$1"
shift
user_words "$@"
if [ -n "${CIFAR10:-}" ]; then
  case "$CIFAR10" in /*) ;; *) CIFAR10="$ISOMORPHIC_USER_FOLDER/$CIFAR10" ;; esac
  out="output/intra_fusion/${model}_cifar10"
  data=(--dataset torch/cifar10 --data-path "$CIFAR10")
  training=(--model-kwargs width=64 --opt sgd --lr 0.05 --weight-decay 5e-4 --batch-size 128 --epochs 200
    --lr-warmup-epochs 5 --scale 0.5 1)
else
  out="output/intra_fusion/${model}_digits"
  data=(--dataset digits --workers 0)
  training=(--model-kwargs width=16 --opt adamw --lr 4e-3 --weight-decay 0.05 --batch-size 64 --epochs 8
    --lr-warmup-epochs 1 --scale 0.6 1 --hflip 0)
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
fi
dense="$out/best.safetensors"

# An interrupted training goes on where it was; a finished one returns at once.
"$PYTHON" finetune.py --model "examples/cifar_models.py:$model" --no-pretrained --input-size 32 --val-resize-size 32 \
  "${data[@]}" "${training[@]}" --lr-scheduler cosineannealinglr --lr-warmup-method linear --output-dir "$out" \
  --resume auto
"$PYTHON" -m studies.intra_fusion --model "$dense" --builder-file examples/cifar_models.py "${data[@]}" \
  --results-file "$out/intra_fusion.csv" "$@"
