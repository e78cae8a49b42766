"""CNNs in their usual form for images of 32×32 pixels, as a user's own models: a 3×3 stem of stride 1, one linear head.

    python finetune.py --no-pretrained --model examples/cifar_models.py:vgg11_bn --input-size 32 …

Inputs (B, 3, 32, 32), logits (B, num_classes). A checkpoint of one is opened with --builder-file
examples/cifar_models.py. With 10 classes and the widths as they stand, MACs by the paper's counter:

    vgg11_bn       9.2 M params   153 M MACs
    vgg19_bn      20.0 M          513 M
    resnet18      11.2 M          557 M
    resnet56      0.86 M          127 M
    densenet121    7.0 M          899 M
    mobilenet_v2   2.2 M           93 M

`resnet56` and, with 100 classes, `vgg19_bn` cost what DepGraph's (CVPR 2023) runs print. Their counter charges modules
and no functions, so the last activation of a block is a function in these two, and the others are modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG11 = (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool")  # in widths of the first layer
VGG19 = ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4))  # width in those of the first layer, and number of convolutions
# Expansion of the channels inside a block, channels that it leaves, number of blocks, stride of the first one.
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


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


class VggBlock(nn.Sequential):
    """Convolutions with batch norms at one width and one resolution."""

    def __init__(self, inputs: int, outputs: int, convolutions: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, *[outputs] * (convolutions - 1)):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Vgg19(nn.Module):
    """Five blocks; the first three halve the image behind them, so that the last two work on 4×4."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        channels = 3
        for number, (factor, convolutions) in enumerate(VGG19):
            layers.append(VggBlock(channels, factor * width, convolutions))
            if number < 3:
                layers.append(nn.MaxPool2d(2))
            channels = factor * width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).flatten(1))


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


class CountedBlock(BasicBlock):
    """The same block with a module for its inner activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ThinResNet(nn.Module):
    """Three stages of equally many blocks; the last two halve the image (He et al. 2016, section 4.2)."""

    def __init__(self, num_classes: int, width: int, blocks_per_stage: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for outputs in (width, 2 * width, 4 * width):
            blocks.append(CountedBlock(inputs, outputs, 1 if outputs == width else 2))
            blocks += [CountedBlock(outputs, outputs, 1) for _ in range(blocks_per_stage - 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).flatten(1))


class DenseLayer(nn.Module):
    """Two convolutions behind their norms, whose outputs are concatenated to what they read."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], 1)


class Transition(nn.Sequential):
    """Half of the channels, and half of the image."""

    def __init__(self, inputs: int) -> None:
        convolution = nn.Conv2d(inputs, inputs // 2, 1, bias=False)
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), convolution, nn.AvgPool2d(2))


class DenseNet(nn.Module):
    """Blocks of dense layers, each of which adds `growth` channels, with transitions between the blocks."""

    def __init__(self, num_classes: int, growth: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.num_classes = num_classes
        channels = 2 * growth
        features: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for number, count in enumerate(layers):
            if number:
                features.append(Transition(channels))
                channels //= 2
            features += [DenseLayer(channels + growth * layer, growth) for layer in range(count)]
            channels += growth * count
        self.features = nn.Sequential(*features, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class InvertedResidual(nn.Module):
    """A depthwise convolution over `expansion` times as many channels, beside the identity where the shape allows."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = expansion * inputs
        depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        layers: list[nn.Module] = [depthwise, nn.BatchNorm2d(inner), nn.ReLU6()]
        if expansion > 1:
            layers = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(), *layers]
        self.layers = nn.Sequential(*layers, nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


class MobileNetV2(nn.Module):
    """Seven stages of inverted residuals, three of which halve the image; the stem and the second stage do not."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        channels = 32
        for expansion, outputs, blocks, stride in MOBILENET_V2:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if block == 0 else 1, expansion))
                channels = outputs
        layers += [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def vgg11_bn(num_classes: int = 10, width: int = 64) -> nn.Module:
    """Eight convolutions: eight groups."""
    return Vgg(num_classes, width)


def vgg19_bn(num_classes: int = 10, width: int = 64) -> nn.Module:
    """Sixteen convolutions: sixteen groups."""
    return Vgg19(num_classes, width)


def resnet18(num_classes: int = 10, width: int = 64) -> nn.Module:
    """Eight blocks: eight groups inside them, and one for each of the four stages."""
    return ResNet(num_classes, width)


def resnet56(num_classes: int = 10, width: int = 16) -> nn.Module:
    """27 blocks: 27 groups inside them, and one for each of the three stages."""
    return ThinResNet(num_classes, width, blocks_per_stage=9)


def densenet121(num_classes: int = 10, growth: int = 32) -> nn.Module:
    """58 dense layers in blocks of 6, 12, 24 and 16."""
    return DenseNet(num_classes, growth, (6, 12, 24, 16))


def mobilenet_v2(num_classes: int = 10) -> nn.Module:
    """17 inverted residuals."""
    return MobileNetV2(num_classes)
