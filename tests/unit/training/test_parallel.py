"""Several processes compute what one would: gradients shared by copies, sharded parameters, joint batch norms."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from isomorphic.checkpoints.open import load_model
from isomorphic.checkpoints.save import save_model
from isomorphic.errors import UserError
from isomorphic.masks import Masks
from isomorphic.models import build_model, describe_model
from isomorphic.processes import distributed
from isomorphic.pruning.weights.dimap import mask
from isomorphic.pruning.weights.layer_roles import assign_roles
from isomorphic.training.optim import build_optimizer, set_learning_rate
from isomorphic.training.parallel import (
    compiled,
    gathered,
    gradient_sync,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
    repeated_blocks,
    shard,
    unsharded_model,
    wrap_ddp,
)
from isomorphic.training.recipe import NetworkRecipe, OptimizerRecipe
from isomorphic.training.sync_bn import convert_sync_bn, needs_batches
from tests.processes import Outcome, run_together_once
from tests.versions import needs_sharding_on_cpu

CPU = torch.device("cpu")
VIT: dict[str, Any] = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5, "img_size": 16}
STEPS = 5
ALONE = NetworkRecipe()


def tiny_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2), BatchNormAct2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.BatchNorm1d(8), nn.Linear(8, 5),
    )  # fmt: skip


def tiny_vit(**keywords: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT | keywords)


def distilled() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", **VIT)
    model.set_distilled_training()  # pyright: ignore[reportCallIssue]
    return model


def loss_of(outputs: Any, labels: Tensor) -> Tensor:
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([functional.cross_entropy(head, labels) for head in heads]).mean()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """64 images a step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        yield torch.randn(64, 3, 16, 16, generator=generator), torch.randint(0, 5, (64,), generator=generator)


def train(
    model: nn.Module, recipe: NetworkRecipe = ALONE, *, accumulate: int = 1, opt: str = "sgd", **more: Any
) -> tuple[nn.Module, Any]:
    """Five steps of this process's share; an evaluation and a moving average between, as a run has them."""
    ema = ModelEmaV3(model, decay=0.5) if more.get("ema") else None
    if ema:
        shard(ema.module, CPU, recipe)
    network = wrap_ddp(shard(model, CPU, recipe), CPU, recipe)
    network = compiled(network) if recipe.compile else network
    optimizer = build_optimizer(model, OptimizerRecipe(opt=opt, weight_decay=0.01))
    for group in optimizer.param_groups:
        group |= {"lr": 0.05 if opt == "sgd" else 1e-3}
    for images, labels in batches():
        network.train()
        parts = list(zip(share(images).chunk(accumulate), share(labels).chunk(accumulate), strict=True))
        for number, (some, targets) in enumerate(parts, 1):
            with gradient_sync(network, enabled=number == accumulate):
                (loss_of(network(some), targets) / accumulate).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(model)
        model.eval()
        with gathered(model), torch.no_grad():
            for _ in range(1 + distributed.rank()):  # not as often everywhere
                model(images[:4])
    return model, (optimizer, ema)


def share(tensor: Tensor) -> Tensor:
    return tensor.chunk(distributed.world_size())[distributed.rank()]


def flat(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double().tolist() for name, tensor in state.items()}


def apart(model: nn.Module, state: dict[str, Any]) -> float:
    """The largest difference between a model's tensors and those of another, of the same names."""
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    return max((ours[name].double() - torch.tensor(state[name]).double()).abs().max().item() for name in ours)


