"""The Python face: control, steps, optimizers, tasks of any kind, and what it says of calls that cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import isomorphic as iso
from isomorphic.checkpoints.open import open_model, read_header, stored_class_names
from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.pruning.options import PlanOptions, check_counter


@pytest.mark.parametrize("name", ["accuracy", "complexity", "execution", "fidelity", "latency"])
def test_measuring_is_a_part_of_the_face(name: str):
    assert "measure" in dir(iso) and name in dir(iso.measure)
    assert getattr(iso.measure, name).__name__ == f"isomorphic.measure.{name}"
    with pytest.raises(AttributeError, match="'isomorphic.measure' has no attribute 'taste'"):
        _ = iso.measure.taste  # pyright: ignore[reportAttributeAccessIssue]


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def mlp(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def widths(model: Any) -> tuple[int, int]:
    return model[0].out_features, model[2].out_features


def half(model: nn.Module, **options: Any) -> Any:
    return iso.prune(model, X, **{"ratio": 0.5, "criterion": "l2", **options})


@pytest.mark.parametrize("ranking", ["isomorphic", "global", "local"])
def test_ignored_layers_and_ratios_by_name_under_every_ranking(ranking: str):
    assert widths(half(mlp(), ignore=["0"], ranking=ranking).model) == (16, 8)
    assert widths(half(mlp(), ratios={"0": 0.75}, ranking=ranking).model) == (4, 8)
    assert widths(half(mlp(), ratios={"?": 0.25}, ranking=ranking).model) == (12, 12)
    done = half(mlp(), ratio=None, params="60%", ratios={"2": 0.5}, ranking=ranking)
    assert widths(done.model)[1] == 8 and done.after.params <= 0.6 * done.before.params
    assert "Spared: 0 (to be ignored)" in str(half(mlp(), ignore=["0"], ranking=ranking))


def test_the_dense_model_is_left_alone_but_for_inplace():
    model = mlp().train()
    before = copy.deepcopy(model.state_dict())
    done = half(model)
    assert done.model is not model and done.model.training and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plan = iso.plan(model, X, ratio=0.5, criterion="l2")
    assert plan.kept == done.plan.kept and plan.after == done.after and widths(model) == (16, 16)
    assert half(model, inplace=True).model is model and sum(widths(model)) == 16


@pytest.mark.parametrize("way", ["in place", "copies", "loaded"])
def test_a_model_that_was_pruned_several_times_is_saved_as_cut_from_the_first(way: str, tmp_path: Path):
    first = half(mlp(), ratio=0.25, inplace=way == "in place")
    again = first.model
    if way == "loaded":
        first.save(tmp_path / "first.safetensors")
        again = iso.load_model(tmp_path / "first.safetensors", model=mlp(seed=1))
    last = half(again, ratio=0.25, inplace=way == "in place")
    assert sum(widths(last.model)) == 18  # 32, 24, 18
    for number, done in enumerate([first, last]):
        done.save(path := tmp_path / f"{number}.safetensors")
        loaded = iso.load_model(path, model=mlp(seed=2))
        assert torch.equal(loaded(X), done.model.eval()(X)), "what is saved is the model as it stands"
    assert sum(widths(first.model)) == (18 if way == "in place" else 24)


@pytest.mark.parametrize("steps", [2, 3, 5])
@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"ratio": None, "macs": "50%"}, {"ratio": None, "params": 200}])
def test_steps_arrive_where_one_would_and_are_one_plan(how: dict[str, Any], steps: int):
    seen: list[int] = []
    done = half(mlp(), steps=steps, between=lambda model, step: seen.append(sum(widths(model))), **how)
    sizes = [32, *seen, sum(widths(done.model))]
    assert sizes == sorted(sizes, reverse=True) and len(seen) == steps - 1
    once = half(mlp(), **how)
    assert abs(sizes[-1] - sum(widths(once.model))) <= (0 if how["ratio"] else 2)
    if how["ratio"]:
        assert sizes[-1] == 16
    else:
        assert done.after.macs_paper <= 0.5 * done.before.macs_paper or done.after.params <= 200
    again = iso.prune(mlp(), X, plan=done.plan).model  # nothing was trained in between
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.model.parameters(), strict=True))


def test_steps_with_local_ranking_go_evenly():
    seen: list[tuple[int, int]] = []
    done = half(mlp(), steps=4, ranking="local", between=lambda model, step: seen.append(widths(model)))
    assert seen == [(14, 14), (12, 12), (10, 10)] and widths(done.model) == (8, 8)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
])  # fmt: skip
def test_optimizers_go_on_with_what_is_left_of_their_states(make: Any):
    model = mlp()
    optimizer = make([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.01}])

    def step(loss_scale: float = 1.0) -> None:
        optimizer.zero_grad()
        (model(X).square().mean() * loss_scale).backward()
        optimizer.step()

    step()
    old = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    done = half(model, inplace=True, optimizer=optimizer)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert len(optimizer.state) == 6 and optimizer.param_groups[1]["lr"] == 0.01
    kept = torch.tensor(done.plan.kept["0.weight:0"])
    for key, value in optimizer.state[model[0].weight].items():
        before = old["0.weight"][key]
        expected = before[kept] if isinstance(before, Tensor) and before.dim() == 2 else before
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected))
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.a(self.e(input_ids)).relu() * attention_mask[..., None] * scale
        return {"logits": self.b(x.mean(1)), "more": [None]}


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_keyword_inputs_dict_outputs_and_a_loss_of_ones_own(criterion: str):
    inputs = {"input_ids": torch.randint(11, (2, 5)), "attention_mask": torch.ones(2, 5), "scale": 0.5}
    done = iso.prune(
        Keywords(), inputs, ratio=0.5, criterion=criterion, data=[(inputs, torch.tensor([0, 1]))] * 2, self_check=True,
        loss=lambda model, batch: F.cross_entropy(model(**batch[0])["logits"], batch[1]),
    )  # fmt: skip
    model: Any = done.model
    assert model.a.out_features == 8 and model(**inputs)["logits"].shape == (2, 4)


def norm(group: Any, weights: list[Tensor], gradients: list[Tensor]) -> Tensor:
    return sum(w.square().sum(1) for w in weights) / len(weights)  # type: ignore[return-value]


def test_a_criterion_of_ones_own():
    assert half(mlp(), criterion=norm).plan.kept == half(mlp()).plan.kept
    with pytest.raises(UserError, match=r"the criterion's scores of 0.weight:0 are \(3,\), not a tensor of \(16,\)"):
        half(mlp(), criterion=lambda *_: torch.ones(3))


@pytest.mark.parametrize(("options", "message"), [
    ({"ignore": ["layer"]}, "ignore 'layer' matches no module of the model"),
    ({"ignore": "0"}, "give a list of module names"),
    ({"ratios": {"4": 0.5}}, "ratios '4': what 4 makes stays .it reaches the model's output"),
    ({"ratios": {"0": 1.0}}, r"ratios\['0'\] = 1.0 is not a share in \[0, 1\)"),
    ({"ratios": {"0": 0.5}, "ignore": ["0"]}, "is in ratios .* and in ignore"),
    ({"ratio": 1.5}, r"ratio = 1.5 is not a share in \[0, 1\)"),
    ({"macs": "50%"}, "ratio and macs are two answers"),
    ({"ratio": None}, "say how much is to go"),
    ({"ratio": None, "macs": "1G"}, "is met already"),
    ({"ratio": None, "macs": 3}, "out of reach"),
    ({"ratio": None, "macs": "4X"}, "'4X' is not a number"),
    ({"ratio": None, "latency": "1ns"}, "'1ns' is not a number, or one with a unit of ms, us, s, %"),
    ({"ratio": None, "params": "1Ms"}, "'1Ms' is not a number, or one with a unit of G, M, K, %"),
    ({"ratio": None, "macs": "10"}, r"out of reach \(a share of what it takes is written 10%\): under these rules"),
    ({"ratio": None, "params": 16}, r"out of reach \(a share of what it takes is written 16%\)"),
    ({"criterion": lambda group, weights, gradients: sum(gradients)},
     r"are int, not a tensor of \(16,\) \(without data= there are no gradients"),
    ({"criterion": "lamp"}, "criterion = 'lamp' is none of random, l1"),
    ({"criterion": "taylor"}, "needs data=, batches to compute gradients on"),
    ({"ranking": "all"}, "ranking = 'all' is none of isomorphic, global, local"),
    ({"steps": 0}, "steps = 0 is not a whole number"),
    ({"between": print}, "give steps, 2 or more"),
    ({"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1)}, "with inplace=True"),
    ({"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1), "inplace": True}, "holds none of the model's param"),
    ({"ignore": [mlp()]}, "ignore holds a Sequential: give its name, as named_modules"),
    ({"ignore": [0]}, "ignore holds 0, which is no name of a module: write it as a text, '0'"),
    ({"ignore": mlp()}, "ignore is Sequential: give a list of module names"),
    ({"ignore": ["1"]}, "ignore '1': a module without parameters makes no channels"),
    ({"ratios": ["0"]}, r'ratios is list: give shares by module name, ratios={"name": 0.5}'),
    ({"ratios": {0: 0.5}}, "ratios holds 0, which is no name"),
    ({"ratios": {"1": 0.5}}, "ratios '1': a module without parameters makes no channels"),
    ({"ratio": None, "macs": 0.5}, "0.5 is less than one: a share of what the dense model takes is written 50%"),
    ({"ratio": None, "params": "0.25"}, "is written 25%"),
    ({"optimizer": "adam", "inplace": True}, "optimizer is str: give the torch.optim.Optimizer"),
    ({"optimizer": [torch.optim.SGD(mlp().parameters(), lr=0.1)]}, "optimizer is list: give the torch.optim.Optimizer"),
    ({"recover": "compensate"}, r"recover='compensate' is one text: give a list, recover=\['compensate'\]"),
    ({"recover": "fusion,bn"}, r"give a list, recover=\['fusion', 'bn'\]"),
    ({"recover": None}, "recover = None is no list of fusion, compensate, bn"),
    ({"recover": ["fusion", "bn", "compensate"]}, r"recover=\['compensate', 'bn'\] looks at images: give calibration="),
    ({"data": (X, LABELS)}, r"data= is one batch, inputs and labels: give a list of them, data=\[\(inputs, labels\)\]"),
    ({"data": TensorDataset(X, LABELS)}, "data= is a dataset of single items, TensorDataset: give a DataLoader"),
    ({"data": X}, "data= is Tensor, which is one batch at most"),
    ({"data": {"x": X}}, "data= is dict, which is one batch at most"),
    ({"data": 3}, "data = 3 is no list of batches and no loader"),
    ({"data": "images"}, "data = 'images' is no list of batches"),
    ({"loss": "dice"}, "loss = 'dice' is no function: pass loss=, a function of .model, batch."),
    ({"loss": nn.BCEWithLogitsLoss()}, "BCEWithLogitsLoss is no function of .model, batch., as loss= must be"),
    ({"loss": nn.CrossEntropyLoss}, "CrossEntropyLoss is no function of .model, batch."),
    ({"loss": F.mse_loss}, "mse_loss is no function of .model, batch."),
    ({"loss": lambda outputs: outputs.sum()}, "<lambda> is no function of .model, batch."),
    ({"criterion": "taylor", "data": [(X.double(), LABELS)]},
     r"the model does not take a batch of the data, float64 \(8, 6\) and int64 \(8,\), as it is: "),
    ({"criterion": "hessian", "data": [(X[:, :5], LABELS)], "loss": lambda model, batch: model(batch[0]).sum()},
     r"the model does not take a batch of the data, float32 \(1, 5\)"),
    ({"recover": ["magic"]}, "recover = .'magic'. is no list of fusion, compensate, bn"),
    ({"criterion": "taylor", "data": iter([(X, LABELS)]), "steps": 2}, "data ends after one pass"),
    ({"plan": "plan.json"}, "plan= says what goes: leave out criterion, ratio"),
])  # fmt: skip
def test_calls_that_cannot_be(options: dict[str, Any], message: str):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        half(model, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_given_for_nothing_is_told():
    loader = [(X, LABELS)]
    assert "data is not scored on: criterion 'l2' needs none" in str(half(mlp(), data=loader))
    assert "calibration is not looked at: neither recover=[] nor" in str(half(mlp(), calibration=X))
    assert "calibration is not looked at: neither recover=['fusion']" in str(
        half(mlp(), calibration=X, recover=["fusion"])
    )
    told = str(half(mlp(), criterion="taylor", data=loader, calibration=X, recover=["bn"]))
    assert "is not" not in told


def test_a_plan_that_takes_nothing_says_so():
    for options in ({"ignore": ["*"]}, {"round_to": 64}, {"ratio": 0.01}, {"max_ratio": 0.0}):
        assert "Nothing goes: " in str(half(mlp(), **options))
    assert "Nothing goes: " not in str(half(mlp()))


class Functional(nn.Module):
    """Most of its work is done by weights that no layer holds, and that the paper's counter does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(16, n)) for n in (6, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(F.linear(x, self.w1).relu(), self.w2).relu())


