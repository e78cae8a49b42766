#!/usr/bin/env python3
"""Writes a model as ONNX, as torch.export's .pt2, or as a folder for the Hugging Face hub, and checks what it wrote.

    python tools/export.py output/pruned/deit_4.2G.safetensors deit_4.2G.onnx --latency
    python tools/export.py convnext_tiny.fb_in1k convnext_tiny.pt2
    python tools/export.py output/pruned/deit_4.2G.safetensors output/hub/deit_4.2G/ --push-to-hub USER/deit_4.2G

What is written is read back, run on batches of 1 and 3 random images, and compared with the original: the largest
difference is printed, and one above 1e-4 of an output's largest value (2e-2 with --half) is an error, which leaves
nothing behind. ONNX needs `pip install -r requirements-export.txt`.
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.export import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
