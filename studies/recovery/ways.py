"""Ways to cut a model and to recover it, measured for studies.recovery on one dense model.

Criterion and budgets are those of prune.py: Taylor on 10 batches of 64 training images, the paper's counter. Recoveries
and the search for an allocation look at the first 8 of these batches. Accuracy is top-1 on the 360 validation images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from isomorphic.checkpoints.open import open_model
from isomorphic.data.loaders import build_scoring_loader
from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import eval_transform
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.complexity import count_complexity
from isomorphic.models import example_inputs
from isomorphic.pruning.apply import Recovery, apply_plan
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.planning import Calibration, ScoredModel, score_model
from isomorphic.pruning.ranking.allocation import allocate
from isomorphic.pruning.ranking.budget import plan_for_budget, shared_ratios
from isomorphic.pruning.ranking.ranker import Ratios
from isomorphic.pruning.recovery.compensation import CutLayers, compensate, solvable_layers
from isomorphic.pruning.recovery.fusion import FusionRules
from studies.recovery.models import BATCH, CALIBRATION_BATCHES, SCORING_BATCHES, dense_file
from studies.recovery.tables import ONLY_HIDDEN, RecoveryRow

CPU = torch.device("cpu")

# recoveries by what prune.py takes for them; the other ways are not to be had there
FLAGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "compensate": ("compensate",),
    "fusion, source": ("fusion",),
    "fusion, mass": ("fusion",),
    "bn": ("bn",),
    "compensate + bn": ("compensate", "bn"),
}


@dataclass(frozen=True)
class Subject:
    """A dense model with all that its cuts start from."""

    family: str
    seed: int
    scored: ScoredModel
    calibration: Calibration
    validation: Calibration

    @property
    def model(self) -> nn.Module:
        return self.scored.model

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())

    @property
    def dense_macs(self) -> int:
        return count_complexity(self.model, self.scored.inputs).macs_paper

    def row(self, table: str, share: float, allocation: str, recovery: str, model: nn.Module) -> RecoveryRow:
        macs = count_complexity(model, self.scored.inputs).macs_paper
        top1 = 100 * measure_accuracy(model, self.validation.batches(BATCH), CPU).top1
        row = RecoveryRow(table, self.family, self.seed, share, allocation, recovery, macs, top1)
        return row._replace(loss=self.loss(model))

    def loss(self, model: nn.Module) -> float:
        """On the calibration images."""
        return measure_accuracy(model, self.calibration.batches(BATCH), CPU).loss


def open_subject(folder: Path, family: str, seed: int) -> Subject:
    """Loads, traces and scores a dense model that was trained before."""
    model, spec = open_model(str(dense_file(folder, family, seed)))
    model.eval()
    source, transform, inputs = DataSource("digits"), eval_transform(spec.preprocessing), example_inputs(spec, CPU)
    training = build_dataset(source, "train", transform)
    batches = list(build_scoring_loader(training, BATCH, SCORING_BATCHES, 0, CPU, seed=seed))
    validation = build_dataset(source, "val", transform)
    images, labels = zip(*(validation[i] for i in range(len(validation))), strict=True)  # pyright: ignore
    options = PlanOptions(macs="50%", criterion="taylor", data=batches, seed=seed)
    first = (torch.cat(parts) for parts in zip(*batches[:CALIBRATION_BATCHES], strict=True))
    return Subject(
        family,
        seed,
        score_model(model, inputs, options),
        Calibration(*first),
        Calibration(torch.stack(images), torch.tensor(labels)),
    )


def cut_by(subject: Subject, plan: PruningPlan, way: str) -> nn.Module | None:
    """A copy of the model, cut by `plan` and recovered; None where nothing of it can be merged."""
    model, images = copy.deepcopy(subject.model), subject.calibration.images
    if way in ("mean shift", ONLY_HIDDEN):
        compensate_partly(subject, model, plan, way)
        return model
    rules = FusionRules("mass" if way == "fusion, mass" else "source")
    recovery = Recovery(frozenset(FLAGS[way]), images, rules)
    recovered = apply_plan(model, subject.scored.graph, plan, subject.scored.inputs, recovery)
    return None if recovered.fusion and not recovered.fusion.merged else model


def compensate_partly(subject: Subject, model: nn.Module, plan: PruningPlan, way: str) -> None:
    """Cuts `model` and compensates its biases alone, or what reads units that are no residual stream."""
    made = CutLayers.of(model, subject.scored.graph, plan)
    images = subject.calibration.images
    cut(model, subject.scored.graph, plan)
    if way == "mean shift":
        compensate(subject.model, model, images, made, ridges=())
    else:
        streams = {name for group in subject.scored.graph.groups if is_stream(group) for name in readers(group)}
        layers = [name for name in solvable_layers(model, images, made) if name not in streams]
        compensate(subject.model, model, images, made, layers=layers)


def is_stream(group: CoupledGroup) -> bool:
    """Whether several layers add to the group's units, as they do to a residual stream."""
    return len({node.module for node in group.nodes if node.side == "out" and node.kind in ("conv", "linear")}) > 1


def readers(group: CoupledGroup) -> set[str]:
    return {member.module for member in group.members if member.tensor == "weight" and member.dim == 1}


def is_hidden(group: CoupledGroup) -> bool:
    """Whether its units are the hidden ones of an MLP."""
    return ".mlp.fc1." in group.name


def hidden_plan(subject: Subject, share: float) -> PruningPlan:
    """Removes a share of all hidden units of MLPs, and nothing else."""
    ranked = subject.scored.ranker.plan(Ratios(share))
    groups = subject.scored.graph.groups
    return PruningPlan({g.name: ranked.kept[g.name] if is_hidden(g) else tuple(range(g.num_units)) for g in groups})


def budget_plan(subject: Subject, share: float, ranking: str = "isomorphic") -> PruningPlan:
    """Leaves a share of the MACs; what is open among stream, heads, head dims and hidden units is all ranked."""
    ranker, target = subject.scored.ranker.with_ranking(ranking), round(share * subject.dense_macs)
    return plan_for_budget(ranker, lambda r: shared_ratios(r, None, None), subject.scored.cost, "macs_paper", target)


def allocated_plan(subject: Subject, share: float, way: str) -> PruningPlan:
    """Of the best allocation that is found for one way to recover."""

    def loss_of(plan: PruningPlan) -> float:
        model = cut_by(subject, plan, way)
        assert model
        return subject.loss(model)

    options = {
        "heads": None,
        "head_dims": None,
        "evaluations": PlanOptions.allocation_evaluations,
        "seed": subject.seed,
    }
    target = round(share * subject.dense_macs)
    return allocate(subject.scored.ranker, subject.scored.cost, "macs_paper", target, loss_of, **options).plan
