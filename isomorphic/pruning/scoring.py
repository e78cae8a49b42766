"""Step 3, score: one number per unit of each coupled group.

A criterion turns a weight, and what was accumulated for it over images, into a saliency of the same shape. Saliency is
summed over a unit's slice of each member, averaged over the members of the group, and normalised inside the group so
that groups of one isomorphism class can be compared (Isomorphic Pruning, ECCV 2024, section 3.3; Taylor: Molchanov et
al., CVPR 2019). The scored members are the weights of convolutions, linears, depthwise filters and affine norms.

"dimap" goes on from there: a unit's energy is the sum of its shares of each tensor's energy, and its score is that of
`weights/dimap.py` over the energies of its group (DIMAP, ICLR 2024, of units instead of weights).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.processes import distributed
from isomorphic.pruning.groups import CoupledGroup, Member
from isomorphic.pruning.weights.dimap import surviving_share

Statistic = dict[str, Tensor]  # by parameter name, of the parameter's shape


@dataclass(frozen=True)
class Criterion:
    """How important a single weight is.

    Attributes:
        saliency: (weight, statistic of the same shape) -> saliency of the same shape; None draws at random.
        statistic: what must be accumulated over images first: "gradient", "squared_gradient" or None.
        relative: of each tensor, a unit's saliency is its share of the whole tensor's.
        of_units: the scores of a group's units (n,), from their saliency (n,), which is the score for most.
    """

    saliency: Callable[[Tensor, Tensor], Tensor] | None
    statistic: str | None = None
    relative: bool = False
    of_units: Callable[[Tensor], Tensor] = lambda saliency: saliency


CRITERIA = {
    "random": Criterion(None),
    "l1": Criterion(lambda weight, _: weight.abs()),
    "l2": Criterion(lambda weight, _: weight.square()),
    "taylor": Criterion(lambda weight, gradient: (weight * gradient).abs(), "gradient"),
    "hessian": Criterion(lambda weight, curvature: weight.square() * curvature, "squared_gradient"),
    "dimap": Criterion(lambda weight, _: weight.square(), relative=True, of_units=surviving_share),
}

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores,
    "mean": lambda scores: scores / scores.mean(),
    "max": lambda scores: scores / scores.max(),
    "sum": lambda scores: scores / scores.sum(),
    "standardize": lambda scores: (scores - scores.min()) / (scores.max() - scores.min()),
    "gaussian": lambda scores: (scores - scores.mean()) / scores.std(correction=0),
}


def accumulate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    statistic: str,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> Statistic:
    """Runs images through `model` and accumulates what a criterion needs, over all processes.

    Args:
        model: on `device`; scored in eval mode, its gradients cleared before and after.
        batches: this process's share of (images (B, 3, H, W), labels (B,)).
        statistic: "gradient": the sum over batches of the gradient of the batch-mean cross entropy;
            "squared_gradient": the mean over images of each image's squared gradient.
        amp_dtype: autocast dtype of the forward pass, None for full precision.

    Returns:
        float32 tensors by parameter name; zeros where no gradient arrived.

    Raises:
        UserError: a loss that is not finite, or no image at all.
    """
    per_image = statistic == "squared_gradient"
    model.eval().zero_grad(set_to_none=True)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    num_images = torch.zeros((), device=device)
    for images, labels in batches:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        for image, label in zip(*_parts(images, labels, per_image), strict=True):
            with _without_cudnn() if recurrent else contextlib.nullcontext():
                _backward(model, image, label, amp_dtype)
            _collect(model, sums, square=per_image)
        num_images += len(images)
    model.train().eval()  # what some keep of an eval run, such as indexed bias tables, hangs on the graph of a gradient
    count = int(distributed.all_reduce_sum(num_images).item())
    if count == 0:
        raise UserError("there are no images to score on")
    for name in sums:
        distributed.all_reduce_sum(sums[name])
        if per_image:
            sums[name] /= count
    return sums


def score_groups(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    criterion: str,
    *,
    statistic: Statistic | None = None,
    score_bias: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores every unit of every group, not yet normalised.

    Args:
        model: holds the weights that the groups' members name.
        groups: the coupled groups.
        criterion: a key of `CRITERIA`.
        statistic: from `accumulate`, where the criterion needs one.
        score_bias: count the biases of scored layers too.
        seed: of the random criterion.

    Returns:
        float32 scores on the CPU, shape (n,), by group name; finite.

    Raises:
        UserError: a score that is not finite.
        ValueError: the criterion's statistic is missing.
    """
    rule = CRITERIA[criterion]
    if rule.statistic and not statistic:
        raise ValueError(f"{criterion} needs what `accumulate` gives for {rule.statistic!r}")
    generator = torch.Generator().manual_seed(seed)
    sums = _PositionSums(model, rule.saliency, statistic or {}, rule.relative) if rule.saliency else None
    scores = {}
    for group in groups:
        if sums is None:
            scores[group.name] = torch.rand(group.num_units, generator=generator)
        else:
            members = sums.known(group.scored_members(score_bias)) or sums.known(group.members)
            scores[group.name] = rule.of_units(_mean_over_members(members, sums)).float()
        if not torch.isfinite(scores[group.name]).all():
            raise UserError(f"the {criterion} scores of {group.name} are not finite: check weights and images")
    return scores


