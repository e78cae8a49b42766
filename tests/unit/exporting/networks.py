"""Small models that captures meet: outputs of all kinds, and forward code that cannot be captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass
class Boxes:
    scores: Tensor
    count: int
    corners: list[Tensor]


class Pair(NamedTuple):
    mean: Tensor
    spread: Tensor


class Net(nn.Module):
    """One linear layer of four, and something around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)


class Alone(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class InDict(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {"logits": y, "again": y, "input": x, "nothing": None, "number": 3, "ones": torch.ones(2)}


class InObjects(Net):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Boxes, Pair]:
        y = self.layer(x) * scale
        return Boxes(y, 2, [y + 1, y + 2]), Pair(y.mean(1), y.std(1))


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


class ToNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.layer(x).detach().numpy())


class Looped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(row) for row in x])


class Viewed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(2, -1)


class Measured(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), 2, 2)


class Odd(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if len(x) % 2 else x


class Singular(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(self.layer(x).unsqueeze(1)).S


class ChangesItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.add_(1))


class Squeezed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).squeeze()


class Anchored(Net):
    """Remembers a table for the last shape, as detectors remember their anchors."""

    shape: Any = None
    anchors: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.anchors, self.shape = torch.arange(4.0) + torch.zeros_like(x), x.shape
        return self.layer(x) + self.anchors


class OfList(Net):
    """Takes a list of images (3, 4, 4), as a detector does."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"scores": self.layer(image.mean(0))} for image in images]
