"""Step 3: every criterion against a computation by hand, and what accumulation leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.pruning.cutting.self_check import check_cut
from isomorphic.pruning.gradients import accumulate
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.ranking.ranker import Ranker, RankingRules, Ratios
from isomorphic.pruning.scoring import (
    CRITERIA,
    NORMALIZERS,
    groups_beyond,
    mean_saliency,
    normalize,
    score_groups,
    statistic_of,
)

CPU = torch.device("cpu")
SCORED_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)


def gradients(model, images, labels):
    """By parameter name, of the batch-mean cross entropy."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def summed_gradients(model, batches):
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for images, labels in batches:
        for name, gradient in gradients(model, images, labels).items():
            total[name] += gradient
    return total


def mean_squared_gradients(model, batches):
    """Over images, one at a time."""
    images = [(image[None], label[None]) for batch in batches for image, label in zip(*batch, strict=True)]
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for image, label in images:
        for name, gradient in gradients(model, image, label).items():
            total[name] += gradient.square() / len(images)
    return total


def score_by_hand(model, group, unit, saliency):
    """The mean over the weights that count of the saliency of the unit's slice; `saliency` by parameter name."""
    parts = []
    for member in group.members:
        layer = model.get_submodule(member.module)
        if member.tensor == "weight" and isinstance(layer, SCORED_LAYERS):
            parts.append(saliency[member.name].index_select(member.dim, member.index[unit]).sum())
    return torch.stack(parts).mean()


