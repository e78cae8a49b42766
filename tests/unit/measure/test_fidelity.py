"""Fidelity: agreement, KL and the error of the logits, held against a recount by hand, in one process and in two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from isomorphic.data.loaders import Batch
from isomorphic.errors import UserError
from isomorphic.measure.fidelity import Fidelity, measure_fidelity
from isomorphic.measure.results import fidelity_line, fidelity_results
from isomorphic.processes import distributed
from tests.processes import run_together_once


class Offset(nn.Module):
    """Logits are the images' own pixels, and a number more in one class."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.tensor([more, 0.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return images.flatten(1) + self.more


IMAGES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, -1.0], [1.0, 5.0, 1.0], [0.0, 0.0, 4.0], [0.1, 0.4, 0.2]])
MORE = 1.0


def by_hand(images: Tensor, more: float) -> tuple[float, float, float]:
    """Agreement, KL and the error of the logits, number by number."""
    same = kl = error = norm = 0.0
    for row in images.tolist():
        pruned = [row[0] + more, *row[1:]]
        same += row.index(max(row)) == pruned.index(max(pruned))
        p, q = ([math.exp(x) / sum(math.exp(y) for y in logits) for x in logits] for logits in (row, pruned))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        error += sum((a - b) ** 2 for a, b in zip(pruned, row, strict=True))
        norm += sum(b**2 for b in row)
    return same / len(images), kl / len(images), math.sqrt(error / norm)


def figures(found: Fidelity) -> tuple[float, float, float]:
    return found.agreement, found.kl, found.logits_error


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_recount_by_hand_says_the_same_whatever_the_batches(size: int):
    pruned, dense = Offset(MORE).train(), Offset(0.0)
    found = measure_fidelity(pruned, dense, IMAGES.split(size))
    assert figures(found) == pytest.approx(by_hand(IMAGES, MORE), rel=1e-6)
    assert found.agreement == 0.6 and found.num_images == 5 and pruned.training, "two of the five are turned over"


def test_a_model_is_wholly_faithful_to_itself():
    found = measure_fidelity(Offset(0.5), Offset(0.5), [(IMAGES, torch.zeros(5))])
    assert figures(found) == (1.0, 0.0, 0.0)


def test_each_model_gets_the_images_that_were_prepared_for_it():
    pairs = [Batch([part, part + 0.25], torch.zeros(len(part))) for part in IMAGES.split(2)]  # type: ignore[arg-type]
    found = measure_fidelity(Offset(MORE), Offset(0.0), pairs)
    dense = IMAGES + 0.25
    error = (IMAGES + torch.tensor([MORE, 0, 0]) - dense).norm() / dense.norm()
    assert found.logits_error == pytest.approx(error.item(), rel=1e-6)


def test_images_that_cannot_be_read_are_named_and_not_counted():
    empty = Batch(torch.empty(0), torch.empty(0, dtype=torch.long), ["b.png: not an image"])
    batches = [Batch(IMAGES[:2], torch.zeros(2), ["a.png: cut short"]), empty]
    found = measure_fidelity(Offset(MORE), Offset(0.0), batches)
    assert (found.num_images, found.unreadable) == (2, ("a.png: cut short", "b.png: not an image"))
    assert figures(found) == pytest.approx(by_hand(IMAGES[:2], MORE), rel=1e-6)
    with pytest.raises(UserError, match="no images to compare the models on: cannot read image b.png: not an image"):
        measure_fidelity(Offset(MORE), Offset(0.0), [empty])
    with pytest.raises(UserError, match="no images to compare the models on: there are none"):
        measure_fidelity(Offset(MORE), Offset(0.0), [])


@pytest.mark.parametrize(("width", "told"), [(2, r"\(5, 3\) and \(5, 2\)"), (None, r"\(5, 3\) and tuple")])
def test_models_of_other_classes_are_one_line(width: int | None, told: str):
    class Other(nn.Module):
        def forward(self, images: Tensor) -> object:
            return images[:, :width] if width else (images, images)

    with pytest.raises(UserError, match=f"the models give {told}: .* logits .* of the same classes"):
        measure_fidelity(Offset(MORE), Other(), [IMAGES])


def test_what_is_printed_and_written():
    found = Fidelity(0.93125, 0.03124, 0.12344, 400, ("a", "b"))
    assert fidelity_line(found, "deit") == (
        "Fidelity to deit: top-1 agrees on 93.12% of 400 images, KL 0.0312 nats, relative error of the logits 0.1234"
    )
    assert fidelity_results(found) == {
        "agreement": 93.125,
        "kl": 0.03124,
        "logits_error": 0.12344,
        "fidelity_images": 400,
        "fidelity_unreadable": 2,
    }


def shared() -> list[object]:
    """What one of several processes finds, each with images of its own."""
    distributed.init("cpu")
    mine = IMAGES[distributed.rank() :: distributed.world_size()]
    names = [f"{distributed.rank()}.png: cut short"]
    found = measure_fidelity(Offset(MORE), Offset(0.0), [Batch(mine, torch.zeros(len(mine)), names)])
    distributed.shutdown()
    return [*figures(found), found.num_images, list(found.unreadable)]


def test_two_processes_find_what_one_does(tmp_path_factory: pytest.TempPathFactory):
    outcomes = run_together_once(tmp_path_factory, "tests.unit.measure.test_fidelity", {"shared": 2})["shared"]
    for outcome in outcomes:
        assert outcome.status == 0, outcome.err
        assert outcome.value[:3] == pytest.approx(by_hand(IMAGES, MORE), rel=1e-6)
        assert outcome.value[3:] == [5, ["0.png: cut short", "1.png: cut short"]]
