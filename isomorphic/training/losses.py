"""Training losses: cross-entropy, hard and soft distillation.

A student returns logits (N, C), or with a distillation token a pair of them: of the class head and of the distillation
head. Labels are class indices (N,), or soft labels (N, C) after mixup and cutmix.
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
    outputs: Outputs, labels: Tensor, teacher_logits: Tensor, *, alpha: float, label_smoothing: float
) -> Tensor:
    """Returns (1 − α) · CE(class head, labels) + α · CE(distillation head, argmax of the teacher).

    This is the hard-label distillation of DeiT (Touvron et al. 2021, eq. 3), with label smoothing in both terms as in
    the paper's recipe. A student with one head uses it for both terms.
    """
    class_logits, token_logits = _heads(outputs)
    taught = teacher_logits.argmax(dim=1)
    learned = F.cross_entropy(class_logits, labels, label_smoothing=label_smoothing)
    copied = F.cross_entropy(token_logits, taught, label_smoothing=label_smoothing)
    return (1 - alpha) * learned + alpha * copied


def soft_distillation(
    outputs: Outputs, labels: Tensor, teacher_logits: Tensor, *, alpha: float, tau: float, label_smoothing: float
) -> Tensor:
    """Returns (1 − α) · CE(class head, labels) + α · τ² · KL(teacher / τ ‖ distillation head / τ).

    This is soft distillation (Hinton et al. 2015; DeiT's eq. 2). The divergence is summed over classes and averaged
    over images, as in timm; DeiT's published code also divides by the number of classes.
    """
    class_logits, token_logits = _heads(outputs)
    learned = F.cross_entropy(class_logits, labels, label_smoothing=label_smoothing)
    student, teacher = (F.log_softmax(logits.float() / tau, dim=1) for logits in (token_logits, teacher_logits))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - alpha) * learned + alpha * tau**2 * divergence


def build_objective(recipe: LossRecipe) -> Objective:
    """Returns the recipe's loss; without a teacher's logits it is the cross-entropy of the class head."""

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
    """Returns a context in which, if `enabled`, a student with a distillation token returns both heads' logits.

    Outside of it the student averages them, as it does in evaluation. Students without a token do not change.
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
    """Returns the logits of the class head and of the distillation head, in fp32; a single head counts as both."""
    class_logits, token_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    return class_logits.float(), token_logits.float()
