"""Score distributions by isomorphism class, as figure 4 of the paper (Fang et al., ECCV 2024) shows them.

What a global ranking compares are these distributions: where one lies far from the others, all of a class goes first,
or last, whatever its units are worth.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from isomorphic.pruning.options import PlanOptions
from isomorphic.pruning.planning import score_model
from isomorphic.pruning.report import name_groups
from studies.claim.subjects import Subject

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH, HEIGHT = 8.0, 0.45  # inches: of the figure, and of a class
SMALLEST = 1e-12  # share of the median score that is drawn


def draw_scores(subject: Subject, criterion: str, title: str, path: Path) -> None:
    """Draws the scores of all units as they are ranked, a box a class, on a logarithmic axis.

    Args:
        subject: whose units.
        criterion: how they are scored.
        title: above the figure.
        path: of the PNG.
    """
    options = PlanOptions(macs="50%", criterion=criterion, data=subject.data, loss=subject.loss)
    scored = score_model(subject.model, subject.inputs, options)
    classes: dict[int, list] = {}
    for group in scored.graph.groups:
        classes.setdefault(scored.graph.classes[group.name], []).append(group)
    names = [name_groups(groups) for groups in classes.values()]
    scores = [torch.cat([scored.normalized[g.name].flatten() for g in groups]) for groups in classes.values()]
    least = SMALLEST * float(torch.cat(scores).median())
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + HEIGHT * len(names)))
    axes.boxplot(
        [s.clamp_min(least).tolist() for s in scores], orientation="horizontal", whis=(5, 95), showfliers=False
    )
    axes.set_yticks(range(1, len(names) + 1), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"{criterion} score, as it is ranked (box: quartiles, whiskers: 5 and 95%)")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