def assert_scores(subject, scores, saliency):
    for group in subject.groups:
        assert scores[group.name].shape == (group.num_units,)
        assert scores[group.name].dtype == torch.float32
        for unit in (0, group.num_units // 2, group.num_units - 1):
            expected = score_by_hand(subject.model, group, unit, saliency)
            torch.testing.assert_close(scores[group.name][unit], expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_is_the_sum_of_powers_without_a_root(subject, criterion, power):
    saliency = {name: tensor.detach().abs() ** power for name, tensor in subject.model.named_parameters()}
    assert_scores(subject, score_groups(subject.model, subject.groups, criterion), saliency)


def test_the_group_norm_is_summed_over_everything_that_a_unit_occupies_but_biases(subject):
    weights = {name: tensor.detach() for name, tensor in subject.model.named_parameters()}
    scores = score_groups(subject.model, subject.groups, "group_norm")
    for group in subject.groups:
        members = [one for one in group.members if "bias" not in one.tensor and one.name in weights]
        for unit in (0, group.num_units - 1):
            slices = [weights[one.name].index_select(one.dim, one.index[unit]) for one in members]
            expected = torch.stack([part.square().sum() for part in slices]).sum()
            torch.testing.assert_close(scores[group.name][unit], expected, rtol=1e-4, atol=1e-12)


def test_the_bn_scale_is_the_mean_over_a_group_s_batch_norms(subjects):
    subject = subjects("cnn")
    model = subject.copy()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for number, norm in enumerate(norms.values()):
        norm.weight.data = torch.linspace(-1 - number, 1 + number, len(norm.weight))
    scores = score_groups(model, subject.groups, "bn_scale")
    for group in subject.groups:
        rows = [norms[one.module].weight[one.index[:, 0]] for one in group.members if one.module in norms]
        scales = [
            row
            for one, row in zip([m for m in group.members if m.module in norms], rows, strict=True)
            if one.tensor == "weight"
        ]
        if scales:
            torch.testing.assert_close(scores[group.name], torch.stack(scales).abs().mean(0).detach())


def test_groups_without_batch_norms_are_beyond_the_bn_scale_and_stay(subjects):
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(
        convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    plan = iso.plan(model, torch.randn(1, 3, 8, 8), ratio=0.5, criterion="bn_scale")
    assert {name: len(units) for name, units in plan.kept.items()} == {"0.0.weight:0": 4, "3.weight:0": 6}
    assert plan.notes == ("Beyond bn_scale, and left whole: 3",)
    with pytest.raises(UserError, match="ratios names 3, about which bn_scale says nothing: leave it out"):
        iso.plan(model, torch.randn(1, 3, 8, 8), ratios={"3": 0.5}, criterion="bn_scale")
    deit = subjects("deit")
    assert groups_beyond(deit.model, deit.groups, "group_norm") == frozenset()
    with pytest.raises(UserError, match="criterion 'bn_scale' knows no group of this model: take another"):
        groups_beyond(deit.model, deit.groups, "bn_scale")


def test_taylor_is_weight_times_the_summed_gradient(subject, batches):
    gradient = summed_gradients(subject.model, batches)
    statistic = accumulate(subject.copy(), batches, "gradient", device=CPU)
    for name, expected in gradient.items():
        torch.testing.assert_close(statistic[name], expected, rtol=1e-4, atol=1e-5)
    saliency = {name: (weight * gradient[name]).detach().abs() for name, weight in subject.model.named_parameters()}
    assert_scores(subject, score_groups(subject.model, subject.groups, "taylor", statistic=gradient), saliency)


def test_hessian_uses_every_image(subject, batches):
    """The library kept the last image's squared gradient alone."""
    squared = mean_squared_gradients(subject.model, batches)
    statistic = accumulate(subject.copy(), batches, "squared_gradient", device=CPU)
    for name, expected in squared.items():
        torch.testing.assert_close(statistic[name], expected, rtol=1e-4, atol=1e-8)
    saliency = {name: (weight.square() * squared[name]).detach() for name, weight in subject.model.named_parameters()}
    assert_scores(subject, score_groups(subject.model, subject.groups, "hessian", statistic=squared), saliency)


def test_squared_gradients_do_not_depend_on_the_batch_size(subjects, batches):
    subject = subjects("cnn")
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    whole = accumulate(subject.copy(), [(images, labels)], "squared_gradient", device=CPU)
    parts = accumulate(subject.copy(), batches, "squared_gradient", device=CPU)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", ["deit", "cnn"])
def test_two_halves_of_the_batches_add_up_to_the_whole(subjects, batches, name):
    """What two processes sum before anyone ranks."""
    model = subjects(name).copy()
    whole = accumulate(model, batches, "gradient", device=CPU)
    halves = [accumulate(model, part, "gradient", device=CPU) for part in (batches[:2], batches[2:])]
    for parameter, expected in whole.items():
        difference = halves[0][parameter] + halves[1][parameter] - expected
        assert difference.norm() <= 1e-6 * expected.norm()


def test_accumulation_puts_back_modes_gradients_and_flags_and_leaves_the_weights(subject, batches):
    model = subject.copy().train()
    next(model.children()).eval()  # as somebody keeps batch norms while finetuning
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)  # of somebody's last step
    others[0].requires_grad_(False)
    for statistic in ("gradient", "squared_gradient"):
        accumulate(model, batches[:1], statistic, device=CPU)
        assert bool((first.grad == 1).all()) and all(parameter.grad is None for parameter in others)
        assert [module.training for module in model.modules()] == modes
        assert not others[0].requires_grad and first.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_old_gradients_do_not_count(subjects, batches):
    model = subjects("cnn").copy()
    clean = accumulate(model, batches, "gradient", device=CPU)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    again = accumulate(model, batches, "gradient", device=CPU)
    assert all(torch.equal(again[name], tensor) for name, tensor in clean.items())


def test_a_parameter_without_a_gradient_has_a_statistic_of_zeros(subjects, batches):
    model = subjects("cnn").copy()
    model.unused = torch.nn.Linear(3, 3)
    statistic = accumulate(model, batches[:1], "gradient", device=CPU)
    assert statistic.keys() == dict(model.named_parameters()).keys()
    assert not statistic["unused.weight"].any()
    assert statistic["head.bias"].any()


def test_frozen_parameters_are_scored_and_stay_frozen(subjects, batches):
    model = subjects("cnn").copy()
    expected = accumulate(model, batches[:1], "gradient", device=CPU)
    model.requires_grad_(False)
    found = accumulate(model, batches[:1], "gradient", device=CPU)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_autocast_scores_in_float32_and_close_to_full_precision(subjects, batches):
    subject = subjects("deit")
    full = accumulate(subject.copy(), batches[:1], "gradient", device=CPU)
    half = accumulate(subject.copy(), batches[:1], "gradient", device=CPU, amp_dtype=torch.bfloat16)
    exact = [score_groups(subject.model, subject.groups, "taylor", statistic=statistic) for statistic in (full, half)]
    for name, scores in exact[0].items():
        assert exact[1][name].dtype == torch.float32
        assert not torch.equal(exact[1][name], scores)
        assert torch.corrcoef(torch.stack([exact[1][name], scores]))[0, 1] > 0.99


@pytest.mark.parametrize(
    ("model", "parameter", "groups"),
    [
        ("cnn", "stem.1.weight", {"stem.0.weight:0"}),  # a batch norm
        ("cnn", "hidden.1.weight", {"hidden.0.weight:0"}),
        ("cnn", "depthwise.0.weight", {"stem.0.weight:0"}),
        ("convnext", "stages.0.blocks.0.conv_dw.weight", {"stem.0.weight:0"}),
        ("convnext", "stages.1.blocks.0.norm.weight", {"stages.1.downsample.1.weight:0"}),
        ("deit", "blocks.0.norm1.weight", {"patch_embed.proj.weight:0"}),
        ("deit", "blocks.0.attn.qkv.weight", {"patch_embed.proj.weight:0", "blocks.0.attn.qkv.weight:0"}),
        ("deit", "head.weight", {"patch_embed.proj.weight:0"}),
        ("deit", "blocks.0.mlp.fc1.bias", set()),
        ("deit", "pos_embed", set()),
        ("convnext", "stages.0.blocks.0.gamma", set()),
    ],
)
def test_what_counts_under_taylor(subjects, model, parameter, groups):
    """Norm scales and depthwise filters count, which the library's Taylor leaves out; biases and tokens do not."""
    subject = subjects(model)
    statistic = {name: torch.zeros_like(tensor) for name, tensor in subject.model.named_parameters()}
    statistic[parameter] += 1
    scores = score_groups(subject.model, subject.groups, "taylor", statistic=statistic)
    assert {name for name, values in scores.items() if values.any()} == groups
    assert all(scores[name].all() for name in groups)


def test_biases_count_on_request(subjects):
    subject = subjects("cnn")
    group = subject.group("hidden.0.weight:0")
    tensors = [member.name for member in group.scored_members(with_bias=True)]
    assert tensors.count("hidden.0.bias") == tensors.count("hidden.1.bias") == 1
    assert "hidden.1.running_mean" not in tensors
    plain = score_groups(subject.model, subject.groups, "l1")[group.name]
    biased = score_groups(subject.model, subject.groups, "l1", score_bias=True)[group.name]
    bias = subject.model.hidden[0].bias.abs() + subject.model.hidden[1].bias.abs()
    torch.testing.assert_close(biased * 5, plain * 3 + bias.detach())  # 3 weights, 2 biases


def test_the_positions_of_a_unit_are_summed(subjects):
    """16 positions of a flattened map, and the q, k and v rows of a head dim, count as one member each."""
    subject = subjects("deit")
    attention = subject.model.blocks[0].attn
    rows = attention.qkv.weight.detach().square().sum(1).view(3, 48).sum(0)
    columns = attention.proj.weight.detach().square().sum(0)
    scores = score_groups(subject.model, subject.groups, "l2")["blocks.0.attn.qkv.weight:0"]
    torch.testing.assert_close(scores, (rows + columns) / 2)


def test_random_scores_are_seeded_and_one_draw_a_unit(subject):
    draw = [score_groups(subject.model, subject.groups, "random", seed=seed) for seed in (0, 0, 1)]
    for group in subject.groups:
        one, same, other = (scores[group.name] for scores in draw)
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert one.shape == (group.num_units,)
        assert one.min() >= 0
        assert one.max() < 1
    everything = torch.cat(list(draw[0].values()))
    assert everything.unique().numel() > 0.99 * everything.numel()
    assert everything.std() > 0.2  # uniform: 0.29; a mean over the stream's 25 members would have 0.06


def test_random_scores_need_no_weights_and_leave_the_global_generator_alone(subjects):
    subject = subjects("cnn")
    model = subject.copy()
    with torch.no_grad():
        model.stem[0].weight.fill_(torch.nan)
    state = torch.get_rng_state()
    scores = score_groups(model, subject.groups, "random")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.isfinite(values).all() for values in scores.values())


def test_tied_weights_are_scored_in_each_of_their_places(tied_cnn):
    model = tied_cnn
    (group,) = trace_groups(model, torch.zeros(1, 3, 4, 4), "depgraph").groups
    statistic = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    scores = score_groups(model, [group], "taylor", statistic=statistic)[group.name]
    shared = model.one.weight.detach().abs()[..., 0, 0]
    outer = model.stem.weight.detach().abs().sum((1, 2, 3)) + model.head.weight.detach().abs().sum(0)
    torch.testing.assert_close(scores, (outer + 2 * shared.sum(0) + 2 * shared.sum(1)) / 6)


def test_an_all_zero_gradient_scores_zero_and_is_pruned_as_asked(subjects):
    """The library divides by the mean, gets NaN, and keeps such a group whole without a word."""
    subject = subjects("convnext")
    statistic = {name: torch.zeros_like(parameter) for name, parameter in subject.model.named_parameters()}
    scores = score_groups(subject.model, subject.groups, "taylor", statistic=statistic)
    assert not any(values.any() for values in scores.values())
    for normalizer in NORMALIZERS:
        normalized = {name: normalize(values, normalizer) for name, values in scores.items()}
        assert not any(values.any() for values in normalized.values())
        plan = Ranker(subject.graph, normalized, subject.classes, RankingRules()).plan(Ratios(0.5))
        for group in subject.groups:
            assert len(plan.kept[group.name]) == group.num_units // 2


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("none", [1.0, 2.0, 3.0, 6.0]),
        ("mean", [1 / 3, 2 / 3, 1.0, 2.0]),
        ("max", [1 / 6, 1 / 3, 0.5, 1.0]),
        ("top", [2 / 9, 4 / 9, 2 / 3, 4 / 3]),  # beside the mean of 3 and 6
        ("sum", [1 / 12, 1 / 6, 0.25, 0.5]),
        ("standardize", [0.0, 0.2, 0.4, 1.0]),
        ("gaussian", [-2 / 3.5**0.5, -1 / 3.5**0.5, 0.0, 3 / 3.5**0.5]),
    ],
)
def test_normalizers(normalizer, expected):
    torch.testing.assert_close(normalize(torch.tensor([1.0, 2.0, 3.0, 6.0]), normalizer), torch.tensor(expected))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [0.0], [5.0], [2.0, 2.0], [0.0, 1e-38], [3e38, 1e38]])
