#!/usr/bin/env python3
"""Prunes a segmentation network of torchvision with a Dice loss: FCN on a small ResNet, on discs and squares.

    .venv/bin/python examples/segmentation.py

Half a minute on two cores. It ends with what the model costs and gets right (mean IoU in percent), about so:

                params        MACs        mIoU
     dense      0.35 M     46.00 M       80.86
    pruned      0.17 M     22.97 M       62.13
 finetuned      0.17 M     22.97 M       85.18
  reloaded      0.17 M     22.97 M       85.18
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity, format_macs, format_params

parser = argparse.ArgumentParser(description="Prunes a segmentation network of torchvision with a Dice loss.")
parser.add_argument("--steps", type=int, default=80, help="batches of the training, and again of the finetuning")
parser.add_argument("--output", default="output/examples/segmentation.safetensors", help="file of the pruned model")
args = parser.parse_args()
torch.manual_seed(0)


def make_batch(size: int = 16) -> dict[str, Tensor]:
    """Images (N, 3, 64, 64) of noise with a disc and a square; masks (N, 64, 64): 0 nothing, 1 disc, 2 square."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    centre, radius = torch.randint(16, 48, (4, size, 1, 1)), torch.randint(8, 16, (2, size, 1, 1))
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius[0] ** 2
    square = torch.maximum((x - centre[2]).abs(), (y - centre[3]).abs()) < radius[1]
    mask = torch.where(square, 2, torch.where(disc, 1, 0))
    image = 0.5 * torch.rand(size, 3, 64, 64) + 0.5 * (mask > 0).unsqueeze(1)
    return {"image": image, "mask": mask}


def build() -> nn.Module:
    backbone = IntermediateLayerGetter(ResNet(BasicBlock, [1, 1, 1, 1]), {"layer2": "out"})
    return FCN(backbone, FCNHead(128, 3))


def dice_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """1 − the mean Dice coefficient of the classes."""
    guess = model(batch["image"])["out"].softmax(dim=1)  # (N, 3, 64, 64)
    truth = F.one_hot(batch["mask"], 3).movedim(-1, 1)
    overlap, total = ((guess * truth).sum(dim=(0, 2, 3)), (guess + truth).sum(dim=(0, 2, 3)))
    return 1 - (2 * overlap / total).mean()


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        dice_loss(model, make_batch()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def show(stage: str, model: nn.Module) -> None:
    """Prints the mean intersection over union of the classes, in percent."""
    cost = count_complexity(model, inputs)
    guess = F.one_hot(model.eval()(validation["image"])["out"].argmax(dim=1), 3).bool()  # (N, 64, 64, 3)
    truth = F.one_hot(validation["mask"], 3).bool()
    iou = (guess & truth).sum(dim=(0, 1, 2)) / (guess | truth).sum(dim=(0, 1, 2))
    score = 100 * iou.mean().item()
    print(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{score:>12.2f}")


validation = make_batch(64)
inputs = validation["image"][:1]

model = build()
train(model, args.steps)

pruned = iso.prune(model, inputs, macs="50%", data=[make_batch() for _ in range(4)], loss=dice_loss, self_check=True)
print(pruned)
print(f"{'':>10}{'params':>12}{'MACs':>12}{'mIoU':>12}")
show("dense", model)
model = pruned.model
show("pruned", model)
train(model, args.steps)
show("finetuned", model)

pruned.save(args.output)
show("reloaded", iso.load_model(args.output, model=build()))
