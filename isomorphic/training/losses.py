"""Training losses: cross-entropy and two ways of learning from a teacher.

A student gives logits (N, C), or a pair of them where it has a distillation token: the class head's and the
distillation head's. Labels are class indices (N,) or soft labels (N, C), as mixup and cutmix make them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from isomorphic.training.recipe import LossRecipe

Outputs = Tensor | tuple[Tensor, Tensor]
# (the student's outputs, labels, the teacher's logits (N, C) if there is one) → scalar
Objective = Callable[[Outputs, Tensor, Tensor | None], Tensor]


def hard_distillation(
    outputs: Outputs, labels: Tensor, teacher_logits: Tensor, *, alpha: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """(1 − α) · CE(class head, labels) + α · CE(distillation head, argmax of the teacher).

    Hard-label distillation of DeiT (Touvron et al. 2021, eq. 3), both terms smoothed as the paper's recipe has
    it. A student with one head learns both terms with that one.
    """
    class_logits, token_logits = _heads(outputs)
    taught = teacher_logits.argmax(dim=1)
    learned = F.cross_entropy(class_logits, labels, label_smoothing=label_smoothing)
    copied = F.cross_entropy(token_logits, taught, label_smoothing=label_smoothing)
    return (1 - alpha) * learned + alpha * copied


def soft_distillation(
    outputs: Outputs,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    tau: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 − α) · CE(class head, labels) + α · τ² · KL(teacher / τ ‖ distillation head / τ).

    Soft distillation (Hinton et al. 2015; DeiT's eq. 2). The divergence is the mean over images of its sum over
    classes, as in timm; DeiT's published code divides by the number of classes as well.
    """
    class_logits, token_logits = _heads(outputs)
    learned = F.cross_entropy(class_logits, labels, label_smoothing=label_smoothing)
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (token_logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - alpha) * learned + alpha * tau**2 * divergence


def build_objective(recipe: LossRecipe) -> Objective:
    """The recipe's loss; without a teacher's logits it is the cross-entropy of the class head alone."""

    def objective(outputs: Outputs, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        smoothing, alpha = recipe.label_smoothing, recipe.distillation_alpha
        if teacher_logits is None or recipe.distillation == "none":
            return F.cross_entropy(_heads(outputs)[0], labels, label_smoothing=smoothing)
        if recipe.distillation == "hard":
            return hard_distillation(outputs, labels, teacher_logits, alpha=alpha, label_smoothing=smoothing)
        tau = recipe.distillation_tau
        return soft_distillation(outputs, labels, teacher_logits, alpha=alpha, tau=tau, label_smoothing=smoothing)

    return objective


@contextlib.contextmanager
def separate_heads(student: nn.Module, enabled: bool) -> Iterator[None]:
    """While training with a teacher, a student with a distillation token gives both heads' logits.

    Afterwards it averages them again, as for every other use. Students without a token are left alone.
    """
    switch = getattr(student, "set_distilled_training", None)
    if switch is None:
        yield
        return
    switch(enabled)
    try:
        yield
    finally:
        switch(False)


def _heads(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Logits of the class head and of the distillation head, in fp32: the same where there is one head."""
    class_logits, token_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    return class_logits.float(), token_logits.float()