def test_normalized_scores_are_finite_and_in_the_same_order(normalizer, scores):
    values = torch.tensor(scores)
    normalized = normalize(values, normalizer)
    assert torch.isfinite(normalized).all()
    assert (normalized[values.argsort()].diff() >= 0).all()


def test_every_normalizer_is_tested():
    assert set(NORMALIZERS) == {"none", "mean", "max", "top", "sum", "standardize", "gaussian"}
    assert set(CRITERIA) >= {"random", "l1", "l2", "taylor", "hessian", "dimap", "group_norm", "bn_scale"}


# --- dimap ---


def test_dimap_scores_units_by_their_share_of_what_survives(subject):
    """e_c = Σ over layers of ‖slice‖² / ‖W‖²; Imp = e_(r) / Σ_{k ≤ r} e_(k)."""
    weights = {name: tensor.detach().double() for name, tensor in subject.model.named_parameters()}
    scores = score_groups(subject.model, subject.groups, "dimap")
    for group in subject.groups:
        energies = torch.zeros(group.num_units, dtype=torch.float64)
        for member in group.scored_members():
            if member.name in weights:
                share = weights[member.name].square() / weights[member.name].square().sum()
                for unit in range(group.num_units):
                    energies[unit] += share.index_select(member.dim, member.index[unit]).sum()
        for unit in (0, group.num_units // 2, group.num_units - 1):
            expected = energies[unit] / energies[energies >= energies[unit]].sum()
            assert scores[group.name][unit].item() == pytest.approx(expected.item(), rel=1e-3)
        assert scores[group.name].dtype == torch.float32 and scores[group.name].max() == 1


def test_dimap_does_not_see_the_scale_of_a_layer(subjects):
    subject = subjects("deit")
    model = subject.copy()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(10)
        model.blocks[1].attn.qkv.weight.mul_(0.1)
    scaled, plain = (score_groups(one, subject.groups, "dimap") for one in (model, subject.model))
    for name, scores in plain.items():
        torch.testing.assert_close(scaled[name], scores, rtol=1e-4, atol=1e-6)


def test_dimap_of_layers_at_zero_is_zero(subjects):
    subject = subjects("cnn")
    model = subject.copy()
    group = subject.group("hidden.0.weight:0")
    with torch.no_grad():
        for member in group.scored_members():
            model.get_parameter(member.name).zero_()
    scores = score_groups(model, subject.groups, "dimap")
    assert not scores[group.name].any()
    assert all(torch.isfinite(values).all() for values in scores.values())


def test_every_group_keeps_a_unit_under_dimap_and_what_is_cut_was_masked(subject):
    scores = score_groups(subject.model, subject.groups, "dimap")
    plan = Ranker(subject.graph, scores, subject.classes, RankingRules()).plan(Ratios(0.8, heads=0.5, head_dims=0.5))
    assert all(plan.kept[group.name] for group in subject.groups)
    assert sum(map(len, plan.kept.values())) < 0.5 * sum(group.num_units for group in subject.groups)
    assert check_cut(subject.model, subject.graph, plan, subject.cut(plan), subject.inputs) < 1e-5


def test_blocks_are_compared_by_their_magnitude_under_dimap(subjects):
    """Each tensor's share of itself would be the same for all."""
    model = subjects("deit").copy()
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter.mul_(0.5)
    means = mean_saliency(model, "dimap")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(means[parameter], parameter.detach().square().mean(), msg=name)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_a_criterion_without_its_statistic_is_refused(subjects, criterion):
    subject = subjects("cnn")
    with pytest.raises(ValueError, match=f"{criterion} needs what `accumulate` gives"):
        score_groups(subject.model, subject.groups, criterion)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_names_its_group(subjects, value):
    subject = subjects("cnn")
    model = subject.copy()
    with torch.no_grad():
        model.hidden[0].weight[3, 5] = value
    with pytest.raises(UserError, match=r"the l2 scores of join\.0\.weight:0 are not finite"):
        score_groups(model, subject.groups, "l2")


def test_a_loss_that_is_not_finite_stops_the_run(subjects, batches):
    images, labels = batches[0]
    with pytest.raises(UserError, match="the loss on the scoring images is nan"):
        accumulate(subjects("cnn").copy(), [(images * torch.nan, labels)], "gradient", device=CPU)


@pytest.mark.parametrize("statistic", ["gradient", "squared_gradient"])
def test_no_images_is_an_error(subjects, statistic):
    with pytest.raises(UserError, match="no images to score on"):
        accumulate(subjects("cnn").copy(), [], statistic, device=CPU)


def test_scoring_leaves_the_weights_alone(subject):
    before = copy.deepcopy(subject.model.state_dict())
    for criterion in ("l1", "l2", "random"):
        score_groups(subject.model, subject.groups, criterion)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


# --- a criterion of the user's own ---


class GroupedCnn(nn.Module):
    """A convolution in two groups: of each unit's consumers, it reads half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 12), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.mix(F.relu(self.stem(x))))).mean((2, 3)))


class JoinedCnn(nn.Module):
    """A concatenation beside one convolution: the dim of `wide` is split into the units of `left` and of `right`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Conv2d(3, 14, 3), nn.Linear(14, 10)
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3)

    def forward(self, x):
        joined = torch.cat([self.left(x), self.right(x)], dim=1)
        return self.head(F.relu(joined + self.wide(x)).mean((2, 3)))


