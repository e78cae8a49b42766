"""Measures one model: what of its width and of its heads can be pruned, and whether the pruned model holds.

The model is built with random weights, none of them zero, and traced. Then, for each ranking, half of its prunable
width is cut by L2, and what is left must run forward and backward, survive a checkpoint, and compute what the masked
dense model computes.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model
from isomorphic.checkpoints.save import save_model
from isomorphic.inputs import Inputs, call, tensors_in
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import ModelSpec, build_model, describe_model, example_inputs
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.cutting.self_check import cut_error, masked_copy
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph
from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.planning import ScoredModel, score_model
from isomorphic.pruning.report import classified
from isomorphic.pruning.widths import all_producers, width_shares
from isomorphic.skeletons import shape_copy
from studies.apart import OK, noting
from studies.coverage.example import Case, Example
from studies.coverage.heads import count_heads

RATIO = 0.5
RANKINGS = ("local", "isomorphic")  # one ratio in every group, and another one in each


@dataclass(frozen=True)
class Family:
    """One line of families.json: how to build a model, and on images of which side to run it (None: its own)."""

    set: str
    model: str
    kwargs: dict[str, Any]
    input_size: int | None
    builder: str = "timm"

    @property
    def spec(self) -> ModelSpec:
        """What a checkpoint stores of the model."""
        return describe_model(self.model, builder=self.builder, kwargs=self.kwargs, input_size=self.input_size)

    def example(self) -> Example:
        """Returns the model and one image; in train mode it gets other ones."""
        spec = self.spec
        model, image = build_model(spec), example_inputs(spec)
        statistics = torch.randn(4, *image.shape[1:])
        training = torch.randn(2, *image.shape[1:], generator=torch.Generator().manual_seed(1))
        return Example(model, image, training, statistics, classifies=True)

    def save(self, path: Path, pruned: nn.Module, dense: nn.Module) -> None:
        """Writes what is loaded by name."""
        save_model(path, pruned, self.spec, provenance={})

    def load(self, path: Path) -> nn.Module:
        """Returns what `save` wrote."""
        return load_model(path)


@dataclass
class CoverageRow:
    """What was measured of one model: the columns of coverage.csv.

    Attributes:
        status: "ok", or the stage that failed and why.
        width: output channels of all layers (see `isomorphic.pruning.widths`), the classifier's left out.
        prunable: share of the width that is in a coupled group.
        frozen: the share of the rest by reason.
        trace_seconds, forward_seconds: of tracing, and of one dense image, on one thread.
        macs: of the dense model and one image, exact counter.
        local_removed, …: share of the width that was removed under each ranking, the share of the MACs that is left,
            and the largest difference from the masked dense model as a share of the output's spread.
        heads: attention heads that could be removed as wholes, and heads_stay: those that could not.
    """

    set: str
    model: str
    status: str = ""
    width: int | None = None
    prunable: float | None = None
    frozen: str = ""
    groups: int | None = None
    classes: int | None = None
    trace_seconds: float | None = None
    forward_seconds: float | None = None
    macs: int | None = None
    local_removed: float | None = None
    local_macs: float | None = None
    local_error: float | None = None
    isomorphic_removed: float | None = None
    isomorphic_macs: float | None = None
    isomorphic_error: float | None = None
    heads: int | None = None
    heads_stay: int | None = None


@dataclass
class Subject:
    """A scored model, and what its pruned copies are held against."""

    case: Case
    example: Example
    scored: ScoredModel
    channels: Mapping[str, int]
    trained: set[str]


def measure(case: Case, report: Callable[[CoverageRow], None], *, tracer: str) -> CoverageRow:
    """The row of one model. Whatever goes wrong with it ends in its status.

    Args:
        case: the model.
        report: takes the row as far as it is known, the stage that begins as its status.
        tracer: what finds its groups, see `isomorphic.pruning.grouping.trace.TRACERS`.
    """
    row = CoverageRow(case.set, case.model)

    def enter(stage: str) -> None:
        row.status = stage
        report(row)

    failures: list[str] = []
    with noting(row, failures):
        subject = _prepare(case, tracer, row, enter, failures)
        for ranking in RANKINGS:
            with noting(row, failures):
                _prune(subject, ranking, row, enter)
    row.status = "; ".join(failures) or OK
    return row


def _prepare(case: Case, tracer: str, row: CoverageRow, enter: Callable[[str], None], failures: list[str]) -> Subject:
    enter("build")
    torch.manual_seed(0)
    example = case.example()
    model, inputs = example.model.eval(), example.inputs
    randomize(model, example.training_inputs if example.statistics is None else example.statistics)
    trained = _trained(copy.deepcopy(model), example.training_inputs)
    with torch.no_grad():
        row.forward_seconds, outputs = _timed(lambda: call(model, inputs))
    enter("count")
    with noting(row, failures):  # the rest can be measured all the same
        row.macs = count_complexity(model, inputs).macs_exact
    heads = count_heads(model, inputs) if example.heads is None else example.heads
    enter("trace")
    row.trace_seconds, graph = _timed(lambda: trace_groups(model, inputs, tracer))
    enter("classify")
    graph = classified(graph)
    row.groups, row.classes = len(graph.groups), len(set(graph.classes.values()))
    row.heads = sum(groups[0].num_sections for groups in graph.head_sets)
    row.heads_stay = max(heads - row.heads, 0)
    shares = width_shares(model, graph, tensors_in(outputs)[0].shape[-1] if example.classifies else None)
    row.width, row.prunable = shares.width, round(shares.prunable, 4)
    row.frozen = "; ".join(f"{reason} {share:.1%}" for reason, share in shares.frozen.items())
    enter("score")
    scored = score_model(model, inputs, PlanOptions(ratio=RATIO, criterion="l2"), graph=graph)
    return Subject(case, example, scored, shares.channels, trained)


def _prune(subject: Subject, ranking: str, row: CoverageRow, enter: Callable[[str], None]) -> None:
    """Half of the prunable width goes; fills the ranking's columns, or raises what is wrong with what is left."""
    scored = subject.scored
    model, inputs = scored.model, scored.inputs
    enter(f"{ranking} rank")
    plan = scored.ranker.with_ranking(ranking).plan(scored.options.plain_ratios())
    enter(f"{ranking} cut")
    pruned = copy.deepcopy(model)
    cut(pruned, scored.graph, plan)
    enter(f"{ranking} forward")
    with torch.no_grad():
        torch.manual_seed(0)  # for forward code that draws random numbers
        outputs = tensors_in(call(pruned, inputs))
    setattr(row, f"{ranking}_removed", round(_removed_share(model, pruned, scored.graph, subject.channels), 4))
    if row.macs:
        setattr(row, f"{ranking}_macs", round(count_complexity(pruned, inputs).macs_exact / row.macs, 4))
    enter(f"{ranking} compare")
    error = cut_error(masked_copy(model, scored.graph, plan), pruned, inputs)  # infinite for outputs of another shape
    setattr(row, f"{ranking}_error", float(f"{error:.2g}"))
    enter(f"{ranking} reload")
    _check_reloaded(subject, pruned, outputs)
    enter(f"{ranking} backward")
    remaining = {name for name, _ in pruned.named_parameters()}
    without = (subject.trained & remaining) - _trained(pruned, subject.example.training_inputs)
    if without:
        raise RuntimeError(f"{len(without)} parameters got no gradient, such as {min(without)}")


