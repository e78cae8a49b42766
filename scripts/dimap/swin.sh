#!/usr/bin/env bash
# What the scripts beside this one have in common; they source it in the repository's root, after scripts/setup.sh:
#
#   source scripts/dimap/swin.sh SIZE PERCENT [FLAG …] [-- FLAG …]
#
# Masks PERCENT of the attention and MLP weights of Swin-SIZE with DIMAP, without data, once: where the masked model is
# there already, it is taken as it is (remove the file to prune anew). Then finetunes what is left, by the paper's
# recipe: AdamW, 30 epochs, 15 of them warm-up, cosine from 2e-5 to 2e-7, weight decay 1e-8; pruned weights stay zero.
# The paper names neither batch nor augmentation: 1024 images a step and Swin's own augmentation are ours.
# Flags go to both commands; those after a lone -- to finetune.py alone.
set -euo pipefail
size=$1 percent=$2
shift 2
both=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do both+=("$1") && shift; done
[ $# -eq 0 ] || shift

pruned=output/pruned/dimap_swin_${size}_${percent}.safetensors
data=(--data-path data/imagenet --val-resize-size 256 --interpolation bicubic)

user_words ${both[@]+"${both[@]}"}
[ -f "$pruned" ] || "$PYTHON" prune.py \
  --model "swin_${size}_patch4_window7_224.ms_in1k" "${data[@]}" \
  --pruning-type dimap --unstructured --pruning-ratio "0.$percent" \
  --save-as "$pruned" \
  ${both[@]+"${both[@]}"}

user_words ${both[@]+"${both[@]}"} "$@"
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${NPROC_PER_NODE:-8}" finetune.py \
  --model "$pruned" "${data[@]}" \
  --epochs 30 --batch-size 128 --opt adamw --lr 2e-5 --weight-decay 1e-8 --lr-scheduler cosineannealinglr \
  --lr-min 2e-7 --lr-warmup-epochs 15 --lr-warmup-method linear --lr-warmup-decay 0.01 \
  --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 --auto-augment rand-m9-mstd0.5-inc1 \
  --random-erase 0.25 --random-erase-mode pixel --amp \
  --output-dir "output/finetuned/dimap_swin_${size}_${percent}" \
  ${both[@]+"${both[@]}"} "$@"