def mean_saliency(
    model: nn.Module, criterion: str, *, statistic: Statistic | None = None, seed: int = 0
) -> dict[nn.Parameter, Tensor]:
    """The mean saliency of every parameter, a scalar on the CPU: what blocks are scored by.

    It is never relative: a block has its tensors as a whole, so that each one's share of itself would say nothing.

    Args:
        model, criterion, statistic, seed: as for `score_groups`.
    """
    saliency = CRITERIA[criterion].saliency
    generator = torch.Generator().manual_seed(seed)
    if saliency is None:
        return {parameter: torch.rand((), generator=generator) for parameter in model.parameters()}
    return {
        weight: saliency(weight.detach().float(), statistic[name] if statistic else weight.detach()).mean().cpu()
        for name, weight in model.named_parameters()
    }


def normalize(scores: Tensor, normalizer: str) -> Tensor:
    """Makes the scores of one group, shape (n,), comparable with those of others; all zeros stay all zeros.

    Args:
        scores: of one group's units.
        normalizer: a key of `NORMALIZERS`.
    """
    return torch.nan_to_num(NORMALIZERS[normalizer](scores), nan=0.0, posinf=0.0, neginf=0.0)


class _PositionSums:
    """Saliency of a tensor summed over all dims but one; each tensor's saliency is computed once."""

    def __init__(
        self,
        model: nn.Module,
        saliency: Callable[[Tensor, Tensor], Tensor],
        statistic: Statistic,
        relative: bool = False,
    ) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._first_name = {
            parameter: name for name, parameter in model.named_parameters()
        }  # tied weights have several
        self._saliency = saliency
        self._statistic = statistic
        self._relative = relative
        self._cache: dict[str, list[Tensor]] = {}

    def known(self, members: Iterable[Member]) -> list[Member]:
        """Those whose tensors are parameters: buffers are not learned, and have no gradient."""
        return [member for member in members if member.name in self._parameters]

    def __call__(self, name: str, dim: int) -> Tensor:
        """Sums by position along `dim`, float32 on the CPU."""
        if name not in self._cache:
            parameter = self._parameters[name]
            weight = parameter.detach().float()
            statistic = self._statistic[self._first_name[parameter]] if self._statistic else weight
            saliency = self._saliency(weight, statistic)
            if self._relative and saliency.any():
                saliency = saliency / saliency.sum()
            others = [[d for d in range(saliency.dim()) if d != kept] for kept in range(saliency.dim())]
            self._cache[name] = [(saliency.sum(dims) if dims else saliency).cpu() for dims in others]
        return self._cache[name][dim]


def _mean_over_members(members: Sequence[Member], sums: _PositionSums) -> Tensor:
    """A unit's score: summed over its k positions of a member, averaged over the members."""
    return torch.stack([sums(member.name, member.dim)[member.index].sum(dim=1) for member in members]).mean(dim=0)


def _parts(images: Tensor, labels: Tensor, per_image: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (images.split(1), labels.split(1)) if per_image else ((images,), (labels,))


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Its recurrent layers have no backward pass in eval mode."""
    return torch.backends.cudnn.flags(enabled=False)


def _backward(model: nn.Module, images: Tensor, labels: Tensor, amp_dtype: torch.dtype | None) -> None:
    with torch.autocast(images.device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
        loss = F.cross_entropy(model(images).float(), labels)
    if not torch.isfinite(loss):
        raise UserError(f"the loss on the scoring images is {loss.item()}: check the weights and the images")
    loss.backward()


def _collect(model: nn.Module, sums: Statistic, *, square: bool) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            sums[name] += gradient.square() if square else gradient
    model.zero_grad(set_to_none=True)
