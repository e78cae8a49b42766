"""What an export reports, and the bound that it has to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from isomorphic.errors import UserError
from isomorphic.exporting.answers import Difference


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the original. It prints as a person would want to read it.

    Attributes:
        path: the file or folder.
        batch_sizes: of the batches that it was compared on; none for a model that only its user can build.
        difference: the largest one found: max |exported − original| / max |original| of one output to one batch.
        bound: the largest that passes.
        any_batch: it takes batches of any size; else only of the size that it was compared on.
        opset: of an ONNX file.
        seconds: median time of a call by runtime, at the first batch size, where it was asked for.
    """

    path: Path
    batch_sizes: tuple[int, ...]
    difference: Difference
    bound: float
    any_batch: bool = True
    opset: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batch_sizes))
        about = [f"{_bytes(self.path) / 1e6:.2f} MB"]
        if self.opset:
            about.append(f"opset {self.opset}")
        if self.batch_sizes:
            about.append("any batch size" if self.any_batch else f"batches of {sizes} only")
        lines = [f"{self.path}: {', '.join(about)}"]
        if self.batch_sizes:
            lines.append(f"Largest difference: {share(self.difference, self.bound)} (batch {sizes})")
        if self.seconds:
            times = ", ".join(f"{runtime} {1e3 * seconds:.2f} ms" for runtime, seconds in self.seconds.items())
            lines.append(f"Latency: {times} (batch {self.batch_sizes[0]}; CPU, {torch.get_num_threads()} threads)")
        return "\n".join(lines)


def share(difference: Difference, bound: float) -> str:
    """Returns `3.1e-07 of the output's largest value, at most 1e-04`."""
    return f"{difference.value:.1e} of the output's largest value, at most {bound:.0e}"


def check_bound(path: Path, found: Difference, bound: float) -> None:
    """Raises a UserError for a difference that is too large."""
    if not found.value <= bound:
        raise UserError(
            f"{path} is not kept: {found.output} of a batch of {found.batch_size} differs from the original's by "
            f"{share(found, bound)}"
        )


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files)
