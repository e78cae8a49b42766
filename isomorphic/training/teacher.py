"""The model that a student learns from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from isomorphic.checkpoint import is_checkpoint, open_model
from isomorphic.data import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import check_input_size, num_classes


class Teacher(nn.Module):
    """A frozen classifier that takes the student's images: what they are normalised by is made the teacher's."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, own: Preprocessing, student: Preprocessing) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.same_colours = (own.mean, own.std) == (student.mean, student.std)
        own_mean, own_std, mean, std = (torch.tensor(v) for v in (own.mean, own.std, student.mean, student.std))
        # (x · std + mean − own mean) / own std, as one multiplication and addition per channel
        self.register_buffer("scale", (std / own_std)[:, None, None])
        self.register_buffer("shift", ((mean - own_mean) / own_std)[:, None, None])

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode whatever is asked: a teacher's answers do not depend on the batch."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) for images (N, 3, H, W) as the student gets them."""
        return self.model(images if self.same_colours else images * self.scale + self.shift)


def open_teacher(
    source: str,
    student: Preprocessing,
    student_classes: int,
    *,
    input_size: int,
    pretrained: bool = True,
    builder_file: str | Path | None = None,
    trust: bool = False,
) -> Teacher:
    """Opens a teacher by timm name, `path/to/file.py:factory` or checkpoint, for images of `input_size` pixels.

    `builder_file` is the code behind a checkpoint of a user's own model; `trust` lets a `.pth` file run its code.
    Without `pretrained`, a teacher given by name gets random weights and the student's classes: good for dry runs.

    Raises:
        UserError: as `open_model`; or the teacher's classes or input are not the student's.
    """
    fresh = not pretrained and not is_checkpoint(source)
    classes = student_classes if fresh else None
    model, spec = open_model(source, pretrained=pretrained, num_classes=classes, builder_file=builder_file, trust=trust)
    teacher_classes = num_classes(model, spec)
    if teacher_classes != student_classes:
        raise UserError(
            f"teacher {source} has {teacher_classes} classes but the student has {student_classes}: "
            "choose a teacher of the same data"
        )
    check_input_size(model, input_size, f"teacher {source}")
    return Teacher(model, spec.preprocessing, student)
