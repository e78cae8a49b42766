"""Flags that the tests of commands share."""

from __future__ import annotations

import argparse

from isomorphic.commands import flags

VIT = ["--model", "deit_tiny_patch16_224", "--no-pretrained"]
SMALL = ["--model-kwargs", "embed_dim=24", "depth=1", "num_heads=3"]
DIGITS = ["--dataset", "digits"]


def parser() -> argparse.ArgumentParser:
    made = flags.make_parser("A command of the tests.")
    flags.add_model_arguments(made)
    flags.add_data_arguments(made, batch_size=64)
    made.add_argument("--amp", action="store_true")
    return made


def parse(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)
