#!/usr/bin/env python3
"""Trains a pruned model back to its accuracy, from a teacher or without; dense models train alike.

    torchrun --nproc_per_node=8 finetune.py --model output/pruned/deit_4.2G.safetensors \
        --teacher-model regnety_160.deit_in1k --epochs 300 --batch-size 256 --opt adamw --lr 5e-4 --wd 0.05 \
        --lr-scheduler cosineannealinglr --label-smoothing 0.1 --mixup-alpha 0.8 --cutmix-alpha 1.0 \
        --auto-augment ra --random-erase 0.25 --ra-sampler --amp --output-dir output/finetuned/deit_4.2G

fills the output folder (best.safetensors, last.safetensors, state.pt, metrics.csv, run.json) and ends with

    MACs: 4.1626 G, Params: 20.6943 M (paper counter; exact MACs: …)
    Accuracy: 0.8241, Loss: 0.8036

One process or many, CPU or GPU take the same path; `--batch-size` is per process. SIGTERM stops a run and SIGUSR1 does
not, but both write its training state first; `--resume auto` goes on with an interrupted run. Optimizer, schedule and
augmentation flags are spelled, and default, as in torchvision's reference trainer.
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.train import train
    from isomorphic.commands.train_flags import parse_finetune_args

    train(parse_finetune_args(), adjust_ema=True)


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