class Unidirectional(nn.Module):
    """The paper's counter charges its steps many times."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


@pytest.mark.parametrize(("model", "inputs"), [(Functional(), X), (Unidirectional(), X[None])])
def test_a_budget_in_macs_that_the_counters_disagree_about(model: nn.Module, inputs: Tensor):
    refused = r"takes .* MACs by the paper's counter, .* by the exact one: ask for that, macs_counter=\"exact\""
    for steps in (1, 2):
        with pytest.raises(UserError, match=refused):
            iso.prune(model, inputs, macs="50%", criterion="l2", steps=steps)
    with pytest.raises(UserError, match=refused):
        iso.plan(model, inputs, macs="50%", criterion="l2")
    exact = iso.plan(model, inputs, macs="50%", criterion="l2", macs_counter="exact")
    assert exact.after.macs_exact <= 0.5 * exact.before.macs_exact
    meant = iso.plan(model, inputs, macs="75%", criterion="l2", macs_counter="paper")
    assert meant.after.macs_paper <= 0.75 * meant.before.macs_paper
    assert iso.plan(model, inputs, ratio=0.5, criterion="l2").before.disputed


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_budgets_of_the_papers_families_are_in_the_papers_macs(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    costs = count_complexity(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert not costs.disputed
    disputed = Complexity(1, 10, 10)  # however they count
    check_counter(PlanOptions(macs="50%"), model, disputed, "macs_counter={}")
    with pytest.raises(UserError, match="macs_counter=exact"):
        check_counter(PlanOptions(macs="50%"), nn.Sequential(model), disputed, "macs_counter={}")


def test_models_and_inputs_that_cannot_be():
    with pytest.raises(UserError, match="the model does not take these inputs: .*mat1 and mat2"):
        iso.trace(mlp(), torch.randn(2, 5))
    for empty in (X[:0], (X[:0],), {"input": X[:0]}):
        with pytest.raises(UserError, match="inputs is an empty batch: give at least one item"):
            iso.prune(mlp(), empty, ratio=0.5, criterion="l2")
    with pytest.raises(UserError, match="inputs is list: give a tensor, a tuple"):
        iso.prune(mlp(), [X], ratio=0.5, criterion="l2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"wrapped in DataParallel: prune model\.module, and wrap the result anew"):
        half(nn.DataParallel(mlp()))
    with pytest.raises(UserError, match=r"the model is a class, Functional: give a model that it makes, Functional\("):
        half(Functional)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the model is a ScriptModule, whose code is compiled: prune the module that"):
        half(torch.jit.trace(mlp(), X))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="0 is a ScriptModule"):
        half(nn.Sequential(torch.jit.trace(nn.Linear(6, 6), X), *mlp()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'rato': did you mean ratio=?"):
        iso.prune(mlp(), X, rato=0.5)
    with pytest.raises(UserError, match="the plan belongs to another model"):
        iso.prune(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), X, plan=half(mlp()).plan)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.aux, self.gate = mlp(), nn.Linear(6, 7), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.gate(x).sigmoid()


def test_layers_that_have_nothing_to_give_say_why():
    with pytest.raises(UserError, match="ratios 'aux': the forward pass on these inputs does not use aux"):
        half(Auxiliary(), ratios={"aux": 0.5})
    with pytest.raises(UserError, match="ratios 'gate': what gate makes is a single channel, which cannot go"):
        half(Auxiliary(), ratios={"gate": 0.5})
    spared: Any = half(Auxiliary(), ignore=["aux", "gate", "net.4"]).model  # they keep what they make: that is true
    sizes = [layer.out_features for layer in (spared.aux, spared.gate, spared.net[0])]
    assert sizes == [7, 1, 7]  # net.0 is of one class with net.2


def test_what_is_right_of_data_and_losses_is_taken():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    assert sum(widths(half(mlp(), criterion="taylor", data=loader).model)) == 16
    images = [X, X + 1]  # two batches of a loss without labels
    done = half(mlp(), criterion="taylor", data=images, loss=lambda model, batch: model(batch).square().sum())
    assert sum(widths(done.model)) == 16

    class Own(nn.Module):
        def forward(self, model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).square().sum()

    assert sum(widths(half(mlp(), criterion="taylor", data=images, loss=Own()).model)) == 16
    with pytest.raises(KeyError, match="labels"):  # a loss of one's own may fail as it likes
        half(mlp(), criterion="taylor", data=images, loss=lambda model, batch: model(batch).sum() + {}["labels"])


def test_libraries_that_have_a_model_of_the_same_name(tmp_path: Path):
    resnet = torchvision.models.resnet18(num_classes=4)
    pruned = iso.prune(resnet, torch.randn(1, 3, 32, 32), ratio=0.5, criterion="l1")
    with pytest.raises(UserError, match="resnet18 of timm is another model: .* save it with builder='torchvision'"):
        pruned.save(tmp_path / "net.safetensors", name="resnet18", kwargs={"num_classes": 4})
    assert not (tmp_path / "net.safetensors").exists()
    pruned.save(tmp_path / "net.safetensors", name="resnet18", builder="torchvision", kwargs={"num_classes": 4})
    with pytest.raises(UserError, match='torchvision has it: --is-torchvision, in Python builder="torchvision"'):
        iso.load_model("mobilenet_v2", pretrained=False)
    torch.save(resnet.state_dict(), tmp_path / "sd.pt")
    with pytest.raises(UserError, match=r"sd.pt is no file of pruned.save\(\).*model.load_state_dict before you prune"):
        iso.load_model(tmp_path / "sd.pt", model=resnet)
    for model, message in [(type(resnet), "model= is a class, ResNet"), (torch.jit.script(mlp()), "is a ScriptModule")]:
        with pytest.raises(UserError, match=message):
            iso.load_model(tmp_path / "net.safetensors", model=model)  # type: ignore[arg-type]


NAMES = ("ant", "bee", "cat", "dog")


def test_a_saved_model_knows_what_its_logits_stand_for_and_keeps_it_when_it_is_pruned_again(tmp_path: Path):
    half(mlp()).save(tmp_path / "first.safetensors", class_names=list(NAMES))
    assert stored_class_names(tmp_path / "first.safetensors") == NAMES
    loaded = iso.load_model(tmp_path / "first.safetensors", model=mlp())
    for number, inplace in enumerate((False, True)):  # nothing is said of names
        half(loaded, inplace=inplace).save(path := tmp_path / f"{number}.safetensors")
        assert stored_class_names(path) == NAMES
    half(loaded).save(tmp_path / "renamed.safetensors", class_names=["a", "b", "c", "d"])
    assert stored_class_names(tmp_path / "renamed.safetensors") == ("a", "b", "c", "d")
    half(mlp()).save(tmp_path / "nameless.safetensors")
    assert "class_names" not in read_header(tmp_path / "nameless.safetensors")


def test_class_names_of_a_model_that_is_built_by_name(tmp_path: Path):
    kwargs = {"channels": [8, 8, 8, 8], "stem_width": 8, "num_classes": 4}
    image = torch.randn(1, 3, 32, 32)
    dense = iso.load_model("resnet10t", kwargs=kwargs, pretrained=False)
    pruned = iso.prune(dense, image, ratio=0.5, criterion="l2")
    pruned.save(tmp_path / "net.safetensors", name="resnet10t", kwargs=kwargs, class_names=NAMES)
    loaded: Any = iso.load_model(tmp_path / "net.safetensors")
    again = iso.prune(loaded, image, ratio=0.25, criterion="l2")
    again.save(tmp_path / "again.safetensors", name="resnet10t", kwargs=kwargs)
    assert open_model(tmp_path / "again.safetensors")[1].class_names == NAMES
    fresh = iso.load_model(tmp_path / "net.safetensors", num_classes=7)  # another head, other classes
    iso.prune(fresh, image, ratio=0.25, criterion="l2").save(tmp_path / "fresh.safetensors")
    loaded.reset_classifier(7)
    iso.prune(loaded, image, ratio=0.25, criterion="l2").save(tmp_path / "reset.safetensors")
    assert (
        stored_class_names(tmp_path / "fresh.safetensors") == () == stored_class_names(tmp_path / "reset.safetensors")
    )


def test_class_names_that_cannot_be(tmp_path: Path):
    pruned = half(mlp())
    with pytest.raises(UserError, match=r"class_names has 3 names, but the model's output is \(8, 4\)"):
        pruned.save(tmp_path / "net.safetensors", class_names=["ant", "bee", "cat"])
    for wrong in ("ants", [], [1, 2, 3, 4], {"ant": 0}):
        with pytest.raises(UserError, match="class_names is a list of texts in the order of the logits"):
            pruned.save(tmp_path / "net.safetensors", class_names=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "net.safetensors").exists()

    class Maps(nn.Module):  # classes by pixel, in a dict, behind a value that only data tell
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aux": self.stem(x if float(x.sum()) else -x).mean(), "out": self.head(self.stem(x).relu())}

    segmenter = iso.prune(Maps(), torch.randn(1, 3, 8, 8), ratio=0.5, criterion="l2")
    segmenter.save(tmp_path / "maps.safetensors", class_names=NAMES)
    assert stored_class_names(tmp_path / "maps.safetensors") == NAMES
