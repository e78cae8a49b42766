"""Recoveries around a cut, together: what they report, what the checkpoint keeps of them, and their order."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.checkpoints.open import load_model, open_model, read_header
from isomorphic.checkpoints.save import save_model
from isomorphic.models import example_inputs
from isomorphic.processes import distributed
from isomorphic.pruning.apply import Applied, Recovery, applied_lines, apply_plan
from isomorphic.pruning.cutting.cut import cut, kept_positions
from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery import recover
from isomorphic.pruning.recovery.batch_norm import recalibrate
from isomorphic.pruning.recovery.fusion import FusionRules, fuse
from isomorphic.pruning.recovery.mixed_layers import mixed_layers
from tests.processes import run_together
from tests.unit.pruning.conftest import BUILDERS, CONVNEXT, SWIN, VIT, BatchNormCnn
from tests.unit.pruning.recovery.test_compensation import copy_units, distance, random, randomized

IMAGES = random(48, 3, 32, 32, seed=3)
SLOW = pytest.mark.slow
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "vit without biases": ("vit_tiny_patch16_224", VIT | {"qkv_bias": False}),
    "convnext": ("convnext_tiny", CONVNEXT),
    "resnet": ("resnet10t", {"channels": (8, 12, 16, 24), "stem_width": 8, "num_classes": 10}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


def half(group: CoupledGroup) -> tuple[int, ...]:
    """Half of each block, or of all units."""
    return tuple(u for u in range(group.num_units) if u % group.section_size < max(group.section_size // 2, 1))


def recovery(
    *steps: str, images: Tensor | None = IMAGES, normalization: str = "mass", is_judged: bool = True
) -> Recovery:
    return Recovery(frozenset(steps), images, FusionRules(normalization), is_judged=is_judged)


def recovered(dense: nn.Module, *steps: str, plan: Any = half, **options: Any) -> tuple[Any, Applied]:
    model = copy.deepcopy(dense)
    graph = trace_groups(model, IMAGES[:2])
    kept = PruningPlan({group.name: plan(group) for group in graph.groups})
    return model, apply_plan(model, graph, kept, IMAGES[:2], recovery(*steps, **options))


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("name", [pytest.param(key, marks=SLOW if key in ("swin", "convnext") else ()) for key in ZOO])
def test_a_recovered_model_survives_its_checkpoint(name: str, tmp_path: Path):
    architecture, options = ZOO[name]
    torch.manual_seed(0)
    size: dict[str, Any] = {} if "img_size" in options else {"input_size": 32}
    dense, spec = open_model(architecture, kwargs=options, pretrained=False, **size)
    dense = randomized(dense)
    inputs = example_inputs(spec)
    graph = trace_groups(dense, inputs)
    plan = PruningPlan({group.name: half(group) for group in graph.groups})
    images = torch.nn.functional.interpolate(IMAGES, inputs.shape[-1])
    model = copy.deepcopy(dense)
    done = apply_plan(model, graph, plan, inputs, recovery("compensate", images=images))
    plain = copy.deepcopy(dense)
    cut(plain, graph, plan)
    assert distance(model, dense, images) < 0.9 * distance(plain, dense, images)
    assert done.errors and all(0 <= after <= before for before, after in done.errors.values())

    save_model(tmp_path / "model.safetensors", model, spec, provenance={})
    loaded = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images[:8]), model.eval()(images[:8]))
    # layers that had no bias gained one where no batch norm takes it
    gained = {key for key, _ in model.named_parameters()} - {key for key, _ in dense.named_parameters()}
    if name == "resnet":  # batch norms take them all
        assert gained == set()
    elif name == "swin":
        assert gained == {key for key in gained if key.endswith("downsample.reduction.bias")} != set()
    elif name == "vit without biases":
        assert gained == {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}
    structure = str(read_header(tmp_path / "model.safetensors")["structure"])
    assert all(key in structure or key.removesuffix(".bias") in structure for key in gained)


def test_biases_that_layers_gain_end_in_the_batch_norms_after_them():
    dense = randomized(BatchNormCnn())
    model, _ = recovered(dense, "compensate")
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in dense.named_parameters()}
    plain, _ = recovered(dense)
    assert not torch.equal(model.residual[1].running_mean, plain.residual[1].running_mean)
    assert torch.equal(model.residual[1].running_var, plain.residual[1].running_var)
    assert distance(model, dense, IMAGES) < distance(plain, dense, IMAGES)


def test_fusion_by_mass_of_copies_leaves_nothing_to_compensate():
    torch.manual_seed(0)
    dense: Any = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 8, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 14), nn.ReLU(), nn.Linear(14, 10)),
    ).eval()
    graph = trace_groups(dense, IMAGES[:2])
    copy_units(dense, graph)
    with torch.no_grad():  # copies in what reads them, too, so that transport pairs them
        for layer, width in ((dense[2], 6), (dense[8], 7)):
            layer.weight[:, width:] = layer.weight[:, :width]
    fused, _ = recovered(dense, "fusion")
    both, done = recovered(dense, "fusion", "compensate")
    assert set(done.fusion.merged if done.fusion else ()) >= {"0.weight:0", "6.weight:0"}
    assert all(before < 1e-6 and after < 1e-6 for before, after in done.errors.values())
    assert distance(fused, dense, IMAGES) < 1e-8 and distance(both, dense, IMAGES) < 1e-8


@torch.no_grad()
def seen_by(model: nn.Module, name: str, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a layer sees when the model sees the images, or `inputs`, and what it makes of it, channels last."""
    layer, seen = model.get_submodule(name), [inputs]
    if inputs is None:
        with layer.register_forward_pre_hook(lambda module, given: seen.append(given[0])):
            model(IMAGES)
    found = seen[-1]
    assert found is not None
    return found, layer(found).movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1)