def own_model(traced, name):
    """A model and its groups."""
    if name in BUILT:
        torch.manual_seed(0)
        model = BUILT[name]().eval()
        return model, trace_groups(model, torch.zeros(2, 3, 32, 32)).groups
    subject = traced(name, "exact")
    return subject.copy(), subject.groups


BUILT = {"grouped": GroupedCnn, "joined": JoinedCnn}
OWN_MODELS = ["deit", "convnext", "cnn", *BUILT]


@pytest.mark.parametrize("score_bias", [False, True])
@pytest.mark.parametrize("name", OWN_MODELS)
def test_taylor_and_l2_as_criteria_of_ones_own(traced, batches, name, score_bias):
    model, groups = own_model(traced, name)
    statistic = accumulate(model, batches, "gradient")
    own: dict[str, Any] = {
        "taylor": lambda group, weights, gradients: (
            sum((w * g).abs().sum(1) for w, g in zip(weights, gradients, strict=True)) / len(weights)
        ),
        "l2": lambda group, weights, gradients: sum(w.square().sum(1) for w in weights) / len(weights),
    }
    for criterion, function in own.items():
        found = score_groups(model, groups, function, statistic=statistic, score_bias=score_bias)
        expected = score_groups(model, groups, criterion, statistic=statistic, score_bias=score_bias)
        assert found.keys() == expected.keys() and found
        for group, scores in expected.items():
            assert found[group].dtype == torch.float32 and scores.any()
            torch.testing.assert_close(found[group], scores, rtol=1e-5, atol=0)


