"""Gradients of any loss on any batch, and of single images in one pass or one after the other."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure import precision
from isomorphic.measure.precision import Auto
from isomorphic.pruning import gradients
from isomorphic.pruning.gradients import accumulate, rank_correlation, split_batch

INPUTS, LABELS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])


def mlp(outputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))


class Tied(nn.Module):
    """A tied weight, keyword inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.mix(self.embed(ids)).relu().mean(1)) * scale}


class BatchNormCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Branching(nn.Module):
    """Looks at values, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.other(x)


def tied_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(**batch["inputs"])["logits"], batch["labels"])


def cases() -> dict[str, tuple[nn.Module, Any, Any]]:
    torch.manual_seed(1)
    images = (torch.randn(5, 3, 8, 8), LABELS)
    words = {"inputs": {"ids": torch.randint(9, (5, 3)), "scale": torch.tensor(2.0)}, "labels": LABELS}
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    attention = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), encoder, nn.Flatten(), nn.Linear(24, 4))
    return {
        "mlp": (mlp(), (INPUTS, LABELS), None),
        "batch norm": (BatchNormCnn(), images, None),
        "tied, dict": (Tied(), words, tied_loss),
        "attention": (attention, (INPUTS, LABELS), None),
        "branching": (Branching(), (INPUTS, LABELS), None),
    }


def squares_one_by_one(model: nn.Module, batch: Any, loss: Any) -> dict[str, Tensor]:
    """The definition: the mean over images of each image's squared gradient."""
    model.eval()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    images = split_batch(batch)
    for image in images:
        values = torch.autograd.grad(loss(model, image), list(model.parameters()), allow_unused=True)
        for name, gradient in zip(found, values, strict=True):
            found[name] += 0 if gradient is None else gradient.square() / len(images)
    return found


@pytest.mark.parametrize("name", cases())
def test_squares_of_single_images_whichever_way(name: str, monkeypatch: pytest.MonkeyPatch):
    model, batch, loss = cases()[name]
    expected = squares_one_by_one(model, batch, loss or gradients.classification_loss)
    passes: list[slice] = []
    of_images = gradients._Gradients._of_images
    monkeypatch.setattr(gradients._Gradients, "_of_images", lambda *args: passes.append(args[-1]) or of_images(*args))
    monkeypatch.setattr(gradients, "MOST_NUMBERS", 3 * sum(p.numel() for p in model.parameters()))  # chunks of three
    found = accumulate(model, [batch], "squared_gradient", loss=loss)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-9 + 1e-6 * float(values.max()))
    one_pass = [slice(0, 1), slice(0, 3), slice(3, 6)]  # the first is the trial
    assert passes == ([slice(0, 1)] if name == "branching" else one_pass)


@pytest.mark.parametrize("name", ["vit", "deit", "convnext", "resnet", "cnn"])
def test_both_ways_agree_to_a_millionth(name: str, traced: Any, batches: Any, monkeypatch: pytest.MonkeyPatch):
    model = traced(name, "exact").copy()
    ways = []
    for most_parameters in (0, 1_000_000):  # the loop, and one pass
        monkeypatch.setattr(gradients, "MOST_PARAMETERS_ON_CPU", most_parameters)
        ways.append(accumulate(model, batches, "squared_gradient"))
    loop, one_pass = ways
    assert any(not torch.equal(loop[key], values) for key, values in one_pass.items())  # they are two ways
    for key, values in loop.items():
        assert (one_pass[key] - values).norm() <= 1e-6 * values.norm(), key


class OwnBackward(torch.autograd.Function):
    """Its forward and backward are written for plain tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class Refused(nn.Module):
    """Does what vmap cannot run, on the way from one layer to the other."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(6, 8), nn.Linear(8, 4), step
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self, self.first(x)))


def counted(model: Any, x: Tensor) -> Tensor:
    model.seen.add_(x.detach().abs().mean(0))
    return x