@pytest.mark.parametrize("normalization", ["source", "mass"])
@pytest.mark.parametrize(("name", "layers"), [("cnn", 5), ("resnet", 15), ("deit", 2)])  # all that make merged units
def test_what_merged_layers_should_make_is_what_they_make_of_the_same_inputs(
    name: str, layers: int, normalization: str
):
    """With batch norms after them and without, one group at a time: layers that do not read it see what they saw."""
    torch.manual_seed(0)
    dense = randomized(BUILDERS[name]())
    graph = trace_groups(dense, IMAGES[:2])
    whole = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    checked, makers = set(), set()
    for group in graph.groups:
        if group.sections:
            continue
        plan = PruningPlan(whole | {group.name: tuple(unit for unit in whole[group.name] if unit % 3)})
        fused = copy.deepcopy(dense)
        fusion = fuse(fused, graph, plan, IMAGES[:2], rules=FusionRules(normalization))
        maps = mixed_layers(dense, fused, graph, plan, fusion).outputs
        kept = kept_positions(dense, graph, plan)
        makers |= set(maps)
        for layer, (factor, offset) in maps.items():
            if 1 not in kept[layer, "weight"]:
                inputs, made = seen_by(dense, layer)
                _, expected = seen_by(fused, layer, inputs)
                found = made.double() @ factor.T + offset
                torch.testing.assert_close(found.float(), expected[..., kept[layer, "weight"][0]], rtol=1e-4, atol=1e-4)
                checked.add(layer)
    assert len(makers) == layers and len(checked) >= layers - 3  # but for those on a stream that they read, too


@pytest.mark.parametrize("normalization", ["source", "mass"])
def test_what_was_merged_is_compensated_towards_the_merged_outputs(normalization: str):
    torch.manual_seed(0)
    dense = randomized(BatchNormCnn())
    fused, _ = recovered(dense, "fusion", normalization=normalization)
    both, done = recovered(dense, "fusion", "compensate", normalization=normalization)
    assert done.errors and all(0 <= after <= before for before, after in done.errors.values())
    assert distance(both, dense, IMAGES) < distance(fused, dense, IMAGES)


