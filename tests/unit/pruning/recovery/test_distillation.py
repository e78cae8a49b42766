"""Distillation: nearer to the dense model on images that it has not seen, the same every time, nothing else changed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.processes import distributed
from isomorphic.pruning.cutting.cut import cut
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery import distillation
from isomorphic.pruning.recovery.distillation import (
    DistillationRules,
    Features,
    Outputs,
    augmented,
    choose_features,
    distill,
)
from isomorphic.pruning.recovery.held_out import Judge
from tests.processes import run_together
from tests.unit.pruning.conftest import BatchNormCnn
from tests.unit.pruning.recovery.test_compensation import Cut, cut_in, first_half, random, randomized

IMAGES = random(40, 3, 32, 32, seed=3)
OTHERS = random(40, 3, 32, 32, seed=4)
RULES = DistillationRules(steps=30, batch_size=16, lr=3e-2)


@pytest.fixture(scope="module")
def subject() -> Cut:
    torch.manual_seed(0)
    return cut_in(randomized(BatchNormCnn()), IMAGES, first_half)


def distilled(subject: Cut, rules: DistillationRules = RULES, images: Tensor = IMAGES, **options: Any) -> Any:
    model = copy.deepcopy(subject.pruned)
    judge = Judge(subject.dense, OTHERS)
    found = distill(subject.dense, model, images, rules, judge, columns=subject.layers.columns, **options)
    return model, found, judge


def test_the_cut_model_comes_nearer_on_images_that_it_has_not_seen(subject: Cut):
    model, found, judge = distilled(subject)
    assert found.before == judge.loss_of(subject.pruned) and found.after == judge.loss_of(model)
    assert found.after < 0.8 * found.before and found.steps == 30 and found.kept in (25, 30)


def test_twice_is_the_same_bit_for_bit(subject: Cut):
    (one, *_), (other, *_) = distilled(subject), distilled(subject)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    another, *_ = distilled(subject, dataclasses.replace(RULES, seed=1))
    assert not torch.equal(another.state_dict()["stem.0.weight"], one.state_dict()["stem.0.weight"])


def test_what_is_no_weight_stays(subject: Cut):
    """Statistics, modes, gradients and `requires_grad`, of both models; the dense one is left alone."""
    model, dense = copy.deepcopy(subject.pruned).train(), copy.deepcopy(subject.dense)
    weight = next(model.parameters())
    weight.requires_grad_(False)
    weight.grad = gradient = torch.ones_like(weight)
    objects = [id(parameter) for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    distill(dense, model, IMAGES, RULES, None)
    assert model.training and not dense.training and not weight.requires_grad and weight.grad is gradient
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    same = zip(dense.state_dict().values(), subject.dense.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same) and all(p.grad is None for p in dense.parameters())
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *dense.modules()))


def test_steps_that_lead_away_leave_the_start(subject: Cut):
    model, found, _ = distilled(subject, dataclasses.replace(RULES, lr=300.0))
    assert (found.kept, found.after) == (0, found.before)
    state = zip(model.state_dict().values(), subject.pruned.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in state)


def test_a_rate_that_is_too_high_is_taken_back_and_quartered(subject: Cut):
    """Twenty times too high: the first look takes the start up again, later ones find steps that gain."""
    _, found, _ = distilled(subject, dataclasses.replace(RULES, lr=0.6, steps=100))
    assert found.kept > 10 and found.after < 0.9 * found.before
    with pytest.MonkeyPatch.context() as stubborn:
        stubborn.setattr(distillation, "SLOWER", 1.0)
        _, at_once, _ = distilled(subject, dataclasses.replace(RULES, lr=0.6, steps=100))
    assert found.after < at_once.after


def test_another_round_begins_only_while_it_pays(subject: Cut):
    _, once, _ = distilled(subject)
    _, often, _ = distilled(subject, dataclasses.replace(RULES, rounds=20))
    assert 30 < often.steps < 600 and often.after < once.after
    _, vain, _ = distilled(subject, dataclasses.replace(RULES, lr=300.0, rounds=3))
    assert (vain.steps, vain.kept) == (30, 0)


@pytest.mark.parametrize("images", [1, 3])
def test_fewer_images_than_a_batch_are_gone_over_again(subject: Cut, images: int):
    model, found, _ = distilled(subject, dataclasses.replace(RULES, steps=2), IMAGES[:images])
    assert found.steps == 2 and all(tensor.isfinite().all() for tensor in model.state_dict().values())


# Equations


class Answers(nn.Module):
    """Returns what it is given."""

    def forward(self, *outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs


def test_logits_are_compared_by_the_divergence_at_the_temperature():
    a, b = random(5, 4, seed=1).double(), random(5, 4, seed=2).double()
    p, q = (b / 2).softmax(1), (a / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean().item()
    assert Outputs(Answers(), (b,)).distance([a], [b]).item() == pytest.approx(expected, rel=1e-6)


def test_other_outputs_are_compared_by_squares_as_a_share_of_their_variance():
    a, b, first = (random(5, 4, 3, seed=seed) for seed in (1, 2, 3))
    expected = ((a - b).square().mean() / first.var(correction=0)).item()
    outputs = Outputs(Answers(), (first, 100 * first))
    assert outputs.distance([a, 100 * a], [b, 100 * b]).item() == pytest.approx(expected, rel=1e-6)


def test_features_are_what_cut_layers_read_beside_the_kept_channels_of_the_dense_ones():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    graph = trace_groups(dense, IMAGES[:2])
    found = cut_in(dense, IMAGES, lambda group: (0, 2, 5), graph)
    features = Features(dense, found.pruned, found.layers.columns, OTHERS)
    with torch.no_grad():
        found.pruned[0].bias.add_(0.1)
        with features.watched():
            for model in (dense, found.pruned):
                model(IMAGES)
        x, wanted = F.relu(found.pruned[0](IMAGES)), F.relu(dense[0](IMAGES))[:, [0, 2, 5]]
        expected = (x - wanted).square().mean() / F.relu(dense[0](OTHERS))[:, [0, 2, 5]].var(correction=0)
    assert list(found.layers.columns) == ["2"]
    assert features.distance().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_smallest_inputs_are_compared(subject: Cut, monkeypatch: pytest.MonkeyPatch):
    columns = subject.layers.columns
    assert len(choose_features(subject.dense, columns, IMAGES)) > 2
    monkeypatch.setattr(distillation, "FEATURES", 0)
    assert choose_features(subject.dense, columns, IMAGES) == {}


def test_of_equal_inputs_the_deepest_are_compared(monkeypatch: pytest.MonkeyPatch):
    """As in a transformer, whose blocks all read one stream."""
    dense = nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)])
    columns = {name: torch.arange(6) for name in "0123"}
    monkeypatch.setattr(distillation, "FEATURES", 12)
    assert list(choose_features(dense, columns, torch.zeros(2, 6))) == ["3", "2"]


def test_images_are_cropped_mirrored_coloured_and_mixed():
    ramp = torch.linspace(0, 1, 16).expand(400, 3, 16, 16)
    found = augmented(ramp, torch.Generator().manual_seed(0))
    assert found.shape == ramp.shape and found.isfinite().all()
    assert torch.equal(augmented(ramp, torch.Generator().manual_seed(0)), found)
    corner = found[:, 0, 0]  # a row of each
    assert 150 < int((corner[:, 0] > corner[:, -1]).sum()) < 250  # mirrored
    apart = (found[:, 0, 0] - found[:, 1, 0]).abs().amax(-1) > 1e-3  # channels that were alike
    assert not apart[:200].any() and 80 < int(apart[200:].sum()) < 180  # in other colours, or a neighbour in them
    assert int(((found - ramp).abs().amax((1, 2, 3)) < 1e-3).sum()) < 20  # hardly one is what it was


def test_a_quarter_is_mixed_with_a_neighbour_and_a_quarter_covered_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distillation, "COLOUR", 0.0)
    flat = torch.arange(80.0)[:, None, None, None].expand(80, 3, 16, 16)
    plain, mixed, covered = augmented(flat, torch.Generator().manual_seed(0)).tensor_split([40, 60])
    assert torch.equal(plain, flat[:40])
    assert all(len(image.unique()) == 1 for image in mixed) and all(len(image.unique()) == 2 for image in covered[1:])
    shares = (mixed[1:, 0, 0, 0] - torch.arange(40.0, 59.0)).tolist()  # of the image, the rest is the one before it
    assert all(0 <= share <= 1 for share in shares) and max(shares) - min(shares) > 0.5
    assert all(set(image.unique().tolist()) == {59.0 + n, 60.0 + n} for n, image in enumerate(covered) if n)


def test_a_window_is_where_its_numbers_say():
    rows, columns = distillation._window(torch.zeros(3, 16, 10), [0.25, 1.0, 0.5, 0.7])
    assert (rows, columns) == (slice(3, 13), slice(0, 10))


class Tokens(nn.Module):
    """Takes integers by name, and returns a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(F.relu(self.fc(self.embed(ids))))}


