#!/usr/bin/env python3
"""Prunes a dynamic graph CNN that tells shapes by their points.

    python examples/dgcnn_points.py --pruning-ratio 0.5

Clouds of points are sampled from spheres, cubes, cylinders, cones, tori and pyramids, stretched, turned and jittered.

An edge convolution finds each point's nearest neighbours among the features as they are in that layer, so which points
are gathered depends on the data; the channels that are gathered do not. The outputs of all edge convolutions are
concatenated: the layer behind them reads the channels of four groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import workflow
from torch import Tensor, nn

from isomorphic.commands import entry

NUM_POINTS = 64
SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "pyramid")


def neighbours(x: Tensor, k: int) -> Tensor:
    """(B, C, N) -> (B, C, N, k): the features of the k points that are nearest to each, itself among them."""
    batch, channels, points = x.shape
    inner = x.transpose(1, 2) @ x  # (B, N, N)
    squares = x.square().sum(dim=1)  # (B, N)
    distances = squares.unsqueeze(2) - 2 * inner + squares.unsqueeze(1)
    nearest = distances.topk(k, largest=False).indices  # (B, N, k)
    index = nearest.view(batch, 1, points * k).expand(-1, channels, -1)
    return x.gather(2, index).view(batch, channels, points, k)


class EdgeConv(nn.Module):
    """Convolution over the edges to the k nearest neighbours (Wang et al., ACM TOG 2019)."""

    def __init__(self, in_channels: int, out_channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.conv = nn.Conv2d(2 * in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, N) -> (B, out_channels, N)."""
        near = neighbours(x, self.k)
        centre = x.unsqueeze(-1).expand_as(near)
        edges = torch.cat([near - centre, centre], dim=1)  # (B, 2 · in_channels, N, k)
        strongest = self.norm(self.conv(edges)).max(dim=-1).values  # of the k edges
        return F.leaky_relu(strongest, 0.2)


class DGCNN(nn.Module):
    """Edge convolutions, their outputs side by side, pooling over the points, a small classifier."""

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 32, 64),
        fused: int = 128,
        hidden: int = 64,
        num_classes: int = len(SHAPES),
        *,
        k: int = 6,
    ) -> None:
        super().__init__()
        self.edges = nn.ModuleList(EdgeConv(*ends, k) for ends in zip((3, *widths), widths, strict=False))
        self.fuse = nn.Sequential(
            nn.Conv1d(sum(widths), fused, 1, bias=False), nn.BatchNorm1d(fused), nn.LeakyReLU(0.2)
        )
        self.hidden = nn.Sequential(nn.Linear(2 * fused, hidden), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, N) points -> (B, classes) logits."""
        scales = []
        for edge in self.edges:
            x = edge(x)
            scales.append(x)
        x = self.fuse(torch.cat(scales, dim=1))  # (B, fused, N)
        x = torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)
        return self.head(self.hidden(x))


def sample_shape(shape: str, count: int, generator: torch.Generator) -> Tensor:
    """Points (count, NUM_POINTS, 3) on surfaces of about unit size."""
    u, v, w = torch.rand(3, count, NUM_POINTS, generator=generator)
    angle, turn = 2 * math.pi * u, 2 * math.pi * v
    if shape == "torus":
        ring = 0.75 + 0.3 * turn.cos()
        return torch.stack([ring * angle.cos(), ring * angle.sin(), 0.3 * turn.sin()], dim=-1)
    if shape == "cube":
        points = 2 * torch.stack([u, v, w], dim=-1) - 1
        side = torch.randint(3, (count, NUM_POINTS, 1), generator=generator)
        return 0.8 * points.scatter(-1, side, points.gather(-1, side).sign())
    height = 2 * v - 1
    radius = {"sphere": (1 - height**2).sqrt(), "cylinder": torch.full_like(u, 0.7)}.get(shape, v.sqrt())
    if shape in ("cone", "pyramid"):
        height = 1 - 2 * radius
    if shape == "pyramid":  # a square instead of a circle
        radius = radius / torch.maximum(angle.cos().abs(), angle.sin().abs())
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)


def make_clouds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count, 3, NUM_POINTS) and shapes by number (count,)."""
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    clouds = torch.empty(count, NUM_POINTS, 3)
    for number, shape in enumerate(SHAPES):
        chosen = labels == number
        clouds[chosen] = sample_shape(shape, int(chosen.sum()), generator)
    clouds *= 0.8 + 0.4 * torch.rand(count, 1, 3, generator=generator)
    turns = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator)).Q
    clouds = clouds @ turns + 0.03 * torch.randn(clouds.shape, generator=generator)
    return clouds.transpose(1, 2).contiguous(), labels


def main() -> None:
    args = workflow.parse_args(__doc__, epochs=8, sparsify_reg=5e-3)
    generator = torch.Generator().manual_seed(args.seed)
    training, validation = make_clouds(1000, generator), make_clouds(500, generator)
    model = DGCNN()
    report = workflow.Report(training[0][:1], validation)

    workflow.train(model, training, epochs=args.epochs, lr=5e-3)
    report.measure("dense", model)
    if args.sparsify != "none":
        workflow.sparsify(model, training, args)
        report.measure("sparse", model)
    widths = workflow.prune(model, training, args.pruning_ratio, args.pruning_type)
    report.measure("pruned", model)
    workflow.train(model, training, epochs=args.epochs, lr=5e-3)
    report.measure("finetuned", model)
    report.show(widths)


if __name__ == "__main__":
    entry.run(main)
