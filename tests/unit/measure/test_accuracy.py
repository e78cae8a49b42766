"""Accuracy: exact counts whatever the batches, the classes and the model's mode."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isomorphic.data.loaders import Batch
from isomorphic.errors import UserError
from isomorphic.measure import accuracy, precision
from isomorphic.measure.accuracy import measure_accuracy
from isomorphic.measure.precision import Auto

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


@pytest.mark.parametrize(("farthest", "dtypes"), [(1.0, {None, torch.bfloat16}), (-1.0, {None})])
def test_bf16_is_taken_where_answers_are_alike(monkeypatch, farthest: float, dtypes: set[torch.dtype | None]):
    """The second batch is compared, and whatever comes of that, every image counts once."""
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: True)
    monkeypatch.setattr(accuracy, "KL_ALIKE", farthest)
    torch.manual_seed(0)
    model = nn.Linear(4, 6)
    loader = [(torch.randn(8, 4), torch.arange(8) % 6) for _ in range(3)]
    full = measure_accuracy(model, loader, "cpu")
    found = measure_accuracy(model, loader, "cpu", amp_dtype=Auto(10**12))
    assert {None, found.amp_dtype} == dtypes and full.amp_dtype is None
    assert found.num_images == 24 and found.loss == pytest.approx(full.loss, abs=1e-2)
    assert (found.loss == full.loss) is (found.amp_dtype is None)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_come_in_the_memory_format_that_was_asked_for(channels_last: bool):
    seen = []

    class Formats(Readout):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return images.mean((2, 3))

    loader = [(torch.ones(2, 3, 4, 4), torch.tensor([0, 1]))]
    measure_accuracy(Formats(), loader, "cpu", channels_last=channels_last)
    assert seen == [channels_last]


def test_unreadable_images_are_named_and_count_for_nothing():
    model, logits = Readout(), logits_with_ranks()
    nothing = Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["d: x", "b: x"])
    result = measure_accuracy(
        model, [Batch(logits[:4], LABELS[:4], ["c: x"]), nothing, Batch(logits[4:], LABELS[4:])], "cpu"
    )
    whole = measure_accuracy(Readout(), [(logits, LABELS)], "cpu")
    assert (result.top1, result.top5, result.num_images) == (2 / 6, 4 / 6, 6)
    assert result.loss == pytest.approx(whole.loss, rel=1e-12)
    assert result.unreadable == ("b: x", "c: x", "d: x") and whole.unreadable == ()
    assert len(model.modes) == 2, "the model is not asked about no images"


def test_no_images_is_a_user_error():
    with pytest.raises(UserError, match="no images to evaluate on: the validation set is empty"):
        measure_accuracy(Readout(), [], "cpu")
    nothing = Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["b: x", "a: x"])
    with pytest.raises(UserError, match="no images to evaluate on: cannot read 2 images: a: x; b: x$"):
        measure_accuracy(Readout(), [nothing], "cpu")