def same_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two (nested) mappings hold the same tensors."""
    return one.keys() == other.keys() and all(
        same_states(value, other[name]) if isinstance(value, dict) else torch.equal(value, other[name])
        for name, value in one.items()
    )


# --- what the processes do ---


def copies() -> Any:
    distributed.init("cpu")
    return flat(train(tiny_vit())[0].state_dict())


def accumulated() -> Any:
    distributed.init("cpu")
    return flat(train(tiny_vit(), accumulate=2)[0].state_dict())


def static() -> Any:
    distributed.init("cpu")
    return flat(train(distilled(), NetworkRecipe(static_graph=True))[0].state_dict())


def static_with_unused() -> Any:
    distributed.init("cpu")
    model = tiny_vit()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    return flat(train(model, NetworkRecipe(static_graph=True))[0].state_dict())


def unused() -> str:
    distributed.init("cpu")
    model = tiny_vit()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    with pytest.raises(UserError) as error:
        train(model)
    return str(error.value)


def joint_batch_norms() -> Any:
    distributed.init("cpu")
    return flat(train(convert_sync_bn(tiny_cnn()))[0].state_dict())


def uneven_batch_norms() -> Any:
    """Of 10 values one process has 7; the gradients of both add up."""
    distributed.init("cpu")
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    norm = convert_sync_bn(nn.BatchNorm1d(3)).train()
    mine = (x[:7] if distributed.rank() == 0 else x[7:]).clone().requires_grad_()
    norm(mine).pow(3).sum().backward()
    assert mine.grad is not None
    return [distributed.gather_objects(mine.grad.tolist()), flat(norm.state_dict())]


def sharded_vit() -> Any:
    """A sharded run, its states, a checkpoint, and another one that goes on from the states."""
    distributed.init("cpu")
    recipe = NetworkRecipe(fsdp=True)
    model, (_, ema) = train(tiny_vit(), recipe, ema=True)
    adam, (adam_optimizer, _) = train(tiny_vit(), recipe, opt="adamw", accumulate=2)
    states = [model_state(adam), optimizer_state(adam, adam_optimizer)]
    everywhere = distributed.gather_objects(states)[0]
    again = shard(tiny_vit(), CPU, recipe)
    again_optimizer = build_optimizer(again, OptimizerRecipe(opt="adamw", weight_decay=0.01))
    load_model_state(again, everywhere[0])
    load_optimizer_state(again, again_optimizer, everywhere[1])
    back = [model_state(again), optimizer_state(again, again_optimizer)]
    same = not states[0] or (same_states(back[0], states[0]) and same_states(back[1]["state"], states[1]["state"]))
    averaged = unsharded_model(ema.module)
    spec = describe_model(
        "vit_tiny_patch16_224", kwargs={k: v for k, v in VIT.items() if k != "img_size"}, input_size=16
    )
    unsharded = unsharded_model(model)
    if unsharded is None or averaged is None:
        return same
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder, "m.safetensors"), unsharded, spec, provenance={})
        whole = flat(load_model(Path(folder, "m.safetensors")).state_dict())
    one = tiny_vit()
    one_optimizer = build_optimizer(one, OptimizerRecipe(opt="adamw", weight_decay=0.01))
    load_model_state(one, everywhere[0])
    load_optimizer_state(one, one_optimizer, everywhere[1])
    steps = one_optimizer.state_dict()["state"][0]["step"].item()
    return {"same": same, "whole": whole, "ema": flat(averaged.state_dict()), "adam": flat(states[0]), "steps": steps}


def masked(recipe: NetworkRecipe) -> Any:
    """Three steps of AdamW with an average; the zeros of both models before and after, or None beside the first."""
    distributed.init("cpu")
    model = tiny_vit(depth=2)
    names = mask(model, assign_roles(model, torch.zeros(1, 3, 16, 16)), 0.55).names
    before = {name: (model.get_parameter(name) == 0).tolist() for name in names}
    ema = ModelEmaV3(model, decay=0.5, foreach=not recipe.fsdp)
    shard(ema.module, CPU, recipe)
    network = wrap_ddp(shard(model, CPU, recipe), CPU, recipe)
    masks = Masks.of(model, names)
    optimizer = build_optimizer(model, OptimizerRecipe(opt="adamw", weight_decay=0.05))
    set_learning_rate(optimizer, 1e-2)
    generator = torch.Generator().manual_seed(distributed.rank())
    for step in range(3):
        images = torch.randn(8, 3, 16, 16, generator=generator)
        functional.cross_entropy(network(images), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.apply(model)
        ema.update(model, step=step + 1)
        masks.apply(ema.module)
    models = [unsharded_model(model), unsharded_model(ema.module)]
    held = sum(int(pruned.sum()) for pruned in masks.pruned.values())
    found = [one and {name: (one.get_parameter(name) == 0).tolist() for name in names} for one in models]
    return {"before": before, "found": found, "held": held}


def masked_copies() -> Any:
    return masked(NetworkRecipe())


def masked_and_sharded() -> Any:
    return masked(NetworkRecipe(fsdp=True))


SCENARIOS = {"copies": 2, "accumulated": 2, "static": 2, "static_with_unused": 2, "unused": 2, "joint_batch_norms": 2,
             "uneven_batch_norms": 2, "sharded_vit": 2, "masked_copies": 2, "masked_and_sharded": 2}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of all scenarios."""
    return run_together_once(tmp_path_factory, "tests.unit.training.test_parallel", SCENARIOS)


@pytest.fixture
def both(outcomes: dict[str, list[Outcome]]) -> Callable[[str], list[Any]]:
    """What the two processes of a scenario found."""

    def values(name: str) -> list[Any]:
        assert [outcome.status for outcome in outcomes[name]] == [0, 0], [outcome.err for outcome in outcomes[name]]
        return [outcome.value for outcome in outcomes[name]]

    return values


Both = Callable[[str], list[Any]]


@pytest.mark.parametrize("name", ["copies", "accumulated"])
def test_two_processes_of_32_do_what_one_of_64_does(name: str, both: Both):
    first, second = both(name)
    assert first == second
    assert apart(train(tiny_vit())[0], first) < 1e-5
    assert apart(tiny_vit(), first) > 1e-2


def test_accumulating_alone_changes_nothing():
    assert apart(train(tiny_vit(), accumulate=2)[0], flat(train(tiny_vit())[0].state_dict())) < 1e-5


