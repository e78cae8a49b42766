#!/usr/bin/env python3
"""Converts a `.pth` file with a pruned model, or weights alone, into a checkpoint of this project, which runs no code.

    python tools/convert.py deit_0.6G_isomorphic.pth output/pruned/deit_0.6G.safetensors
    python tools/convert.py tiny.pth tiny.safetensors --name swin_tiny_patch4_window7_224 --model-kwargs img_size=56

    python tools/convert.py weights.safetensors resnet18.safetensors --name resnet18

The second form is for files that do not tell, or tell wrongly, how the dense model was built, the third for weights of
other trainers (docs/weights.md). What is written is loaded again, and must answer as the original does.
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.convert import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
