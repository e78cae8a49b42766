"""Least squares against numpy's: ridge, textbook, choice of the ridge, and data that leave something undetermined."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from isomorphic.pruning.recovery import least_squares
from isomorphic.pruning.recovery.least_squares import (
    RIDGES,
    choose_ridge,
    damped,
    draw_positions,
    fit_weights,
    mean_of,
    moments,
)

Array = NDArray[np.float64]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(images: int, positions: int, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Correlated x (images, positions, 9) with means, and an x̃ (…, 5) that is another mixture of the same."""
    hidden = random(images, positions, 6, seed=seed) + 0.5 * random(images, 1, 6, seed=seed + 1)
    dense = hidden @ random(6, 9, seed=seed + 2) + noise * random(images, positions, 9, seed=seed + 3)
    pruned = hidden @ random(6, 5, seed=seed + 4) + noise * random(images, positions, 5, seed=seed + 5)
    return dense + random(9, seed=seed + 6), pruned + random(5, seed=seed + 7)


def rows(samples: Tensor) -> Array:
    """All samples (images · positions, channels), centred."""
    flat = samples.flatten(0, 1).numpy()
    return flat - flat.mean(0)


def ridge_by_lstsq(y: Array, own: Array, prior: Array, ridge: float) -> Array:
    """Least squares on stacked equations: own W'ᵀ ≈ y and √λ W'ᵀ ≈ √λ W₀ᵀ."""
    if ridge == math.inf:
        return prior
    width = own.shape[1]
    damping = math.sqrt(ridge * (own**2).sum() / width) * np.eye(width)
    left, right = np.vstack([own, damping]), np.vstack([y, damping @ prior.T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


def squares(target: Tensor, own: Tensor, solution: Tensor) -> float:
    """Σ |y − W' x̃|², both centred: what is left once the bias has made up for the means."""
    return float((rows(target) - rows(own) @ solution.numpy().T).__pow__(2).sum())


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 0.1])
def test_the_weights_are_those_of_a_ridge_regression(ridge: float):
    dense, own = activations(30, 7)
    target, prior = dense @ random(9, 4, seed=20), random(4, 5, seed=21)
    found = fit_weights(prior, target, own, [ridge]).weights
    assert found.dtype == torch.float64
    expected = ridge_by_lstsq(rows(target), rows(own), prior.numpy(), ridge)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_a_kept_part_gives_the_textbooks_prediction_of_the_removed_one():
    dense, _ = activations(40, 5)
    kept, removed = [0, 2, 5, 7], [1, 3, 4, 6, 8]
    weight = random(3, 9, seed=20)
    found = fit_weights(weight[:, kept], dense @ weight.T, dense[..., kept], [1e-3]).weights
    covariance = np.cov(rows(dense).T, bias=True)
    own = covariance[np.ix_(kept, kept)]
    damping = 1e-3 * np.diag(own).mean() * np.eye(len(kept))
    w = weight.numpy()
    expected = w[:, kept] + w[:, removed] @ covariance[np.ix_(removed, kept)] @ np.linalg.inv(own + damping)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("images", [1, 2, 5, 8])
