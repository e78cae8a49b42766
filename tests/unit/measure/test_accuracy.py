"""Accuracy: exact counts whatever the batches, the classes and the model's mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.accuracy import measure_accuracy

# Six images whose logits are their own pixels: (rank of the label among seven classes) is 0, 0, 1, 4, 5, 6.
RANKS = (0, 0, 1, 4, 5, 6)
LABELS = torch.tensor([3, 0, 6, 2, 1, 5])


class Readout(nn.Module):
    """Logits are given, and the mode in which they were asked for is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return images.flatten(1)


def logits_with_ranks(num_classes: int = 7) -> Tensor:
    logits = torch.zeros(len(RANKS), num_classes)
    for row, (rank, label) in enumerate(zip(RANKS, LABELS.tolist(), strict=True)):
        others = [c for c in range(num_classes) if c != label]
        order = [*others[:rank], label, *others[rank:]]
        logits[row, order] = torch.arange(num_classes, 0, -1).float()
    return logits


def batches(logits: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_top1_top5_and_loss_do_not_depend_on_the_batches(size: int):
    logits = logits_with_ranks()
    result = measure_accuracy(Readout(), batches(logits, LABELS, size), "cpu")
    assert (result.top1, result.top5, result.num_images) == (2 / 6, 4 / 6, 6)
    # a label of rank r has logit 7 - r
    losses = [math.log(sum(math.exp(k) for k in range(1, 8))) - (7 - rank) for rank in RANKS]
    assert result.loss == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert result.images_per_second > 0


def test_with_fewer_than_five_classes_every_label_is_among_the_top_five():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    result = measure_accuracy(Readout(), [(logits, torch.tensor([0, 0]))], "cpu")
    assert (result.top1, result.top5) == (0.5, 1.0)


@pytest.mark.parametrize("training", [True, False])
def test_model_is_evaluated_in_eval_mode_and_left_as_it_was(training: bool):
    model = Readout().train(training)
    measure_accuracy(model, batches(logits_with_ranks(), LABELS, 3), "cpu")
    assert model.modes == [False, False]
    assert model.training is training


def test_autocast_runs_the_forward_in_the_given_type():
    seen = []

    class Linear(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            output = super().forward(images)
            seen.append(output.dtype)
            return output

    loader = [(torch.ones(2, 4), torch.tensor([0, 1]))]
    measure_accuracy(Linear(4, 3), loader, "cpu", amp_dtype=torch.bfloat16)
    measure_accuracy(Linear(4, 3), loader, "cpu")
    assert seen == [torch.bfloat16, torch.float32]


def test_no_images_is_a_user_error():
    with pytest.raises(UserError, match="no images"):
        measure_accuracy(Readout(), [], "cpu")