def test_static_graphs_with_two_heads_and_with_a_parameter_left_out(both: Both):
    assert apart(train(distilled())[0], both("static")[0]) < 1e-5
    learned = both("static_with_unused")[0]
    assert learned.pop("spare") == [1, 1, 1]
    assert apart(train(tiny_vit())[0], learned) < 1e-5


def test_a_parameter_that_is_left_out_is_named_in_one_line(both: Both):
    message = "parameters that the loss does not depend on: spare; --static-graph trains without them if"
    assert [error.startswith(message) for error in both("unused")] == [True, True]


def test_joint_batch_norms_are_those_of_one_process_with_both_batches(both: Both):
    first, second = both("joint_batch_norms")
    assert first == second
    alone = train(tiny_cnn())[0]
    assert apart(alone, first) < 1e-5  # running statistics included
    assert any(name.endswith("running_var") for name in first)


def test_joint_batch_norms_weigh_batches_of_unequal_size(both: Both):
    (gradients, state), (_, other) = both("uneven_batch_norms")
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = nn.BatchNorm1d(3).train()
    norm(x).pow(3).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.tensor(gradients[0] + gradients[1]), x.grad, rtol=1e-4, atol=1e-5)
    assert state == other and apart(norm, state) < 1e-6


def test_a_converted_model_is_saved_as_the_model_that_it_was(tmp_path: Path):
    for name, library in (("regnetx_002", "timm"), ("resnet18", "torchvision")):
        spec = describe_model(name, builder=library, kwargs={"num_classes": 3}, input_size=None)
        model = build_model(spec)
        before, kinds = list(model.state_dict()), {type(module) for module in model.modules()}
        converted = convert_sync_bn(model)
        assert {type(module) for module in converted.modules()} != kinds
        assert list(copy.deepcopy(converted).state_dict()) == before
        save_model(tmp_path / "m.safetensors", converted, spec, provenance={})
        loaded = load_model(tmp_path / "m.safetensors")
        images = torch.randn(2, 3, 32, 32)
        assert {type(module) for module in loaded.modules()} == kinds
        with torch.no_grad():
            assert torch.equal(loaded.eval()(images), converted.eval()(images))


def test_batch_norms_need_batches_unless_all_processes_share_theirs(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(BatchNormAct2d(4)), nn.Flatten())
    assert needs_batches(model) and not needs_batches(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    convert_sync_bn(model)
    assert needs_batches(model)  # there is but one process
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert not needs_batches(model)
    assert needs_batches(nn.Sequential(model, nn.BatchNorm1d(4)))


def test_batch_norms_of_another_kind_are_refused():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="--sync-bn does not know the Own of 0"):
        convert_sync_bn(nn.Sequential(Own(3)))


@needs_sharding_on_cpu
def test_sharded_training_is_that_of_one_process(both: Both):
    first, second = both("sharded_vit")
    assert second is True and first["same"]
    alone, (_, ema) = train(tiny_vit(), ema=True)
    assert apart(alone, first["whole"]) < 1e-5
    assert apart(ema.module, first["ema"]) < 1e-5
    adam, _ = train(tiny_vit(), opt="adamw", accumulate=2)
    assert apart(adam, first["adam"]) < 1e-5
    assert first["steps"] == STEPS


@pytest.mark.parametrize("name", ["masked_copies", pytest.param("masked_and_sharded", marks=needs_sharding_on_cpu)])
def test_two_processes_keep_the_same_masks(name: str, both: Both):
    first, second = both(name)
    assert first["found"] == [first["before"], first["before"]]
    pruned = sum(torch.tensor(gone).sum().item() for gone in first["before"].values())
    if name == "masked_copies":
        assert second["found"] == first["found"] and first["held"] == second["held"] == pruned
    else:  # each process holds the masks of its own part
        assert first["held"] + second["held"] == pruned and min(first["held"], second["held"]) > 0


def test_the_state_of_an_optimizer_goes_by_names():
    model, (optimizer, _) = train(tiny_vit(), opt="adamw")
    state = optimizer_state(model, optimizer)
    names = [name for group in state["param_groups"] for name in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert state["state"].keys() == set(names)
    again = build_optimizer(model, OptimizerRecipe(opt="adamw", weight_decay=0.01))
    load_optimizer_state(model, again, state)
    torch.testing.assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][1:]
    with pytest.raises(UserError, match="other parameters"):
        load_optimizer_state(model, again, state)


def test_one_process_has_nothing_to_share():
    model = tiny_vit()
    assert wrap_ddp(model, CPU, NetworkRecipe()) is shard(model, CPU, NetworkRecipe(fsdp=True)) is model
    assert unsharded_model(model) is model
    with gathered(model), gradient_sync(model, enabled=False):
        assert list(model_state(model)) == list(model.state_dict())


@pytest.mark.parametrize(
    "name, blocks",
    [("resnet18", 8), ("convnext_atto", 12), ("swin_tiny_patch4_window7_224", 12), ("vit_tiny_patch16_224", 12)],
)
def test_blocks_are_what_a_model_repeats(name: str, blocks: int):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert len({id(block) for block in repeated_blocks(model)}) == blocks
