"""The Python face: trace a model, plan what goes, prune it. For any module and any task.

    import isomorphic as iso

    graph  = iso.trace(model, inputs)                           # print(graph): groups, classes, what stays and why
    pruned = iso.prune(model, inputs, macs="50%", data=loader)  # a pruned copy of the model
    pruned.save("net.safetensors")
    model  = iso.load_model("net.safetensors", model=build())

`inputs` is what the model takes: a tensor, a tuple of positional arguments, or a mapping of keyword arguments. What is
wrong with a call is an exception, `isomorphic.errors.UserError`, with the sentence that the command line would print.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from isomorphic.checkpoints import save
from isomorphic.checkpoints.origins import (
    Origin,
    known_class_names,
    known_origin,
    origin_of,
    remember_class_names,
    remember_origin,
)
from isomorphic.errors import UserError, first_line
from isomorphic.files import check_writable
from isomorphic.inputs import Inputs, num_items, tensors_in, without_data
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.results import change_lines
from isomorphic.models import REFUSALS, describe_model
from isomorphic.observe import eval_mode
from isomorphic.page.facts import CUT, CutFacts, gather_facts
from isomorphic.page.inventory import take_inventory
from isomorphic.page.page import Subject, write_page
from isomorphic.provenance import run_provenance
from isomorphic.pruning.apply import AUTO, RECOVERIES, Applied, Recovery, applied_lines, apply_plan, looks_at_images
from isomorphic.pruning.branches import Batches
from isomorphic.pruning.grouping.exact import ASKS_FOR_DATA
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.grouping.trial import Trial
from isomorphic.pruning.iterative import Between, prune_in_steps
from isomorphic.pruning.options import PlanOptions, check_counter
from isomorphic.pruning.plan import PruningPlan, load_plan
from isomorphic.pruning.planning import Calibration, PlannedPruning, check_plan, make_plan, measure_dense_latency
from isomorphic.pruning.recovery.distillation import DistillationRules
from isomorphic.pruning.recovery.fusion import FusionRules
from isomorphic.pruning.report import TracedGraph, classified
from isomorphic.pruning.scoring import statistic_of
from isomorphic.pruning.widths import width_shares
from isomorphic.skeletons import shape_copy
from isomorphic.wrappers import check_unwrapped

CalibrationData = Tensor | Mapping[str, Any] | tuple[Inputs, Tensor] | Calibration | None
_Face = TypeVar("_Face", bound=Callable[..., Any])
_Counted = TypeVar("_Counted")


def _with_plan_options(function: _Face) -> _Face:
    """Shows the fields of `PlanOptions`, with their defaults, in place of **options: in help() and in editors."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    shown = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=f.type)
        for f in dataclasses.fields(PlanOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    return function


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]


def trace(model: nn.Module, inputs: Inputs, *, tracer: str = "exact") -> TracedGraph:
    """Finds which channels of which tensors go together. `print(graph)` shows the classes, and what stays and why.

    Args:
        model: any module, in any mode; it is left as it was.
        inputs: what the model takes, on its device.
        tracer: "exact" follows every channel through one forward pass; "depgraph" asks torch-pruning.

    Returns:
        The coupled groups in a fixed order (`graph.groups`), and why other channels stay (`graph.frozen`).

    Raises:
        UserError: the model does not take the inputs, or nothing in it can be pruned.
    """
    check_unwrapped(model)
    _costs(model, inputs)
    graph = trace_groups(model, inputs, tracer)
    return classified(graph, widths=width_shares(model, graph))


