"""The teacher of distillation: a frozen model whose logits a student learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import is_checkpoint, open_model
from isomorphic.data.classes import first_difference
from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from isomorphic.models import check_input_size, num_classes

# The forward methods of layers that only pass their weights to one operation, which autocast runs in low precision.
# Layers that compute with their weights first, such as weight-standardised convolutions, have their own.
STOCK_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class Teacher(nn.Module):
    """A frozen classifier that takes the student's images and converts them to its own normalisation.

    It computes in `dtype`, independently of the student: under autocast, with the weights of convolutions and linear
    layers stored in `dtype`, so that they are not cast at every step. Norms, statistics and logits are fp32. None means
    fp32 throughout.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        own: Preprocessing,
        student: Preprocessing,
        *,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        if dtype:
            store_in(dtype, self.model)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.same_colours = (own.mean, own.std) == (student.mean, student.std)
        own_mean, own_std, mean, std = (torch.tensor(v) for v in (own.mean, own.std, student.mean, student.std))
        # (x · std + mean − own mean) / own std, as one multiplication and addition per channel
        self.register_buffer("scale", (std / own_std)[:, None, None])
        self.register_buffer("shift", ((mean - own_mean) / own_std)[:, None, None])
        self._stream: torch.cuda.Stream | None = None

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever `mode` is: a teacher's logits must not depend on the batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, C) in fp32 for images (N, 3, H, W) as the student gets them."""
        images = images if self.same_colours else images * self.scale + self.shift
        images = images.to(memory_format=self.memory_format)
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(images).float()

    def ask(self, images: Tensor) -> Callable[[], Tensor]:
        """Starts computing the logits of `images`, and returns a function that waits for them and returns them.

        On CUDA, the teacher runs in its own stream beside the student's; the host waits for neither.
        """
        if images.device.type != "cuda":
            logits = self(images)
            return lambda: logits
        device = images.device
        stream = self._stream = self._stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # the stream that prepares the images
        with torch.cuda.stream(stream):
            logits = self(images)
        images.record_stream(stream)  # their memory is not used again before the teacher has read it
        done = stream.record_event()

        def answer() -> Tensor:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            logits.record_stream(current)
            return logits

        return answer


def store_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Casts, in place, the weights of convolutions and linear layers as autocast would at every step."""
    for module in model.modules():
        if type(module).forward in STOCK_FORWARDS:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def open_teacher(
    source: str,
    student: Preprocessing,
    student_classes: int,
    *,
    input_size: int,
    pretrained: bool = True,
    weights: str | Path | None = None,
    builder_file: str | Path | None = None,
    trust: bool = False,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    class_names: Sequence[str] = (),
    tell: Callable[[str], object] = lambda line: None,
) -> Teacher:
    """Returns the teacher `source` for images of `input_size` pixels.

    `source` is a timm name, `path/to/file.py:factory` or a checkpoint; `builder_file` is the code of a checkpoint of a
    user's own model. `weights` is a file that fills what `source` names. With `trust`, a `.pth` file may run its code.
    Without `pretrained` and `weights`, a teacher given by name gets random weights and the student's classes, for dry
    runs. It computes in `dtype` (None: fp32), with `channels_last` in that memory format. `class_names` are those of
    the student's classes, where they are known and count. `tell` is called with each line about weights that were not
    simply taken as they are.

    Raises:
        UserError: as `open_model`; or the teacher does not have the student's classes, or does not take its images.
    """
    fresh = not pretrained and not weights and not is_checkpoint(source)
    model, spec = open_model(
        source,
        pretrained=pretrained,
        weights=weights,
        num_classes=student_classes if fresh else None,
        fresh_head=False,
        builder_file=builder_file,
        trust=trust,
        tell=tell,
    )
    teacher_classes = num_classes(model, spec)
    if teacher_classes != student_classes:
        raise UserError(
            f"teacher {source} has {teacher_classes} classes but the student has {student_classes}: "
            "choose a teacher of the same data"
        )
    difference = first_difference(class_names, spec.class_names, "of the student", "of the teacher")
    if class_names and spec.class_names and difference:
        raise UserError(
            f"teacher {source} was made for other classes: {difference}; choose a teacher of the same data, or "
            "--ignore-class-names to go by their order alone"
        )
    check_input_size(model, input_size, f"teacher {source}")
    return Teacher(model, spec.preprocessing, student, dtype=dtype, channels_last=channels_last)