REFUSED: dict[str, Any] = {
    "item": lambda model, x: x * float(x.detach().abs().max().item()),
    "own backward": lambda model, x: OwnBackward.apply(x),
    "buffer in place": counted,
    "mask by value": lambda model, x: x.masked_fill(x < 0, 0)[:, x.detach()[0] > -1e9],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vmap_refuses_takes_the_loop(name: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = Refused(REFUSED[name])
    expected = squares_one_by_one(copy.deepcopy(model), (INPUTS, LABELS), gradients.classification_loss)
    passes: list[slice] = []
    of_images = gradients._Gradients._of_images
    monkeypatch.setattr(gradients._Gradients, "_of_images", lambda *args: passes.append(args[-1]) or of_images(*args))
    found = accumulate(model, [(INPUTS, LABELS)] * 2, "squared_gradient")
    assert passes == [slice(0, 1)]  # the trial on the first batch, and none on the second
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-9)
    assert not model.get_buffer("seen").any()  # put back


def test_recurrent_layers_take_the_loop():
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": nn.GRU(2, 5, batch_first=True), "head": nn.Linear(5, 4)})

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model["head"](model["rnn"](batch[0].view(-1, 3, 2))[0][:, -1]), batch[1])

    expected = squares_one_by_one(model, (INPUTS, LABELS), loss)
    found = accumulate(model, [(INPUTS, LABELS)], "squared_gradient", loss=loss)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-5, atol=1e-9)


def test_a_later_batch_that_vmap_refuses_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    """Chunks of two images: the second batch fails in its second chunk, when its first has been summed already."""
    model = mlp()
    of_images, passes = gradients._Gradients._of_images, []

    def refusing(*args: Any) -> Any:
        passes.append(args[-1])
        if len(passes) == 1 + 3 + 2:  # the trial, the first batch, two chunks
            raise RuntimeError("vmap: not this one")
        return of_images(*args)

    monkeypatch.setattr(gradients._Gradients, "_of_images", refusing)
    monkeypatch.setattr(gradients, "MOST_NUMBERS", 2 * sum(p.numel() for p in model.parameters()))
    batches = [(INPUTS, LABELS), (INPUTS.flip(0) + 1, LABELS), (INPUTS - 1, LABELS)]
    found = accumulate(model, batches, "squared_gradient")
    assert len(passes) == 6  # the loop from then on
    expected = [squares_one_by_one(model, batch, gradients.classification_loss) for batch in batches]
    for key, values in found.items():
        torch.testing.assert_close(values, sum(part[key] for part in expected) / 3, rtol=1e-5, atol=1e-9)


def test_large_models_on_a_cpu_take_the_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gradients, "MOST_PARAMETERS_ON_CPU", 10)
    monkeypatch.setattr(gradients._Gradients, "_of_images", None)  # not called
    found = accumulate(mlp(), [(INPUTS, LABELS)], "squared_gradient")
    expected = squares_one_by_one(mlp(), (INPUTS, LABELS), gradients.classification_loss)
    assert all(torch.allclose(found[name], values, atol=1e-9) for name, values in expected.items())


@dataclasses.dataclass
class Sample:
    points: Tensor
    targets: list[Tensor]
    name: str = "set"