def test_moments_are_those_of_the_first_images_and_of_the_others(images: int):
    target, own = activations(images, 3)
    halves = moments(target, own)
    y, x = rows(target), rows(own)  # of all images: both halves lack one mean
    border = 3 * ((images + 1) // 2)
    for half, part in zip(halves, (slice(0, border), slice(border, None)), strict=True):
        np.testing.assert_allclose(half.own.numpy(), x[part].T @ x[part], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(half.cross.numpy(), y[part].T @ x[part], rtol=1e-10, atol=1e-10)


def test_means_far_from_zero_cost_no_digits():
    dense, own = activations(30, 7)
    target, prior = dense @ random(9, 4, seed=20), random(4, 5, seed=21)
    expected = fit_weights(prior, target, own, [1e-6]).weights
    found = fit_weights(prior, (target + 300).float(), (own + 300).float(), [1e-6]).weights
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def held_out_by_hand(target: Array, own: Array, prior: Array, ridge: float) -> float:
    """Both halves, each fitted on the other, by the residuals themselves."""
    middle, total = (len(target) + 1) // 2, 0.0
    first, second = slice(0, middle), slice(middle, None)
    for fit, test in ((first, second), (second, first)):
        found = ridge_by_lstsq(target[fit], own[fit], prior, ridge)
        residual = target[test] - own[test] @ found.T
        total += float((residual**2).sum() - (target[test] ** 2).sum())
    return total


NOISES = [(200, 0.0), (24, 0.5), (8, 2.0), (3, 4.0), (9, 8.0)]


def noisy(images: int, noise: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """y, x̃ and W₀ with a single position an image, and the λ that does best on the other half."""
    dense, own = activations(images, 1, seed=images, noise=noise)
    target, prior = dense @ random(9, 4, seed=20), random(4, 5, seed=21) / 4
    candidates = [math.inf, *RIDGES]
    errors = [held_out_by_hand(rows(target), rows(own), prior.numpy(), ridge) for ridge in candidates]
    return target, own, prior, candidates[int(np.argmin(errors))]


@pytest.mark.parametrize(("images", "noise"), NOISES)
def test_the_ridge_is_the_one_that_does_best_on_the_other_half(images: int, noise: float):
    target, own, prior, best = noisy(images, noise)
    found = fit_weights(prior, target, own, RIDGES).weights
    expected = ridge_by_lstsq(rows(target), rows(own), prior.numpy(), best)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("images", "noise"), NOISES)
def test_of_very_many_outputs_mixtures_choose_a_ridge_as_good_as_the_best(images: int, noise: float):
    dense, own = activations(images, 1, seed=images, noise=noise)
    target, prior = dense @ random(9, 300, seed=20), random(300, 5, seed=21) / 4
    found = fit_weights(prior, target, own, RIDGES).weights.numpy()
    y, x, candidates = rows(target), rows(own), (math.inf, *RIDGES)
    distances = [np.abs(found - ridge_by_lstsq(y, x, prior.numpy(), ridge)).max() for ridge in candidates]
    assert min(distances) < 1e-6
    errors = [held_out_by_hand(y, x, prior.numpy(), ridge) for ridge in candidates]
    assert errors[int(np.argmin(distances))] - min(errors) <= 0.02 * (y**2).sum()


def test_what_is_left_of_mixtures_is_the_same_on_the_average():
    dense, own = activations(30, 7)
    half, _ = moments(dense @ random(9, 300, seed=20), own)
    mixed, change = half.mixed(64), 0.1 * random(300, 5, seed=22)
    assert mixed.cross.shape == (64, 5)
    energy = (half.cross.square().sum(), mixed.cross.square().sum())
    assert energy[1].item() == pytest.approx(energy[0].item(), rel=0.2)
    residual = rows(dense @ random(9, 300, seed=20))[:105] - rows(own)[:105] @ change.numpy().T
    assert half.left_by(change).item() == pytest.approx((residual**2).sum(), rel=1e-10)


@pytest.mark.parametrize("ridges", [(), [1e-3], RIDGES])
def test_the_errors_are_the_mean_squares_that_are_left(ridges: list[float]):
    dense, own = activations(30, 7)
    target, prior = dense @ random(9, 4, seed=20), random(4, 5, seed=21)
    fit = fit_weights(prior, target, own, ridges)
    assert fit.before == pytest.approx(squares(target, own, prior) / 210, rel=1e-10)
    assert fit.after == pytest.approx(squares(target, own, fit.weights) / 210, rel=1e-10)
    assert torch.equal(fit.weights, prior) if not ridges else fit.after < 0.5 * fit.before


def test_what_all_channels_share_falsifies_no_error():
    """Prior weights that sum to zero cancel a component a thousand times as large as what they pick out."""
    shared = 1000 * random(40, 30, 1).float()
    own = shared + random(40, 30, 6, seed=1).float()
    prior = random(4, 6, seed=2).float()
    prior -= prior.mean(1, keepdim=True)
    target = (own.double() @ prior.double().T + 0.1 * random(40, 30, 4, seed=3)).float()
    fit = fit_weights(prior, target, own, RIDGES)
    assert fit.before == pytest.approx(squares(target.double(), own.double(), prior.double()) / 1200, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_very_many_samples_are_counted_in_any_precision(dtype: torch.dtype):
    samples = torch.ones(40, 2000, 3, dtype=dtype)
    assert torch.equal(mean_of([samples]), torch.ones(3, dtype=torch.float64))
    assert fit_weights(torch.zeros(3, 3), 0 * samples, samples, RIDGES).before == 0


def test_the_cases_above_take_different_ridges():
    assert len({noisy(*case)[-1] for case in NOISES}) >= 3


def test_a_tie_leaves_plain_selection():
    assert choose_ridge((0, 0), lambda fit, ridge: torch.zeros(1), lambda test, solution: 1.0, RIDGES) == math.inf


def low_rank(images: int, positions: int) -> Tensor:
    return random(images, positions, 2) @ random(2, 8, seed=1)


def with_zeros(images: int, positions: int) -> Tensor:
    x = random(images, positions, 8)
    x[..., [0, 3, 6]] = 0
    return x


def constant(images: int, positions: int) -> Tensor:
    return torch.full((images, positions, 8), 0.1, dtype=torch.float64)


@pytest.mark.parametrize("make", [low_rank, with_zeros, constant, lambda *size: random(*size, 8)])
@pytest.mark.parametrize(("images", "positions"), [(50, 4), (10, 1), (1, 1), (1, 30), (2, 1), (3, 500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_is_undetermined_nothing_explodes_or_gets_worse(
    make: Callable[..., Tensor], images: int, positions: int, dtype: torch.dtype
):
    dense = make(images, positions).to(dtype)
    weight = random(3, 8, seed=5).to(dtype)
    kept = [0, 1, 3, 5]
    target, own, prior = dense @ weight.T, dense[..., kept], weight[:, kept]
    found = fit_weights(prior, target, own, RIDGES).weights
    assert found.isfinite().all() and found.abs().max() < 100
    before, after = (squares(target.double(), own.double(), w) for w in (prior.double(), found))
    assert after <= before * (1 + 1e-6) + 1e-9


def test_units_with_a_copy_among_the_kept_ones_are_made_up_for():
    half = random(64, 10, 6)
    weight = random(4, 12, seed=5)
    target = torch.cat([half, half], dim=-1) @ weight.T
    found = fit_weights(weight[:, :6], target, half, [1e-6]).weights
    torch.testing.assert_close(found, weight[:, :6] + weight[:, 6:], rtol=1e-5, atol=1e-5)


def test_one_image_is_no_evidence():
    dense, own = activations(1, 50)
    prior = random(4, 5, seed=21)
    assert torch.equal(fit_weights(prior, dense @ random(9, 4, seed=20), own, RIDGES).weights, prior)


@pytest.mark.parametrize(
    ("images", "positions", "channels", "wanted"),
    [
        (100, 49, 8, 49),  # all of them
        (100, 3136, 8, 656),  # ⌈2¹⁶ / 100⌉
        (1, 3136, 8, 3136),
        (100, 3136, 2048, 1311),  # ⌈64 · 2048 / 100⌉
    ],
)
def test_some_positions_will_do_where_there_are_very_many(
    images: int, positions: int, channels: int, wanted: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(least_squares, "SAMPLES", 2**16)
    monkeypatch.setattr(least_squares, "SAMPLES_PER_CHANNEL", 64)
    drawn = draw_positions(images, positions, channels)
    assert drawn.shape == (images, wanted) and drawn.dtype == torch.int64
    assert drawn.min() >= 0 and drawn.max() < positions
    assert all(len(set(row)) == wanted for row in drawn[:3].tolist())  # none twice
    assert torch.equal(drawn, draw_positions(images, positions, channels))
    if wanted < positions:
        assert set(drawn[0].tolist()) != set(drawn[1].tolist())
        assert drawn.double().mean().item() == pytest.approx(positions / 2, rel=0.02)  # from all over the map


def test_a_covariance_is_never_singular():
    for covariance in (torch.zeros(3, 3), torch.ones(2, 3, 3), torch.diag(torch.tensor([1e12, 1.0, 0.0]))):
        solved = torch.linalg.solve(damped(covariance.double(), 0.0), torch.zeros(3, 3, dtype=torch.float64))
        assert solved.isfinite().all()
