#!/usr/bin/env python3
"""Prunes a detector of torchvision: FCOS on a small ResNet with a feature pyramid, which finds coloured rectangles.

    .venv/bin/python examples/detection.py

Half a minute on two cores. It ends with what the model costs and finds (in percent of the rectangles), about so:

                params        MACs       found
     dense      1.63 M     87.47 M       94.95
    pruned      0.85 M     43.73 M       78.79
 finetuned      0.85 M     43.73 M      100.00
  reloaded      0.85 M     43.73 M      100.00
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou

import isomorphic as iso
from isomorphic.measure.complexity import count_complexity, format_macs, format_params

parser = argparse.ArgumentParser(description="Prunes a detector of torchvision.")
parser.add_argument("--steps", type=int, default=80, help="batches of the training, and again of the finetuning")
parser.add_argument("--output", default="output/examples/detection.safetensors", help="file of the pruned model")
args = parser.parse_args()
torch.manual_seed(0)

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]  # what a detector takes in training: images and targets


def make_batch(size: int = 8) -> Batch:
    """Images (3, 64, 64) of noise with a red (class 1), a green (2) or a blue (3) rectangle in each half or in one."""
    images, targets = 0.5 * torch.rand(size, 3, 64, 64), []
    for image in images:
        labels = torch.randint(1, 4, (int(torch.randint(1, 3, ())),))  # one or two
        corners = torch.stack([torch.randint(0, 32, labels.shape), 2 + 32 * torch.arange(len(labels))], dim=1)
        boxes = torch.cat([corners, corners + torch.randint(12, 30, corners.shape)], dim=1)
        for label, (left, top, right, bottom) in zip(labels.tolist(), boxes.tolist(), strict=True):
            image[label - 1, top:bottom, left:right] += 0.5
        targets.append({"boxes": boxes.float(), "labels": labels})
    return list(images), targets


def build() -> nn.Module:
    trunk = ResNet(BasicBlock, [1, 1, 1, 1])
    backbone = BackboneWithFPN(trunk, {"layer2": "0", "layer3": "1"}, [128, 256], out_channels=64)
    anchors = AnchorGenerator(sizes=((4,), (8,), (16,)), aspect_ratios=((1.0,),) * 3)
    return FCOS(backbone, num_classes=4, anchor_generator=anchors, min_size=64, max_size=64)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of what a detector returns in training: losses by name."""
    return sum(model.train()(*batch).values(), torch.zeros(()))


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, make_batch()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def show(stage: str, model: nn.Module) -> None:
    """Prints the share of the rectangles that are found: of n in an image, by the n surest boxes, colour included."""
    found = []
    for guess, target in zip(model.eval()(validation[0]), validation[1], strict=True):
        surest = {name: value[: len(target["boxes"])] for name, value in guess.items()}
        right = (box_iou(target["boxes"], surest["boxes"]) > 0.5) & (target["labels"][:, None] == surest["labels"])
        found.append(right.any(dim=1))
    cost = count_complexity(model, inputs)
    score = 100 * torch.cat(found).float().mean().item()
    print(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{score:>12.2f}")


validation = make_batch(64)
inputs = (validation[0][:1],)  # a detector takes one argument, a list of images: here of one
model = build()
train(model, args.steps)
pruned = iso.prune(model, inputs, macs="50%", data=[make_batch() for _ in range(4)], loss=loss, self_check=True)
print(pruned)
print(f"{'':>10}{'params':>12}{'MACs':>12}{'found':>12}")
show("dense", model)
model = pruned.model
show("pruned", model)
train(model, args.steps)
show("finetuned", model)
pruned.save(args.output)
show("reloaded", iso.load_model(args.output, model=build()))
