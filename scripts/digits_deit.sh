#!/usr/bin/env bash
# Makes pretrained/digits_deit.safetensors, the dense DeiT of the quickstart: trains a small ConvNeXt on the
# handwritten digits, then a small distilled DeiT with that as its teacher (hard distillation).
# Hardware: 2 CPU cores, no GPU; about 6 minutes. More threads do not speed up models this small.
# Expected: ConvNeXt 2.42 M MACs, top-1 0.986 to 0.989; DeiT 15.7 M MACs, 0.21 M params, top-1 0.983 to 0.989.
# Flags that you append go to the DeiT's training; a second call needs --resume auto or --overwrite there. The ConvNeXt is
# trained once, and goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

out=output/digits_deit
training=(--no-pretrained --dataset digits --input-size 32 --val-resize-size 32 --hflip 0 --scale 0.6 1 --workers 0
  --batch-size 64 --opt adamw --weight-decay 0.05 --lr-scheduler cosineannealinglr --lr-warmup-method linear
  --label-smoothing 0.1)

"$PYTHON" finetune.py --model convnext_atto "${training[@]}" --output-dir "$out/teacher" \
  --model-kwargs "depths=[1,1,3,1]" "dims=[24,48,96,192]" patch_size=2 --lr 4e-3 --epochs 20 --lr-warmup-epochs 2 \
  --resume auto
"$PYTHON" finetune.py --model deit_tiny_distilled_patch16_224 "${training[@]}" --output-dir "$out/deit" \
  --model-kwargs patch_size=4 embed_dim=64 depth=4 num_heads=4 --lr 2e-3 --epochs 60 --lr-warmup-epochs 5 \
  --teacher-model "$out/teacher/best.safetensors" \
  "$@"
cp "$out/deit/best.safetensors" pretrained/digits_deit.safetensors
