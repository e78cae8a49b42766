#!/usr/bin/env python3
"""Prunes a vision model: (remove blocks) → group → classify → score → rank → cut, and recover → save.

    python prune.py --model deit_base_distilled_patch16_224.fb_in1k --pruning-ratio 0.5 \
        --head-pruning-ratio 0.5 --head-dim-pruning-ratio 0.25 --taylor-batches 50 --batch-size 64 \
        --data-path data/imagenet --save-as output/pruned/deit_4.2G.safetensors

prints the isomorphism classes with their scores, then

    MACs: 17.69 G => 4.17 G (paper counter; exact: …)
    Params: 87.34 M => 20.72 M
    Saving the pruned model to output/pruned/deit_4.2G.safetensors
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.prune import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
