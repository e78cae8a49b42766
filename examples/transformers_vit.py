#!/usr/bin/env python3
"""Prunes a vision transformer of transformers: half of its heads, and half of the width of its MLPs.

    .venv/bin/python -m pip install -r requirements-examples.txt
    .venv/bin/python examples/transformers_vit.py

Three quarters of a minute. It ends with what the model costs and gets right (top-1 in percent), about so:

                params        MACs    accuracy
     dense      0.14 M      2.42 M       96.39
    pruned     69.96 K      1.22 M       79.17
 finetuned     69.96 K      1.22 M       96.67
  reloaded     69.96 K      1.22 M       96.67
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity, format_macs, format_params

try:
    from transformers import ViTConfig, ViTForImageClassification  # pyright: ignore[reportMissingImports]
except ImportError:
    raise SystemExit("transformers is missing: python -m pip install -r requirements-examples.txt") from None

parser = argparse.ArgumentParser(description="Prunes a vision transformer of transformers.")
parser.add_argument("--epochs", type=int, default=20, help="of the training, and again of the finetuning")
parser.add_argument("--output", default="output/examples/transformers_vit.safetensors", help="file of the pruned model")
args = parser.parse_args()
torch.manual_seed(0)

# The data: 8×8 digits that come with the repository, 1,437 to train on and 360 to validate on.
digits = np.load(Path(__file__).resolve().parents[1] / "data/digits.npz")
images = torch.from_numpy(digits["images"]).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.from_numpy(digits["labels"]).long()


def batches(size: int = 64) -> list[dict[str, Tensor]]:
    """The training images once, in a random order, each batch as the model takes it."""
    chosen = torch.randperm(1437).split(size)
    return [{"pixel_values": images[part], "labels": labels[part]} for part in chosen]


def build() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A model of transformers computes its loss where the batch holds labels."""
    return model(**batch).loss


def train(model: nn.Module, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * len(batches()))
    model.train()
    for batch in (batch for _ in range(epochs) for batch in batches()):
        optimizer.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def show(stage: str, model: nn.Module) -> None:
    """Prints params, MACs of one image, and top-1 in percent on images that training has not seen."""
    cost = count_complexity(model, inputs)
    guesses = model.eval()(pixel_values=images[1437:]).logits.argmax(dim=1)
    top1 = 100 * (guesses == labels[1437:]).float().mean().item()
    print(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{top1:>12.2f}")


inputs = {"pixel_values": images[:1]}  # the model takes its inputs by keyword

model = build()
train(model, args.epochs)

# ratio=0.0: nothing else goes. Which heads go is decided over all layers, so that some lose more than others.
pruned = iso.prune(model, inputs, ratio=0.0, head_ratio=0.5, ratios={"*.fc1": 0.5}, data=batches(), loss=loss)
print(pruned)
print(f"{'':>10}{'params':>12}{'MACs':>12}{'accuracy':>12}")
show("dense", model)
model = pruned.model
show("pruned", model)
train(model, args.epochs)
show("finetuned", model)

# save_pretrained would not do: the model's config goes on naming the dense widths.
pruned.save(args.output)
show("reloaded", iso.load_model(args.output, model=build()))