class Unsteady(nn.Module):
    """Draws at random and counts its calls, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("columns", torch.arange(4).expand(3, 4))  # cannot be written to

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return F.dropout(F.batch_norm(self.layer(x), self.norm.running_mean, self.norm.running_var, training=True))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("statistic", ["gradient", "squared_gradient"])
def test_buffers_and_the_random_state_are_put_back(statistic: str, fails: bool):
    model = Unsteady()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pairs = torch.stack([INPUTS, INPUTS + 1], dim=1)  # "images" of (2, 6) that a batch norm in training can take

    def of_pairs(model: nn.Module, batch: Any) -> Tensor:
        answer = model(batch[0].flatten(0, 1)).unflatten(0, (-1, 2)).mean(1)
        return F.cross_entropy(answer, batch[1]) * (torch.nan if fails else 1)

    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        accumulate(model, [(pairs, LABELS)], statistic, loss=of_pairs)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_gradients_of_half_precision_are_summed_in_float32():
    model = mlp().bfloat16()
    inputs = INPUTS.bfloat16()
    batches = [(inputs, LABELS), (inputs * 0.01, LABELS)]
    found = accumulate(model, batches, "gradient")
    parts = []
    for batch in batches:
        gradient = torch.autograd.grad(gradients.classification_loss(model, batch), list(model.parameters()))
        parts.append([part.float() for part in gradient])
    for values, *one_each in zip(found.values(), *parts, strict=True):
        assert values.dtype == torch.float32
        assert torch.equal(values, one_each[0] + one_each[1])
    assert any(not torch.equal(values, values.bfloat16().float()) for values in found.values())
    squares = accumulate(model, batches, "squared_gradient")
    assert all(values.dtype == torch.float32 for values in squares.values())


def test_soft_labels_have_a_cross_entropy():
    soft = F.one_hot(LABELS, 4).float() * 0.9 + 0.025
    found = accumulate(mlp(), [(INPUTS, soft)], "gradient")
    model = mlp()
    expected = torch.autograd.grad(F.cross_entropy(model(INPUTS), soft), list(model.parameters()))
    for values, gradient in zip(found.values(), expected, strict=True):
        assert torch.equal(values, gradient)


def test_an_empty_batch_has_no_images():
    found = accumulate(mlp(), [(INPUTS, LABELS), (INPUTS[:0], LABELS[:0])], "squared_gradient")
    expected = accumulate(mlp(), [(INPUTS, LABELS)], "squared_gradient")
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_batches_are_split_wherever_their_tensors_are():
    weights = torch.ones(3)
    batch = Sample(INPUTS, [LABELS, weights, torch.tensor(2.0)])
    images = split_batch(batch)
    assert len(images) == 5 and images[3].name == "set" and images[3].points.shape == (1, 6)
    assert images[3].targets[0].tolist() == [3] and images[3].targets[1] is weights
    assert batch.points.shape == (5, 6)
    assert split_batch({"a": INPUTS, "b": (LABELS,)})[1]["b"][0].tolist() == [1]
    with pytest.raises(UserError, match="no tensors"):
        split_batch([1, 2])


def test_any_loss_on_any_batch():
    model = mlp(outputs=1)
    targets = INPUTS.sum(1, keepdim=True)
    found = accumulate(
        model, [Sample(INPUTS, [targets])] * 2, "gradient", loss=lambda m, b: F.mse_loss(m(b.points), b.targets[0])
    )
    F.mse_loss(model(INPUTS), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], 2 * parameter.grad)  # a sum over batches


@pytest.mark.parametrize(
    ("outputs", "batches", "loss", "message"),
    [
        (1, [(INPUTS, torch.randn(5, 1))], None, "no gradient anywhere.*pass loss="),  # a regression
        (4, [{"x": INPUTS}], None, r"a batch is dict, not \(inputs, labels\): pass loss="),
        (4, [INPUTS], None, "a batch is Tensor, not"),
        (4, [(INPUTS, torch.randn(5, 3))], None, r"no cross entropy of outputs \(5, 4\).*pass loss="),
        (4, [(INPUTS, torch.randn(5, 4))], None, "neither classes nor probabilities of classes: pass loss="),
        (4, [(INPUTS, torch.rand(5, 4))], None, "neither classes nor probabilities of classes: pass loss="),
        (4, [(INPUTS, LABELS)], lambda m, b: m(b[0]), r"the loss has shape \(5, 4\), it is no scalar"),
        (4, [(INPUTS, LABELS)], lambda m, b: 1.0, "the loss is float, not a tensor"),
        (4, [(INPUTS, LABELS)], lambda m, b: m(b[0]).sum() / 0, "the loss on the scoring images is -?(inf|nan)"),
        (4, [(INPUTS, LABELS)], lambda m, b: m(b[0]).detach().sum(), "does not depend on the model's parameters"),
        (4, [], None, "no images to score on"),
    ],
)
def test_what_is_wrong_with_data_or_loss(outputs: int, batches: list[Any], loss: Any, message: str):
    model = mlp(outputs).train()
    with pytest.raises(UserError, match=message):
        accumulate(model, batches, "gradient", loss=loss)
    assert all(module.training for module in model.modules())  # put back after an error, too


def test_outputs_without_classes_ask_for_a_loss():
    model = nn.Sequential(mlp(1), nn.Flatten(0))
    with pytest.raises(UserError, match=r"the model returns \(5,\), not logits \(N, classes, …\): pass loss="):
        accumulate(model, [(INPUTS, torch.rand(5))], "gradient")


def test_outputs_that_are_no_tensor_ask_for_a_loss():
    words = ({"ids": torch.randint(9, (5, 3)), "scale": torch.tensor(2.0)}, LABELS)
    with pytest.raises(UserError, match="the model returns dict, not a tensor of logits: pass loss="):
        accumulate(Tied(), [words], "gradient")


# --- precision ---


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any processor is fast in bfloat16, and any work is worth a comparison: before the first batch."""
    monkeypatch.setattr(precision, "is_fast_in_bf16", lambda device: True)
    monkeypatch.setattr(precision, "FULL_FIRST", 0)


