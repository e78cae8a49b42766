"""Cutting a model so that it keeps what it can: recoveries around the cut, in one order.

1. fusion, before the cut: removed units are merged into kept ones (`recovery/fusion.py`), without data.
2. compensate, bn and distill, after it, on calibration images (`recovery/recover.py`). Compensate begins before it, by
   turning linear streams so that the cut takes their weakest directions (`recovery/rotation.py`).

Where there are calibration images, each step is judged on some of them that it has not seen, and undone if it loses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, items_of
from isomorphic.pruning.blocks.depth import remove_blocks
from isomorphic.pruning.branches import Batches, check_branches
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.optimizer import OptimizerCut, forget
from isomorphic.pruning.cutting.self_check import check_cut
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup, short_name
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.attention import find_query_keys
from isomorphic.pruning.recovery.calibration import check_calibration, not_finite, with_mirror_images
from isomorphic.pruning.recovery.compensation import CutLayers, Reconstruction
from isomorphic.pruning.recovery.distillation import DistillationRules, Distilled
from isomorphic.pruning.recovery.fusion import Fusion, FusionRules, fuse
from isomorphic.pruning.recovery.held_out import Judge, Judged, hold_out
from isomorphic.pruning.recovery.mixed_layers import MixedLayers, mixed_layers
from isomorphic.pruning.recovery.recover import BATCH, Models, Recovered, recover
from isomorphic.pruning.recovery.rotation import Rotation, rotate
from isomorphic.pruning.report import listed

RECOVERIES = ("fusion", "compensate", "bn", "distill")  # in this order, however they are asked for
NEED_IMAGES = frozenset({"compensate", "bn", "distill"})
AUTO = "auto"  # compensate, then distill while it pays
AUTO_STEPS, AUTO_ROUNDS = frozenset({"compensate", "distill"}), 3


def looks_at_images(recover: Collection[str]) -> bool:
    """Returns True if any of these recoveries needs calibration images."""
    return bool({*NEED_IMAGES, AUTO} & {*recover})


@dataclass(frozen=True)
class Recovery:
    """What is to be done around a cut.

    Attributes:
        steps: some of `RECOVERIES`.
        images: this process's calibration images on the model's device, a tensor (N, …) or what else the model takes,
            N items of it; None where no step looks at any.
        fusion: how units are merged.
        importance: of the units (n,) by group name, for masses by importance.
        distillation: how a cut model is distilled.
        is_judged: hold some images out and undo what loses on them; False for the models of a search, which judges.
        mirrored: each image that is fitted is fitted as its mirror image, too.
    """

    steps: frozenset[str] = frozenset()
    images: Inputs | None = None
    fusion: FusionRules = field(default_factory=FusionRules)
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    distillation: DistillationRules = field(default_factory=DistillationRules)
    is_judged: bool = True
    mirrored: bool = False

    @classmethod
    def asked(
        cls,
        steps: Collection[str],
        images: Inputs | None,
        fusion: FusionRules,
        distillation: DistillationRules,
        *,
        mirrored: bool = False,
    ) -> Recovery:
        """What a user asks for, who may say "auto"."""
        if AUTO in steps:
            rounds = replace(distillation, rounds=AUTO_ROUNDS)
            return cls(AUTO_STEPS, images, fusion, distillation=rounds, mirrored=mirrored)
        return cls(frozenset(steps), images, fusion, distillation=distillation, mirrored=mirrored)

    def for_search(self, images: Inputs) -> Recovery:
        """The same for the many models of a search: in closed form, and without a judge, which the search has."""
        return replace(self, steps=self.steps - {"distill"}, images=images, is_judged=False)


@dataclass(frozen=True)
class Applied:
    """What a cut and its recoveries did.

    Attributes:
        check_error: of the self-check, if it was asked for; see `check_cut`.
        fusion: which groups were merged, and why others were not; None without fusion.
        rotated: names of the groups whose weakest directions went, rather than units.
        reconstructions: of the layers that were compensated.
        errors: relative reconstruction error before and after, the mean over its layers, by group name.
        plain: groups that lost units which none of the steps made up for.
        batch_norms: how many were recalibrated; None if none were to be.
        distilled: how far that went; None if it was not to.
        judged: the steps as held-out images saw them; none where there were none.
        measure, held_out: what these were judged by, on how many images.
    """

    check_error: float | None = None
    fusion: Fusion | None = None
    reconstructions: Sequence[Reconstruction] = ()
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    plain: Sequence[str] = ()
    batch_norms: int | None = None
    distilled: Distilled | None = None
    judged: Sequence[Judged] = ()
    measure: str = ""
    held_out: int = 0
    rotated: Sequence[str] = ()


def apply_plan(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    inputs: Inputs,
    recovery: Recovery = Recovery(),
    *,
    self_check: bool = False,
    optimizer: Optimizer | None = None,
    batches: Batches | None = None,
    stage: Callable[[str], None] = lambda doing: None,
) -> Applied:
    """Cuts `model` by `plan`, in place, with what `recovery` asks for around it.

    Args:
        model: the dense model; blocks that the plan does not keep go first.
        graph, plan: the groups that it has without them, and what they keep.
        inputs: what it was traced on.
        recovery: see there.
        self_check: hold the cut model against the masked dense one, before anything is compensated.
        optimizer: of the model: it goes on with the cut parameters.
        batches: what the model is meant for: a cut copy tries the first, where the trace has left parameters out.
        stage: is called with the name of each step before it begins.

    Raises:
        UserError: as `cut`, `remove_blocks` and `check_branches`; the self-check finds a difference; a state that
            cannot be cut; calibration images that the model does not take, or that leave it with numbers that are not
            finite.
    """
    plan.check(graph)
    losing = [group.name for group in graph.groups if len(plan.kept[group.name]) < group.num_units]
    check_branches(model, graph, plan, inputs, batches)
    images, judge = recovery.images if NEED_IMAGES & recovery.steps else None, None
    if images is not None:
        check_calibration(model, images)
        check_branches(model, graph, plan, inputs, Batches([(items_of(images, slice(BATCH)),)]))
        if recovery.is_judged and (losing or plan.kept_blocks):  # what loses nothing is not to come back to anything
            images, judge = hold_out(model, images)
        images = with_mirror_images(images) if recovery.mirrored else images
    needs_dense = images is not None and {"fusion", "compensate", "distill"} & recovery.steps
    teacher = copy.deepcopy(model) if needs_dense else None
    if plan.kept_blocks:
        dense_parameters = set(model.parameters())
        remove_blocks(model, plan.kept_blocks, inputs)
        if optimizer is not None:
            forget(optimizer, dense_parameters - set(model.parameters()))
    optimizer_cut = OptimizerCut(optimizer, model, graph, plan) if optimizer is not None else None
    dense = copy.deepcopy(model) if needs_dense and plan.kept_blocks else teacher
    stage("cutting")
    layers = CutLayers.of(model, graph, plan)
    mixed = _mix_units(model, dense, graph, plan, inputs, recovery, images)
    uncut = copy.deepcopy(model) if self_check else None
    cut(model, graph, plan)
    if uncut:
        stage("checking the cut model")
    check_error = check_cut(uncut, graph, plan, model, inputs) if uncut else None
    judged: list[Judged] = []
    plain_state = _plain_state(dense, graph, plan) if judge and dense and mixed.layers else None
    if judge and plain_state and mixed.fusion:
        judged.append(_judge_fusion(judge, model, plain_state))
        if not judged[0].stays:
            mixed = _Mixed(mixed.fusion.undone(), None, None)
        plain_state = None
    if mixed.layers:
        outputs = {**layers.outputs, **mixed.layers.outputs}
        layers = replace(layers, outputs=outputs, mixtures=mixed.layers.inputs)
    recovered = Recovered()
    if images is not None:
        if dense:
            layers = replace(layers, query_keys=find_query_keys(dense, graph, plan, items_of(images, slice(1))))
        models = Models(model, dense, teacher, plain_state)
        recovered = _recover(models, images, layers, recovery, judge, stage)
    if optimizer_cut is not None:
        optimizer_cut.apply(model)
    errors = _errors_by_group(graph.groups, recovered.reconstructions)
    is_undone = any(one.step == "compensate" and not one.stays for one in recovered.judged)
    rotated = mixed.rotation.groups if mixed.rotation and not is_undone else []
    made_up_for = {*errors, *(mixed.fusion.merged if mixed.fusion else ()), *rotated}
    plain = [name for name in losing if name not in made_up_for]
    return Applied(
        check_error,
        mixed.fusion,
        recovered.reconstructions,
        errors,
        plain if recovery.steps else (),
        recovered.batch_norms,
        recovered.distilled,
        (*judged, *recovered.judged),
        judge.measure if judge else "",
        judge.num_images if judge else 0,
        rotated,
    )


class _Mixed(NamedTuple):
    """What became of units before the cut: of which fusion or rotation, and what layers make and read of it."""

    fusion: Fusion | None
    rotation: Rotation | None
    layers: MixedLayers | None


def _mix_units(
    model: nn.Module,
    dense: nn.Module | None,
    graph: ChannelGraph,
    plan: PruningPlan,
    inputs: Inputs,
    recovery: Recovery,
    images: Inputs | None,
) -> _Mixed:
    """Merges or rotates units before the cut, in place; `dense` is the same as it was, where it will be asked."""
    if "fusion" in recovery.steps:
        rules, importance = recovery.fusion, recovery.importance or None
        fusion = fuse(model, graph, plan, inputs, rules=rules, importance=importance)
        return _Mixed(
            fusion, None, mixed_layers(dense, model, graph, plan, fusion) if dense and fusion.merged else None
        )
    if "compensate" in recovery.steps and images is not None:
        rotation = rotate(model, graph, plan, inputs, images)
        return _Mixed(None, rotation, rotation.mixed(dense, model, graph, plan) if dense and rotation.groups else None)
    return _Mixed(None, None, None)


def _plain_state(dense: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> dict[str, Tensor]:
    """The tensors of a plain cut."""
    plain = copy.deepcopy(dense)
    cut(plain, graph, plan)
    return plain.state_dict()


def _judge_fusion(judge: Judge, model: nn.Module, plain_state: Mapping[str, Tensor]) -> Judged:
    """Holds a cut model of merged units against the plain cut, which it becomes if that is better."""
    plain = copy.deepcopy(model)
    plain.load_state_dict(plain_state)
    found = judge.compare("fusion", plain, model)
    if not found.stays:
        model.load_state_dict(plain_state)
    return found


def _recover(
    models: Models,
    images: Inputs,
    layers: CutLayers,
    recovery: Recovery,
    judge: Judge | None,
    stage: Callable[[str], None],
) -> Recovered:
    """
    Raises:
        UserError: the cut model is left with numbers that are not finite, which it had not before.
    """
    infinite = not_finite(models.model)
    recovered = recover(models, images, layers, recovery.steps, judge, recovery.distillation, stage=stage)
    if spoilt := sorted(not_finite(models.model) - infinite):
        raise UserError(
            f"after the recovery {listed(spoilt)} hold numbers that are not finite: check the calibration images, "
            f"or leave out {' and '.join(sorted(NEED_IMAGES & recovery.steps))}"
        )
    return recovered


def applied_lines(recovered: Applied) -> Iterator[str]:
    """What a person reads of it, line by line.

    Self-check passed: cut and masked model differ by 1e-07 of the output's spread
    Fusion: 8 groups merged
    Not merged: blocks.0.attn.qkv and 11 more (its units lie in blocks that stay equally wide)
    Compensated, with the relative reconstruction error before and after:
      blocks.0.mlp.fc1  0.4127 => 0.0213
    Cut plainly: stem.0
    Recalibrated: 20 batch norms
    On 51 held-out images, mean KL to the dense model:
      compensate  2.2190 => 0.9651
      bn          0.9651 => 1.0127, undone
      distill     0.9651 => 0.4023 (175 of 200 steps)
    """
    if recovered.check_error is not None:
        error = f"{recovered.check_error:.0e}"
        yield f"Self-check passed: cut and masked model differ by {error} of the output's spread"
    if recovered.fusion:
        yield f"Fusion: {len(recovered.fusion.merged)} groups merged"
        yield from (f"Not merged: {line}" for line in _by_reason(recovered.fusion.plain))
    if recovered.rotated:
        yield f"Rotated: {', '.join(map(short_name, recovered.rotated))}"
    if recovered.errors:
        yield "Compensated, with the relative reconstruction error before and after:"
        names = {name: short_name(name) for name in recovered.errors}
        width = max(map(len, names.values()))
        for name, (before, after) in recovered.errors.items():
            yield f"  {names[name].ljust(width)}  {before:.4f} => {after:.4f}"
    if recovered.plain:
        yield f"Cut plainly: {', '.join(map(short_name, recovered.plain))}"
    if recovered.batch_norms is not None:
        yield f"Recalibrated: {recovered.batch_norms or 'no'} batch norms"
    if recovered.judged:
        plural = "" if recovered.held_out == 1 else "s"
        yield f"On {recovered.held_out} held-out image{plural}, {recovered.measure}:"
        width = max(len(judged.step) for judged in recovered.judged)
        yield from (f"  {judged.line(width)}" for judged in recovered.judged)
    elif recovered.distilled:
        yield f"Distilled: {recovered.distilled.steps} steps"


def _errors_by_group(
    groups: Sequence[CoupledGroup], reconstructions: Sequence[Reconstruction]
) -> dict[str, tuple[float, float]]:
    """The mean over the layers that read a group, before and after, where any of them was compensated."""
    by_layer = {found.layer: found for found in reconstructions}
    errors = {}
    for group in groups:
        readers = {member.module for member in group.members if member.tensor == "weight" and member.dim == 1}
        found = [by_layer[name] for name in readers if name in by_layer]
        if found:
            errors[group.name] = (fmean(one.before for one in found), fmean(one.after for one in found))
    return errors


def _by_reason(reasons: Mapping[str, str]) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(short_name(name))
    yield from (f"{listed(found)} ({reason})" for reason, found in names.items())
