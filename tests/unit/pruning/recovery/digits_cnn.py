"""A small CNN with batch norms, trained on the handwritten digits in seconds, for what only real weights can show."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.data.sources import Digits


class DigitsCnn(nn.Sequential):
    """Three convolutions with batch norms and one linear classifier: images (B, 1, 8, 8) → logits (B, 10)."""

    def __init__(self) -> None:
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if outputs == 32 else []
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def digits(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, (N, 1, 8, 8) in 0 … 1, and their labels."""
    source = Digits(split, transform=lambda image: torch.zeros(0))  # type: ignore[arg-type]
    pixels = torch.from_numpy(source.pixels)
    return pixels[:, None].float() / 255, torch.as_tensor(source.labels).long()


def trained_cnn(seed: int, epochs: int = 12) -> nn.Module:
    """A dense model in eval mode: Adam, the one-cycle schedule, batches of 64."""
    torch.manual_seed(seed)
    images, labels = digits("train")
    model = DigitsCnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module) -> float:
    """In percent, on the 360 validation images."""
    images, labels = digits("val")
    return 100 * (model(images).argmax(1) == labels).float().mean().item()
