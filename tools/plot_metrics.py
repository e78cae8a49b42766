#!/usr/bin/env python3
"""Draws the curves of training runs into one picture: loss, accuracy and learning rate over the epochs.

    python tools/plot_metrics.py output/finetuned/deit_4.2G output/finetuned/deit_2.6G --out curves.png

A run is the output folder of finetune.py or convnext_train.py, finished or not, or its metrics.csv. Printed is one line
a run, accuracies in percent:

         run  epochs  best top-1  at epoch  last train loss  images/s
    deit_4.2G     300       82.41       297           2.6814      9120

What is not finite is a gap in its curve. Dotted is the accuracy of the trained weights themselves, where the run keeps
an average of them (EMA).
"""

from __future__ import annotations

from isomorphic import progress


def main() -> None:
    from isomorphic.commands.plot_metrics import main

    main()


if __name__ == "__main__":
    with progress.telling("loading"):
        from isomorphic.commands import entry

        entry.run(main)