@_with_plan_options
def plan(
    model: nn.Module,
    inputs: Inputs,
    *,
    plan: PruningPlan | str | Path | None = None,
    calibration: CalibrationData = None,
    **options: Any,
) -> PlannedPruning:
    """Plans what goes, and changes nothing. `print(plan)` shows the classes, what each keeps, and the costs.

    Args:
        model: any module; it is left as it was.
        inputs: what the model takes, on its device.
        plan: a plan, or its file, instead of a ratio or budget: it is held against the model.
        calibration: images, or a pair of images and labels, for `allocate="calibrate"`.
        **options: fields of `PlanOptions`: one of ratio=, macs=, params=, latency=; how units are scored and ranked.

    Returns:
        The plan: units to keep by group (`plan.kept`), costs (`plan.before`, `plan.after`), `plan.save("plan.json")`.

    Raises:
        UserError: the model does not take the inputs, nothing can be pruned, the budget is out of reach, met already or
            in MACs that the counters disagree about, names match nothing, data or loss are not what the criterion
            needs, a plan of another model.
    """
    check_unwrapped(model)
    before = _costs(model, inputs)
    with eval_mode(model):
        if plan is not None:
            return check_plan(model, inputs, _plan_of(plan, options), options.get("tracer", "exact"), before=before)
        asked = _plan_options(options)
        _check_counter(asked, options, model, before)
        return make_plan(model, inputs, asked, before=before, calibration=_calibration(calibration))


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and what was done to it. It prints as a person would want to read it.

    Attributes:
        model: the pruned model, in the mode that it was given in.
        plan: units to keep by group of the dense model; of several steps, what they did together.
        applied: what recoveries and the self-check found, cut by cut.
        facts: widths, costs by stage, score histograms: what `report` shows, as data.
    """

    model: nn.Module
    plan: PlannedPruning
    applied: Sequence[Applied]
    facts: CutFacts = field(repr=False)
    _origin: Origin = field(repr=False)
    _arguments: Mapping[str, Any] = field(repr=False)
    _inputs: Inputs = field(repr=False)  # without their data

    @property
    def before(self) -> Complexity:
        """MACs by both counters, and params, of the dense model."""
        return self.plan.before

    @property
    def after(self) -> Complexity:
        """The same of the pruned model."""
        return self.plan.after

    def lines(self) -> Iterator[str]:
        """Yields what a person reads, line by line."""
        yield from self.plan.table()
        yield from self.plan.details()
        for applied in self.applied:
            yield from applied_lines(applied)
        yield change_lines(self.before, self.after)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def report(self, path: str | Path) -> None:
        """Writes a page about the cut, which opens in any browser: widths, classes, costs, what stayed and why.

        Args:
            path: the file, of any name that ends in .html.

        Raises:
            UserError: the file cannot be written.
        """
        if Path(path).suffix != ".html":
            raise UserError(f"{path} must end in .html")
        write_page(path, [Subject(Path(path).name, type(self.model).__name__, self.facts, self._stored())])

    def _stored(self) -> dict[str, Any]:
        return {**run_provenance(dict(self._arguments)), **self.after.figures(), CUT: self.facts.to_dict()}

    def save(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        builder: str = "timm",
        kwargs: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes the model as one safe file that holds tensors and their structure, and no code.

        Args:
            path: file to write, of any name that ends in .safetensors; its folder is made.
                A model that was pruned several times is saved as cut from what it was before the first.
            name: where the dense model is a library's, its name there: `load_model(path)` then needs no model.
                Without it, `load_model(path, model=build())` shapes and fills the dense model that you build.
            builder, kwargs: of `name`: "timm" or "torchvision", and the arguments that the dense model was built with.
            class_names: what the logits stand for, in their order; without them, those that the model was loaded with,
                as long as it has as many logits.
            provenance: further JSON values to store.

        Raises:
            UserError: the file cannot be written, `name` builds another model, or `class_names` are not as many texts
                as the model has logits.
        """
        if Path(path).suffix != ".safetensors":
            raise UserError(f"{path} must end in .safetensors")
        check_writable(path)
        told = {**self._stored(), **(provenance or {})}
        cut_from = known_origin(self.model) or self._origin  # it may have been cut again, in place
        names = self._class_names(class_names)
        if name is None:
            kept = cut_from.kept_blocks
            save.save_module(path, self.model, cut_from.dense, provenance=told, kept_blocks=kept, class_names=names)
        else:
            _check_library(self.model, name, builder)
            spec = describe_model(name, builder=builder, kwargs=dict(kwargs or {})).keeping(cut_from.kept_blocks)
            save.save_model(path, self.model, dataclasses.replace(spec, class_names=names), provenance=told)

    def _class_names(self, given: Sequence[str] | None) -> tuple[str, ...]:
        """Returns the class names to save: those that are given, or those that still fit of those that are known."""
        if given is not None:
            _check_class_names(given)
        names = known_class_names(self.model) if given is None else tuple(given)
        sizes = _output_sizes(self.model, self._inputs)
        if not names or not sizes or any(len(names) in size[1:] for size in sizes):
            return names
        if given is None:  # the head is another one by now
            return ()
        raise UserError(f"class_names has {len(names)} names, but the model's output is {tuple(sizes[0])}")


