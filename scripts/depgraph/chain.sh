#!/usr/bin/env bash
# DepGraph's chain (CVPR 2023), which the scripts beside this one have in common: dense training, sparse training,
# pruning in steps, finetuning, evaluation. They source it in the repository's root, after scripts/setup.sh:
#
#   source scripts/depgraph/chain.sh [FLAG …] [-- FLAG …]
#
# and set these before:
#
#   model, builder     flags that open the dense model, and its checkpoints
#   data               flags of the images
#   training           flags of all trainings, and of each:
#   dense              (empty where the dense model is pretrained)
#   sparse, finetuning
#   processes          that train together; one if it is not set
#   out, cut           folder of the dense and the sparse model, and the one inside of it for this cut
#   budget, steps      MACs that are left, and in how many steps; STEPS=40 in the environment goes before
#
# Flags go to every command, those after a lone -- to the trainings alone. The same command again goes on where an
# interrupted one was: trainings by --resume auto, and what was pruned stays while it is newer than the sparse model.
set -euo pipefail
common=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do common+=("$1") && shift; done
[ $# -eq 0 ] || shift
trainings=("$@")

finetune=("$PYTHON" finetune.py)
if [ -n "${processes:-}" ]; then
  torchrun=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-$processes}")
  finetune=("${torchrun[@]}" finetune.py)
fi

# train FOLDER FLAG …
train() {
  local folder="$1"
  shift
  user_words ${common[@]+"${common[@]}"} ${trainings[@]+"${trainings[@]}"}
  "${finetune[@]}" "$@" "${data[@]}" "${training[@]}" --output-dir "$folder" --resume auto \
    ${common[@]+"${common[@]}"} ${trainings[@]+"${trainings[@]}"}
}

if [ ${#dense[@]} -gt 0 ]; then
  echo "== dense training"
  train "$out/dense" "${model[@]}" "${dense[@]}"
  model=(--model "$out/dense/best.safetensors" ${builder[@]+"${builder[@]}"})
fi

echo "== sparse training"
train "$out/sparse" "${model[@]}" "${sparse[@]}"

# The last model, not the best one: units go on shrinking to the end.
sparse_model="$out/sparse/last.safetensors"
pruned="$out/$cut/pruned.safetensors"
if [ "$pruned" -nt "$sparse_model" ]; then
  echo "== pruning: $pruned is there already (remove it to prune anew)"
else
  echo "== pruning to $budget MACs in ${STEPS:-$steps} steps"
  user_words ${common[@]+"${common[@]}"}
  "$PYTHON" prune.py --model "$sparse_model" ${builder[@]+"${builder[@]}"} "${data[@]}" --pruning-type group_norm \
    --normalizer top --ranking global --target-macs "$budget" --steps "${STEPS:-$steps}" --test-accuracy \
    --save-as "$pruned" ${common[@]+"${common[@]}"}
fi

echo "== finetuning"
train "$out/$cut/finetuned" --model "$pruned" ${builder[@]+"${builder[@]}"} "${finetuning[@]}"

echo "== evaluation"
user_words ${common[@]+"${common[@]}"}
"$PYTHON" evaluate.py --model "$out/$cut/finetuned/best.safetensors" ${builder[@]+"${builder[@]}"} "${data[@]}" \
  ${common[@]+"${common[@]}"}
