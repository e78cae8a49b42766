"""VGG11 with batch norms and ResNet-18 in their usual form for images of 32×32 pixels, as a user's own models.

    python finetune.py --no-pretrained --model examples/cifar_models.py:vgg11_bn --input-size 32 …

A 3×3 stem without pooling, one linear classifier; inputs (B, 3, 32, 32), logits (B, num_classes). A checkpoint of one
is opened with --builder-file examples/cifar_models.py. With `width` channels in the first layer, 64 as published:
VGG11-BN has 9.2 M params and 153 M MACs, ResNet-18 11.2 M and 556 M.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

VGG11 = (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool")  # in widths of the first layer


class Vgg(nn.Module):
    """Convolutions with batch norms, halved five times; whatever is left is averaged."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        channels = 3
        for entry in VGG11:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
            else:
                outputs = entry * width
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of two blocks each; the last three halve the image."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = (width, 2 * width, 4 * width, 8 * width)
        blocks: list[nn.Module] = []
        for inputs, outputs in zip((width, *widths), widths, strict=False):
            stride = 1 if outputs == width else 2
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        return self.classifier(self.blocks(x).mean((2, 3)))


def vgg11_bn(num_classes: int = 10, width: int = 64) -> nn.Module:
    """Eight convolutions: eight groups."""
    return Vgg(num_classes, width)


def resnet18(num_classes: int = 10, width: int = 64) -> nn.Module:
    """Eight blocks: eight groups inside them, and one for each of the four stages."""
    return ResNet(num_classes, width)