@pytest.mark.parametrize("statistic", ["gradient", "squared_gradient"])
@pytest.mark.parametrize(("least", "expected"), [(-1.0, torch.bfloat16), (1.01, None)], ids=["alike", "unlike"])
def test_bf16_is_taken_where_units_rank_alike(at_once, monkeypatch, statistic: str, least: float, expected: Any):
    """The comparison leaves no trace in the sums, whichever way it ends."""
    monkeypatch.setattr(gradients, "RANKS_ALIKE", least)
    batches = [(INPUTS, LABELS), (INPUTS.flip(0), LABELS)]
    found = accumulate(mlp(), batches, statistic, amp_dtype=Auto(1))
    wanted = accumulate(mlp(), batches, statistic, amp_dtype=expected)
    other = accumulate(mlp(), batches, statistic, amp_dtype=None if expected else torch.bfloat16)
    assert all(torch.equal(found[name], values) for name, values in wanted.items())
    assert any(not torch.equal(found[name], values) for name, values in other.items())


def test_the_choice_names_the_rank_correlation(at_once, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(precision, "stage", said.append)
    accumulate(mlp(), [(INPUTS, LABELS)], "gradient", amp_dtype=Auto(1))
    (line,) = said
    begin, correlation = line.split("Spearman ")
    assert begin == "scoring in bf16: the units of a batch rank as in fp32 ("
    assert 0.99 < float(correlation.rstrip(")")) <= 1


def test_rank_correlation_is_spearmans_weighted_by_units():
    first = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([1.0, 2.0]), "same": torch.ones(9)}
    second = {"a": torch.tensor([10.0, 30.0, 20.0]), "b": torch.tensor([5.0, 4.0]), "same": torch.rand(9)}
    assert rank_correlation(first, first) == 1
    assert rank_correlation(first, second) == pytest.approx((3 * 0.5 + 2 * -1) / 5)
    assert rank_correlation({"same": torch.ones(9)}, second) == 0
    assert rank_correlation({"a": first["a"]}, {"a": torch.ones(3)}) == 0, "all alike in low precision"


def test_gradients_are_the_sum_over_batches_for_parameters_of_any_precision():
    """Those of float32 are added up in place by autograd, those of other types are added to a float32 sum."""
    layers = list(mlp())
    model = nn.Sequential(*layers[:2], Cast(), layers[2].bfloat16())
    batches = [(INPUTS, LABELS), (INPUTS.flip(0), LABELS), (2 * INPUTS, LABELS)]
    found = accumulate(model, batches, "gradient")
    for name, parameter in model.named_parameters():
        parts = []
        for inputs, labels in batches:
            loss = F.cross_entropy(model(inputs).float(), labels)
            parts.append(torch.autograd.grad(loss, parameter)[0].float())
        assert torch.equal(found[name], parts[0] + parts[1] + parts[2])
        assert parameter.grad is None


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()
