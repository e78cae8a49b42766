#!/usr/bin/env python3
"""Prunes a classifier inside its training: four small cuts, between which the same optimizer and schedule go on.

    .venv/bin/python examples/training_loop.py

A quarter of a minute on two cores. It prints what the model costs and gets right (top-1 in percent), about so:

                params        MACs    accuracy
     dense     56.71 K      1.82 M       98.33
      cut1     48.54 K      1.59 M       97.50
      cut2     40.41 K      1.37 M       90.56
      cut3     33.31 K      1.13 M       92.22
    pruned     26.04 K      0.91 M       97.50
 finetuned     26.04 K      0.91 M       99.17
  reloaded     26.04 K      0.91 M       99.17
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity, format_macs, format_params

parser = argparse.ArgumentParser(description="Prunes a classifier inside its training.")
parser.add_argument("--epochs", type=int, default=4, help="before the first cut, and after the last (one between two)")
parser.add_argument("--output", default="output/examples/training_loop.safetensors", help="file of the pruned model")
args = parser.parse_args()
torch.manual_seed(0)

# The data: 8×8 digits that come with the repository, 1,437 to train on and 360 to validate on.
digits = np.load(Path(__file__).resolve().parents[1] / "data/digits.npz")
images = torch.from_numpy(digits["images"]).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.from_numpy(digits["labels"]).long()
loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True)


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def build() -> nn.Module:
    features = (conv(1, 32), conv(32, 64), nn.MaxPool2d(2), conv(64, 64))
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@torch.no_grad()
def show(stage: str, model: nn.Module) -> None:
    cost = count_complexity(model, images[:1])
    top1 = 100 * (model.eval()(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
    print(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{top1:>12.2f}")


def train_one_epoch(model: nn.Module) -> None:
    model.train()
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        schedule.step()


def between(model: nn.Module, step: int) -> None:
    """Is called after each cut but the last; the optimizer goes on with the cut parameters."""
    show(f"cut{step}", model)
    train_one_epoch(model)


# Train the dense model.
model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=0.01, total_steps=(2 * args.epochs + 3) * len(loader), pct_start=0.1
)
for _ in range(args.epochs):
    train_one_epoch(model)

print(f"{'':>10}{'params':>12}{'MACs':>12}{'accuracy':>12}")
show("dense", model)

# Go to half of the MACs in four cuts. The model is cut in place, and so are the momenta of its optimizer.
pruned = iso.prune(
    model, images[:1], macs="50%", data=loader, steps=4, between=between, inplace=True, optimizer=optimizer
)
show("pruned", model)

# Go on as if nothing had happened.
for _ in range(args.epochs):
    train_one_epoch(model)
show("finetuned", model)

pruned.save(args.output)
show("reloaded", iso.load_model(args.output, model=build()))
