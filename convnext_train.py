#!/usr/bin/env python3
"""Trains a pruned ConvNeXt back to its accuracy by ConvNeXt's own recipe, without a teacher.

    torchrun --nproc_per_node=8 convnext_train.py --model output/pruned/convnext_4.2G.safetensors \
        --epochs 300 --batch-size 256 --lr 2e-3 --drop-path 0.1 --train-interpolation random \
        --amp --model-ema --output-dir output/finetuned/convnext_4.2G

fills the output folder and ends as finetune.py does; the accuracy is that of the moving average of the weights, which
is what `best.safetensors` holds. The defaults are the recipe's: AdamW without weight decay on biases, norms and layer
scales, a cosine down to 1e-6, RandAugment, random erasing with noise, mixup or cutmix, label smoothing 0.1.
`--drop` and `--drop-path` take effect on a model that was pruned with other rates. Besides finetune.py's spellings of
flags, timm's are taken: `--sched cosine`, `--aa`, `--reprob`, `--grad-accum-steps`, …
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.train import train
    from isomorphic.commands.train_flags import parse_convnext_args

    train(parse_convnext_args())


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
