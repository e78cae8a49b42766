#!/usr/bin/env bash
# The main job on a bare machine: prune a small ConvNeXt and a small distilled DeiT to 50% and 25% of their MACs,
# finetune each with its dense model as the teacher, reload and evaluate it. Handwritten digits (1,797 real images)
# show the machinery at work, not ImageNet accuracy.
# Hardware: a CPU; 2 to 4 minutes on 4 cores. Everything lands in output/quickstart/, made anew by each run.
# The commands are those that an ImageNet user runs; only the data, the models and the epochs are smaller.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

# Two models side by side, on at most two threads each: more gain little on models this small, and more threads
# than cores wait for each other.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores < 4 ? 1 : 2))}"
out=output/quickstart
data=(--dataset digits --workers 0)
training=(--opt adamw --weight-decay 0.05 --lr-scheduler cosineannealinglr --lr-warmup-method linear
  --label-smoothing 0.1 --hflip 0 --scale 0.6 1)

# prune_both MODEL DENSE_CHECKPOINT FINETUNING_FLAGS…
prune_both() {
  local model="$1" dense="$2" budget folder
  shift 2
  "$PYTHON" evaluate.py --model "$dense" "${data[@]}" --results-file "$out/$model/dense.json"
  for budget in 50 25; do
    folder="$out/$model/$budget"
    echo "== prune to $budget% of the MACs, finetune, reload"
    "$PYTHON" prune.py --model "$dense" "${data[@]}" --taylor-batches 10 --target-macs "$budget%" --test-accuracy \
      --save-as "$folder/pruned.safetensors" --plan-file "$folder/plan.json" --report "$folder/scores.png" \
      --results-file "$folder/pruned.json"
    "$PYTHON" finetune.py --model "$folder/pruned.safetensors" --teacher-model "$dense" "${data[@]}" \
      "${training[@]}" --lr-warmup-epochs 1 "$@" --output-dir "$folder/finetuned"
    "$PYTHON" evaluate.py --model "$folder/finetuned/best.safetensors" "${data[@]}" \
      --results-file "$folder/reloaded.json"
  done
}

convnext() {
  echo "== train the dense model"
  "$PYTHON" finetune.py --no-pretrained --model convnext_atto --input-size 32 --val-resize-size 32 \
    --model-kwargs "depths=[1,1,3,1]" "dims=[24,48,96,192]" patch_size=2 "${data[@]}" "${training[@]}" \
    --batch-size 64 --lr 4e-3 --epochs 20 --lr-warmup-epochs 2 --output-dir "$out/convnext/dense"
  prune_both convnext "$out/convnext/dense/best.safetensors" --batch-size 64 --lr 2e-3 --epochs 8
}

# The dense DeiT takes minutes to train and ships with the repository: bash scripts/digits_deit.sh made it.
deit() {
  prune_both deit pretrained/digits_deit.safetensors --batch-size 32 --lr 2e-3 --epochs 10
}

echo "Handwritten digits: this shows the machinery at work, not ImageNet accuracy."
rm -rf "$out"
set -m # each model is a process group of its own, so that a failing run takes the other one down with it
trap 'kill -- $(jobs -p | sed "s/^/-/") 2>/dev/null || true' EXIT
(convnext 2>&1 | sed -u 's/^/convnext | /') &
first=$!
(deit 2>&1 | sed -u 's/^/deit     | /') &
second=$!
wait "$first"
wait "$second"
"$PYTHON" tools/quickstart_report.py --folder "$out"
