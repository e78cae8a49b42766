"""Principal directions of what layers read, weighed by what they ask, and what trials of a rotation need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the outputs' spread, that a random mixture may change
SMALLEST = 1e-8  # eigenvalue, as a share of the largest, that counts: a direction that no reader reads has none


def principal_directions(asked: Tensor, seen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The m directions z = A x with which x̂ = B z loses the least of E (x − x̂)ᵀ L² (x − x̂).

    L S L = U Λ Uᵀ, A = U_mᵀ L, B = L⁻¹ U_m, with U_m the m leading eigenvectors.

    Args:
        asked: L² (n, n), such as Wᵀ W of what reads x.
        seen: S = E[x xᵀ] (n, n).
        count: m.

    Returns:
        A (m, n) and B (n, m).
    """
    sharp, blunt = root_of(asked), inverse_root_of(asked)
    _, components = torch.linalg.eigh(sharp @ seen @ sharp)
    leading = components[:, -count:]  # the largest come last
    return leading.T @ sharp, blunt @ leading


def as_large(forth: Tensor, back: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """A and B, scaled so that every direction has the mean square that a channel of `moment` (n, n) has on average."""
    size = (forth @ moment * forth).sum(1)
    size = size.clamp_min(SMALLEST * float(size.max()) or 1.0).sqrt()
    scale = (moment.trace() / len(moment)).sqrt() / size
    return scale[:, None] * forth, back / scale


def root_of(moment: Tensor) -> Tensor:
    """M^½ of positive semidefinite matrices (…, n, n), whose smallest eigenvalues are lifted to what counts."""
    values, vectors = _positive(moment)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def inverse_root_of(moment: Tensor) -> Tensor:
    """M^-½ of the same."""
    values, vectors = _positive(moment)
    return (vectors / values.sqrt()[..., None, :]) @ vectors.mT


def _positive(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    least = SMALLEST * values[..., -1:]
    return torch.maximum(values, torch.where(least > 0, least, torch.ones_like(least))), vectors


def random_turn(count: int, *, keeps_ones: bool) -> Tensor:
    """A random orthogonal matrix (n, n), float64, the same for the same n; one that maps ones to ones, if asked for."""
    generator = torch.Generator().manual_seed(0)
    if not keeps_ones:
        return torch.linalg.qr(torch.randn(count, count, generator=generator).double())[0]
    turn, _ = torch.linalg.qr(torch.randn(count - 1, count - 1, generator=generator).double())
    basis = zero_sum_basis(count)
    return basis @ turn @ basis.T + 1 / count


def zero_sum_basis(count: int) -> Tensor:
    """An orthonormal basis (m, m − 1), float64, of the vectors of m numbers that sum to nought.

    Of 3: (1, −1, 0)/√2 and (1, 1, −2)/√6.
    """
    columns = []
    for size in range(1, count):
        column = torch.zeros(count, dtype=torch.float64)
        column[:size], column[size] = 1.0, -float(size)
        columns.append(column / (size * (size + 1)) ** 0.5)
    return torch.stack(columns, dim=1)


def are_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a trial has left a model's outputs what they were, but for rounding."""
    alike = [a.shape == b.shape and _distance(a, b) < TOLERANCE for a, b in zip(found, expected, strict=True)]
    return bool(alike) and all(alike)


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the expected values' spread."""
    if not expected.numel():
        return 0.0
    spread = float((expected - expected.mean()).abs().max()) or float(expected.abs().max()) or 1.0
    return float((found - expected).abs().max()) / spread


def put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Gives tensors these values again, in place."""
    for tensor, own in zip(tensors, values, strict=True):
        tensor.copy_(own)