@_with_plan_options
def prune(
    model: nn.Module,
    inputs: Inputs,
    *,
    plan: PruningPlan | str | Path | None = None,
    inplace: bool = False,
    steps: int = 1,
    between: Between | None = None,
    optimizer: Optimizer | None = None,
    recover: Collection[str] = (),
    calibration: CalibrationData = None,
    fusion_normalization: str = "source",
    fusion_masses: str = "uniform",
    distill_steps: int = DistillationRules.steps,
    distill_lr: float = DistillationRules.lr,
    mirror_calibration: bool = False,
    self_check: bool = False,
    **options: Any,
) -> Pruned:
    """Prunes a model: groups, classifies, scores and ranks its units, and cuts those that matter least.

    Args:
        model: any module, on the device of `inputs`; it is left as it was unless `inplace`.
        inputs: what the model takes: a tensor, a tuple of positional or a mapping of keyword arguments.
        plan: a plan, or its file, instead of a ratio or budget.
        inplace: cut `model` itself and spare the copy.
        steps: go to the ratio or budget in so many steps of equal size; each traces and scores anew what the last
            one left.
        between: (model, step) is called between two steps, from step 1 on, to finetune a little.
        optimizer: of `model`, with `inplace`: it goes on with the cut parameters, and its momenta are cut alike.
        recover: some of "fusion", "compensate", "bn", "distill": accuracy without labels, around each cut; all but the
            first look at `calibration`. Or ["auto"]: compensate, then distill while it pays.
        calibration: images (N, …) that recoveries look at, or a pair of images and labels (N,), which
            `allocate="calibrate"` needs. Of a model of several inputs: a mapping of keyword arguments. Every fifth is
            held out from the recoveries and judges them: a step that loses is undone.
        mirror_calibration: fit the calibration images' mirror images, too, (N, C, H, W) each: twice as many for
            nothing where left and right are alike, at twice the time and memory.
        fusion_normalization, fusion_masses, distill_steps, distill_lr: as on the command line.
        self_check: hold each cut model against the dense one with the removed channels at zero.
        **options: fields of `PlanOptions`: one of ratio=, macs=, params=, latency=; how units are scored and ranked.

    Returns:
        The pruned model, the plan, and what it cost before and costs now.

    Raises:
        UserError: as `plan`; an optimizer whose state cannot be cut; a cut model that computes something else, or that
            does not take a batch of `data`, whose branches of the forward code `inputs` do not take.
    """
    _check_call(model, plan, inplace, steps, between, optimizer)
    _check_recover(recover, calibration, mirror_calibration)
    asked = None if plan is not None else _plan_options(options)
    if asked is not None:
        _check_steps(asked, steps)
    batches = Batches(asked.data, asked.loss) if asked is not None and asked.data is not None else None
    asked = asked and asked.with_data(batches)
    calibrated = _calibration(calibration)
    fusion = FusionRules(fusion_normalization, fusion_masses)
    distillation = DistillationRules(distill_steps, lr=distill_lr)
    images = calibrated.images if calibrated else None
    recovery = Recovery.asked(recover, images, fusion, distillation, mirrored=mirror_calibration)
    inventory, origin = _run(take_inventory, model, inputs), origin_of(model)
    before = inventory.complexity
    _check_counter(asked, options, model, before)
    latency = measure_dense_latency(model, inputs, asked) if asked is not None and steps > 1 else None
    pruned = model if inplace else copy.deepcopy(model)

    check = {"self_check": self_check, "optimizer": optimizer, "batches": batches}
    if asked is None:
        assert plan is not None
        with eval_mode(pruned):
            tracer = options.get("tracer", "exact")
            planned = check_plan(pruned, inputs, _plan_of(plan, options), tracer, before=before)
            around = dataclasses.replace(recovery, importance=planned.scores)
            applied = [apply_plan(pruned, planned.graph, planned, inputs, around, **check)]
    else:
        costs = {"before": before, "latency": latency}
        around = {"calibration": calibrated, "recovery": recovery, "between": between}
        planned, applied = prune_in_steps(pruned, inputs, asked, steps, **costs, **around, **check)
    after = take_inventory(pruned, inputs)
    notes = (*planned.notes, *_unused(asked, recover, calibrated))
    whole = dataclasses.replace(planned, before=before, after=after.complexity, notes=notes)
    origin = origin.keeping(whole.kept_blocks)
    remember_origin(pruned, origin)
    remember_class_names(pruned, known_class_names(model))
    told = _told(options, recover=sorted(recover), steps=steps)
    errors = applied[-1].errors if len(applied) == 1 else {}  # of one small step they would say nothing of the whole
    facts = gather_facts(inventory, after, whole, errors=errors, asked=_asked(asked, plan, steps))
    return Pruned(pruned, whole, applied, facts, origin, told, without_data(inputs))


