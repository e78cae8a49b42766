"""What the examples share: flags, training, pruning, and the table at the end.

A data set is (inputs, labels): one tensor each, batch first. Models give logits of shape (B, classes, …) for labels of
shape (B, …), as cross entropy takes them; labels of -100 do not count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isomorphic as iso
from isomorphic.commands import flags
from isomorphic.measure.complexity import count_complexity, format_macs, format_params
from isomorphic.pruning.scoring import CRITERIA
from isomorphic.pruning.sparsify.regularizers import KINDS

DataSet = tuple[Tensor, Tensor]
UNLABELLED = -100  # what cross entropy ignores
BATCH_SIZE = 64


def parse_args(description: str | None, *, epochs: int, sparsify_reg: float) -> argparse.Namespace:
    """The flags of every example; seeds torch, too.

    Args:
        description: the first line is shown by --help.
        epochs, sparsify_reg: defaults of these flags.
    """
    parser = flags.make_parser((description or "").partition("\n")[0])
    add = parser.add_argument
    add("--pruning-ratio", type=flags.ratio, default=0.5, help="share of the width to remove")
    criterion_help = "importance criterion (default: taylor; after sparse training group_norm or bn_scale)"
    add("--pruning-type", choices=tuple(CRITERIA), help=criterion_help)
    add("--sparsify", choices=("none", *KINDS), default="none", help="sparse training before the cut")
    add("--sparsify-reg", type=flags.non_negative, default=sparsify_reg, help="its strength")
    add("--epochs", type=flags.positive_int, default=epochs, help="of the training, and of the finetuning")
    add("--seed", type=flags.non_negative_int, default=0, help="of the data, the weights and the order of batches")
    args = parser.parse_args()
    if args.pruning_type is None:
        after = {"none": "taylor", "bn": "bn_scale"}
        args.pruning_type = after.get(args.sparsify, "group_norm")
    torch.manual_seed(args.seed)
    return args


def batches(data: DataSet) -> list[DataSet]:
    """The data set once, in a random order."""
    inputs, labels = data
    return [(inputs[chosen], labels[chosen]) for chosen in torch.randperm(len(inputs)).split(BATCH_SIZE)]


def train(
    model: nn.Module,
    data: DataSet,
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.01,
    regularize: Callable[[int], object] | None = None,
) -> None:
    """AdamW under a learning rate that rises and falls once; where `regularize` adds to the gradients, SGD.

    Adam's steps are as long for small gradients as for large ones, so that a penalty which tells strong channels from
    weak ones would hit all of them.
    """
    if regularize is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * len(batches(data)))
    model.train()
    for epoch in range(epochs):
        for inputs, labels in batches(data):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if regularize is not None:
                regularize(epoch)
            optimizer.step()
            schedule.step()


def sparsify(model: nn.Module, data: DataSet, args: argparse.Namespace) -> None:
    """Under --sparsify: as many epochs again, in which weak channels shrink as wholes."""
    regularize = iso.sparsify(model, iso.trace(model, data[0][:2]), kind=args.sparsify, reg=args.sparsify_reg)
    train(model, data, epochs=args.epochs, lr=0.05, regularize=regularize)


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet) -> float:
    """Share of the labels that the model gets right, in percent."""
    inputs, labels = data
    model.eval()
    guesses = torch.cat([model(part).argmax(1) for part in inputs.split(BATCH_SIZE)])
    return 100 * (guesses == labels)[labels != UNLABELLED].float().mean().item()


def prune(model: nn.Module, data: DataSet, ratio: float, criterion: str) -> dict[str, tuple[int, int]]:
    """Removes `ratio` of the width of each isomorphism class, in place.

    Returns:
        Channels before and after, by the name of the parameter that makes them; whole heads, which stay, are left out.
    """
    scored = CRITERIA[criterion].statistic is not None
    options = {"criterion": criterion, "data": batches(data) if scored else None}
    if criterion == "group_norm":  # DepGraph's ranking
        options["normalizer"] = "top"
    plan = iso.prune(model, data[0][:2], ratio=ratio, inplace=True, **options).plan
    groups = [group for group in plan.graph.groups if not (group.sections and group.sections.are_units)]
    return {group.name: (group.num_units, len(plan.kept[group.name])) for group in groups}


@dataclass
class Report:
    """Lines of the final table: what a model costs and how often it is right at each stage."""

    example: Tensor
    validation: DataSet
    lines: list[str] = field(default_factory=list)

    def measure(self, stage: str, model: nn.Module) -> None:
        """Adds a line for the model as it stands."""
        cost = count_complexity(model, self.example)
        top1 = accuracy(model, self.validation)
        self.lines.append(f"{stage:>10}{format_params(cost.params):>12}{format_macs(cost.macs_exact):>12}{top1:>12.2f}")

    def show(self, widths: dict[str, tuple[int, int]]) -> None:
        """Prints widths before and after, then the table."""
        for name, (before, after) in widths.items():
            print(f"{name:>40}{before:>6} => {after}")
        print(f"{'':>10}{'params':>12}{'MACs':>12}{'accuracy':>12}", *self.lines, sep="\n")