def _check_reloaded(subject: Subject, pruned: nn.Module, outputs: list[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned.safetensors"
        subject.case.save(path, pruned, shape_copy(subject.scored.model))
        reloaded = subject.case.load(path)
    with torch.no_grad():
        torch.manual_seed(0)
        same = all(map(torch.equal, outputs, tensors_in(call(reloaded, subject.scored.inputs))))
    if not same:
        raise RuntimeError("the reloaded model computes something else")


@torch.no_grad()
def randomize(model: nn.Module, inputs: Inputs) -> None:
    """Makes fresh weights as uneven as trained ones: nothing is zero, and no two groups keep the same share.

    Parameters that are constant become random: zeros N(0, 0.1²), another constant c max(c, 0.1) · U(0.5, 1.5). Rows of
    weights get factors exp(N(0, s²)), s ~ U(0, 0.5) by weight. Batch norms take over the statistics of `inputs`, which
    the model takes in train mode.
    """
    for parameter in filter(Tensor.numel, model.parameters()):
        value = parameter.flatten()[0].item()
        if bool((parameter == value).all()):
            _fill(parameter, value)
        elif parameter.dim() > 1:
            rows = torch.randn(len(parameter), *[1] * (parameter.dim() - 1))
            parameter.mul_((0.5 * torch.rand(()) * rows).exp())
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    call(model.train(), inputs)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _fill(parameter: Tensor, constant: float) -> None:
    if constant == 0:
        parameter.normal_(std=0.1)
    else:
        parameter.uniform_(0.5, 1.5).mul_(constant if abs(constant) > 0.1 else 0.1)


def _removed_share(dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> float:
    dims = {name: dim for name, (_, dim) in all_producers(dense, graph).items()}
    tensors = dict(pruned.named_parameters(remove_duplicate=False))
    left = sum(tensors[name].shape[dims[name]] for name in channels)
    return 1 - left / max(sum(channels.values()), 1)


def _trained(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that get a finite gradient in train mode; the model's statistics move."""
    outputs = [output for output in tensors_in(call(model.train(), inputs)) if output.is_floating_point()]
    loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
    loss.backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return round(time.perf_counter() - start, 3), result