def _costs(model: nn.Module, inputs: Inputs) -> Complexity:
    """MACs and params of a model."""
    return _run(count_complexity, model, inputs)


def _run(count: Callable[[nn.Module, Inputs], _Counted], model: nn.Module, inputs: Inputs) -> _Counted:
    """Counts something of a model: the first thing that runs it.

    Raises:
        UserError: the model does not take the inputs.
    """
    if not isinstance(inputs, (Tensor, tuple, Mapping)):
        kind = type(inputs).__name__
        raise UserError(f"inputs is {kind}: give a tensor, a tuple of positional or a mapping of keyword arguments")
    if not num_items(inputs) and any(tensor.dim() for tensor in tensors_in(inputs)):
        raise UserError("inputs is an empty batch: give at least one item")
    try:
        return count(model, inputs)
    except UserError:
        raise
    except REFUSALS as error:
        raise UserError(f"the model does not take these inputs: {first_line(error)}") from error


def _check_call(
    model: nn.Module, plan: object, inplace: bool, steps: int, between: Between | None, optimizer: Optimizer | None
) -> None:
    """Raises a UserError for arguments of `prune` that contradict each other."""
    check_unwrapped(model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps = {steps!r} is not a whole number of at least 1")
    if plan is not None and steps > 1:
        raise UserError("plan= is applied at once: leave out steps")
    if between is not None and steps == 1:
        raise UserError("between= is called between steps: give steps, 2 or more")
    if not isinstance(optimizer, (Optimizer, NoneType)):
        raise UserError(
            f"optimizer is {type(optimizer).__name__}: give the torch.optim.Optimizer that trains the model"
        )
    if optimizer is not None and not inplace:
        raise UserError("optimizer= holds the parameters of the model that you gave: prune that one, with inplace=True")


def _check_recover(recover: Collection[str], calibration: object, mirrored: bool) -> None:
    """Raises a UserError for what is no list of recoveries, one that lacks the images to look at, or mirrors none."""
    if isinstance(recover, str):
        steps = recover.replace(",", " ").split()
        raise UserError(f"recover={recover!r} is one text: give a list, recover={steps}")
    known = (*RECOVERIES, AUTO)
    unknown = [step for step in recover if step not in known] if isinstance(recover, Collection) else recover
    if unknown or not isinstance(recover, Collection):
        raise UserError(f"recover = {unknown} is no list of {', '.join(known)}")
    if AUTO in recover and len(recover) > 1:
        raise UserError(f'recover={list(recover)}: "auto" chooses the steps, give recover=["auto"]')
    blind = [step for step in known if step in recover and looks_at_images([step])]
    if blind and calibration is None:
        raise UserError(f"recover={blind} looks at images: give calibration=, a tensor of them (N, …)")
    if mirrored and not blind:
        raise UserError("mirror_calibration=True belongs to recover=[…] with compensate, bn, distill or auto")


def _unused(asked: PlanOptions | None, recover: Collection[str], calibration: Calibration | None) -> Iterator[str]:
    """Lines about arguments that were given and that nothing needs."""
    scored_blindly = asked is not None and statistic_of(asked.criterion, has_data=asked.data is not None) is None
    if asked is not None and asked.data is not None and scored_blindly:
        yield f"data is not scored on: criterion {asked.criterion!r} needs none"
    searches = asked is not None and asked.allocate == "calibrate"
    if calibration is not None and not looks_at_images(recover) and not searches:
        yield f"calibration is not looked at: neither recover={list(recover)} nor allocate needs it"


def _check_class_names(names: Sequence[str]) -> None:
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or not names:
        raise UserError('class_names is a list of texts in the order of the logits, such as ["ant", "bee"]')


def _output_sizes(model: nn.Module, inputs: Inputs) -> list[torch.Size]:
    """The sizes of the tensors that a model returns; none where it needs data to run."""
    trial = Trial(shape_copy(model), inputs)
    try:
        trial.run_dense()
    except ASKS_FOR_DATA:
        return []
    return trial.shapes


def _check_library(model: nn.Module, name: str, builder: str) -> None:
    """Raises a UserError for a name in a library that the model's class is not from: both have a resnet18."""
    home = type(model).__module__.partition(".")[0]
    if home in ("timm", "torchvision") and builder in ("timm", "torchvision") and home != builder:
        raise UserError(f"{name} of {builder} is another model: this one is {home}'s, save it with builder={home!r}")


def _check_steps(options: PlanOptions, steps: int) -> None:
    if steps == 1:
        return
    if options.data is not None and iter(options.data) is options.data:
        raise UserError(
            f"data ends after one pass, and steps={steps} goes over it {steps} times: give a list or a loader"
        )
    if options.allocate != "uniform":
        raise UserError(f"allocate={options.allocate!r} searches one plan: leave out steps")


def _plan_options(options: Mapping[str, Any]) -> PlanOptions:
    known = {f.name for f in dataclasses.fields(PlanOptions)}
    for name in options:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {similar[0]}=?" if similar else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    return PlanOptions(**options)


def _check_counter(asked: PlanOptions | None, options: Mapping[str, Any], model: nn.Module, before: Complexity) -> None:
    """Raises a UserError where a budget is in MACs that say little; a counter that was named is meant."""
    if asked is not None and "macs_counter" not in options:
        check_counter(asked, model, before, 'macs_counter="{}"')


def _plan_of(plan: PruningPlan | str | Path, options: Mapping[str, Any]) -> PruningPlan:
    others = sorted(options.keys() - {"tracer"})
    if others:
        raise UserError(f"plan= says what goes: leave out {', '.join(others)}")
    return plan if isinstance(plan, PruningPlan) else load_plan(plan)


def _calibration(given: CalibrationData) -> Calibration | None:
    if given is None or isinstance(given, Calibration):
        return given
    if isinstance(given, (Tensor, Mapping)):
        return Calibration(given)
    is_pair = isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Tensor)
    if is_pair and isinstance(given[0], (Tensor, tuple, Mapping)):
        return Calibration(*given)
    raise UserError(
        "calibration= is a tensor of images (N, …), a mapping of keyword arguments of N items, or a pair of either and "
        "labels (N,)"
    )


def _asked(asked: PlanOptions | None, plan: object, steps: int) -> dict[str, Any]:
    """What was asked for, as a page shows it."""
    told = asked.told() if asked else {"plan": str(plan) if isinstance(plan, (str, Path)) else "a plan"}
    return told | ({"steps": steps} if steps > 1 else {})


def _told(options: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments as provenance keeps them: data are left out, functions are named."""
    told = {name: value for name, value in {**options, **more}.items() if name != "data"}
    return {name: getattr(value, "__name__", value) for name, value in told.items()}