def test_inputs_by_name_and_outputs_that_are_no_logits():
    torch.manual_seed(0)
    dense, ids = Tokens().eval(), {"ids": torch.randint(20, (40, 6), generator=torch.Generator().manual_seed(0))}
    graph = trace_groups(dense, {"ids": ids["ids"][:2]})
    plan = PruningPlan({g.name: tuple(range(g.num_units // 2)) for g in graph.groups})
    model = copy.deepcopy(dense)
    cut(model, graph, plan)
    found = distill(dense, model, ids, RULES, Judge(dense, ids))
    assert found.after < 0.85 * found.before


# Two processes


def distilled_with(images: Tensor) -> list[float]:
    torch.manual_seed(0)
    subject = cut_in(randomized(BatchNormCnn()), IMAGES, first_half)
    model = copy.deepcopy(subject.pruned)
    rules = DistillationRules(steps=5, batch_size=15, lr=1e-2)  # 15: the processes have unequal shares
    distill(subject.dense, model, images, rules, None, columns=subject.layers.columns)
    return [value for tensor in model.parameters() for value in tensor.detach().flatten().tolist()]


def one_process() -> list[float]:
    return distilled_with(IMAGES)


def its_share() -> list[float]:
    distributed.init("cpu")
    values = distilled_with((IMAGES[7:], IMAGES[:7])[distributed.rank()])
    distributed.shutdown()
    return values


@pytest.mark.slow
def test_two_processes_are_as_one():
    outcomes = run_together(__name__, {"one_process": 1, "its_share": 2})
    found = [*outcomes["one_process"], *outcomes["its_share"]]
    assert [outcome.status for outcome in found] == [0, 0, 0], [outcome.err for outcome in found]
    one, left, right = (torch.tensor(outcome.value) for outcome in found)
    assert torch.equal(left, right)
    torch.testing.assert_close(left, one, rtol=1e-4, atol=1e-5)
