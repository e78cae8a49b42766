#!/usr/bin/env python3
"""Measures a model by name or a checkpoint: MACs, params, top-1, top-5 and loss on the validation images.

    python evaluate.py --model output/pruned/deit_4.2G.safetensors --data-path data/imagenet

prints

    MACs: 4.1626 G, Params: 20.6943 M (paper counter; exact MACs: …)
    Accuracy: 0.8241, Loss: 0.8036

Under torchrun every process evaluates its share, and each image counts exactly once. Images that cannot be read are
named and fail the run once all others were tried, unless --skip-unreadable leaves them out.
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.evaluate import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