def test_the_models_of_ones_own_criteria_have_heads_groups_and_split_dims(traced):
    assert any(group.heads for group in own_model(traced, "deit")[1])
    assert any(group.num_sections == 2 for group in own_model(traced, "grouped")[1])
    assert any(group.split_dim for group in own_model(traced, "joined")[1])


def test_rows_hold_all_weights_of_a_unit_and_members_come_in_order(subjects):
    """16 positions of a flattened map: unit 2 of the convolution has columns 32 … 47 of the linear layer behind it."""
    subject = subjects("cnn")
    group = subject.group("join.0.weight:0")
    seen = {}

    def noted(group, weights, gradients):
        seen[group.name] = (weights, gradients)
        return weights[0].sum(1)

    score_groups(subject.model, subject.groups, noted)
    weights, gradients = seen[group.name]
    assert gradients == []
    members = group.scored_members()
    assert len(weights) == len(members)
    rows = dict(zip([member.name for member in members], weights, strict=True))
    shapes = {name: tuple(values.shape) for name, values in rows.items()}
    assert shapes == {"join.0.weight": (6, 20 * 8 * 8), "join.1.weight": (6, 1), "hidden.0.weight": (6, 16 * 14)}
    assert all(values.dtype == torch.float32 and not values.requires_grad for values in weights)
    assert torch.equal(rows["join.0.weight"], subject.model.join[0].weight.detach().flatten(1))
    columns = subject.model.hidden[0].weight.detach()[:, 32:48]
    assert torch.equal(rows["hidden.0.weight"][2].sort().values, columns.flatten().sort().values)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda g, w, d: w[0], r"the criterion's scores of \S+ are \(\d+, \d+\), not a tensor of \(\d+,\)"),
        (lambda g, w, d: w[0].sum(), r"the criterion's scores of \S+ are \(\), not a tensor of \(\d+,\)"),
        (lambda g, w, d: w[0].sum(1)[1:], r"are \(7,\), not a tensor of \(8,\)"),
        (lambda g, w, d: [1.0] * g.num_units, r"the criterion's scores of \S+ are list, not a tensor of \(\d+,\)"),
        (lambda g, w, d: w[0].sum(1) / 0, r"the criterion's scores \(\d+,\) of \S+ are not finite"),
    ],
)
def test_scores_that_are_none(subjects, criterion, message):
    subject = subjects("cnn")
    with pytest.raises(UserError, match=message):
        score_groups(subject.model, subject.groups, criterion)


def test_what_is_accumulated_for_a_criterion():
    def own(group, weights, gradients):
        return weights[0].sum(1)

    names = {name: statistic_of(name, has_data=False) for name in CRITERIA}
    assert names == {name: statistic_of(name, has_data=True) for name in CRITERIA}
    assert (names["l1"], names["taylor"], names["hessian"]) == (None, "gradient", "squared_gradient")
    assert (statistic_of(own, has_data=True), statistic_of(own, has_data=False)) == ("gradient", None)


def test_an_unknown_criterion_names_the_known_ones(subjects):
    subject = subjects("cnn")
    message = (
        "criterion = 'l3' is none of random, l1, l2, taylor, hessian, dimap, group_norm, bn_scale, and no function"
    )
    with pytest.raises(UserError, match=message):
        statistic_of("l3", has_data=True)
    with pytest.raises(UserError, match=message):
        score_groups(subject.model, subject.groups, "l3")
    with pytest.raises(UserError, match=message):
        mean_saliency(subject.model, "l3")


def test_blocks_are_not_scored_by_a_function(subjects):
    with pytest.raises(UserError, match="blocks are scored by a criterion of random, l1, .*, not by a function"):
        mean_saliency(subjects("cnn").model, lambda g, w, d: w[0].sum(1))