def test_steps_run_in_one_order_and_repeat():
    torch.manual_seed(0)
    dense = randomized(BatchNormCnn())
    steps = ("fusion", "compensate", "bn")
    one, other = (recovered(dense, *order)[0] for order in (steps, steps[::-1]))
    assert same(one, other)
    models = [recovered(dense, *order, is_judged=False)[0] for order in (steps, steps[::-1])]
    assert same(models[0], models[1])
    # bn comes last: what it writes is what it finds in the end
    again = copy.deepcopy(models[0])
    recalibrate(again, [(IMAGES, IMAGES)], torch.device("cpu"))
    for name, buffer in again.named_buffers():
        torch.testing.assert_close(buffer, models[0].get_buffer(name))


@pytest.mark.parametrize("steps", [("compensate",), ("bn",), ("compensate", "bn"), ()])
def test_without_images_the_cut_is_plain(steps: tuple[str, ...]):
    torch.manual_seed(0)
    dense = randomized(BatchNormCnn())
    plain, _ = recovered(dense)
    model, done = recovered(dense, *steps, images=None)
    assert same(model, plain)
    assert (done.errors, done.batch_norms) == ({}, None)


def test_the_report_names_every_group_that_lost_units():
    torch.manual_seed(0)
    dense = randomized(BatchNormCnn())
    _, done = recovered(dense, "compensate", "bn")
    graph = trace_groups(dense, IMAGES[:2])
    losing = {group.name for group in graph.groups if len(half(group)) < group.num_units}
    assert set(done.errors) | set(done.plain) == losing and not set(done.errors) & set(done.plain)
    assert done.batch_norms == 6
    lines = list(applied_lines(done))
    assert lines[0] == "Compensated, with the relative reconstruction error before and after:"
    first, (before, after) = next(iter(done.errors.items()))
    assert lines[1].split() == [first.removesuffix(".weight:0"), f"{before:.4f}", "=>", f"{after:.4f}"]
    assert lines[-4:-2] == ["Recalibrated: 6 batch norms", "On 9 held-out images, mean KL to the dense model:"]
    assert [line.split()[0] for line in lines[-2:]] == ["compensate", "bn"]
    one, other = done.judged
    assert lines[-2] == f"  compensate  {one.before:.4f} => {one.after:.4f}"
    assert lines[-1].startswith(f"  bn          {other.before:.4f} => {other.after:.4f} ({other.how})")
    assert one.after == other.before and other.after < one.after < one.before


def test_a_model_without_batch_norms_says_so():
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 3))
    _, done = recovered(dense, "bn")
    assert list(applied_lines(done)) == ["Cut plainly: 1", "Recalibrated: no batch norms"]


def test_a_batch_of_its_own_is_no_reason_to_count_more():
    """65 images are a batch of 64 and one of 1, which may not decide half of the statistics."""
    torch.manual_seed(0)
    dense: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    images = torch.cat([random(64, 3, 8, 8), 30 + random(1, 3, 8, 8)])
    model, done = recovered(dense, "bn", images=images, plan=lambda group: tuple(range(group.num_units)))
    assert not done.judged  # a model that loses nothing has nothing to come back to
    expected = dense[0](images).mean((0, 2, 3)).detach()
    assert (model[1].running_mean - expected).abs().max() < 0.5


# Two processes


def recalibrated_with(images: Tensor) -> list[float]:
    torch.manual_seed(0)
    model, _ = recovered(randomized(BatchNormCnn()), "bn", images=images, is_judged=False)
    return [value for buffer in model.buffers() for value in buffer.double().flatten().tolist()]


def one_process() -> list[float]:
    """Two batches in a row."""
    recover.BATCH = 24
    return recalibrated_with(IMAGES)


def its_share() -> list[float]:
    """One of the two batches."""
    distributed.init("cpu")
    values = recalibrated_with(IMAGES.split(24)[distributed.rank()])
    distributed.shutdown()
    return values


@pytest.mark.slow
def test_two_processes_recalibrate_as_one_does():
    outcomes = run_together(__name__, {"one_process": 1, "its_share": 2})
    found = [*outcomes["one_process"], *outcomes["its_share"]]
    assert [outcome.status for outcome in found] == [0, 0, 0], [outcome.err for outcome in found]
    one, left, right = (torch.tensor(outcome.value, dtype=torch.float64) for outcome in found)
    assert torch.equal(left, right)
    torch.testing.assert_close(left, one, rtol=1e-5, atol=1e-5)
