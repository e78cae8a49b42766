"""Gradients of any loss on any batch, and of single images in one pass or one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.pruning import gradients
from isomorphic.pruning.gradients import accumulate, split_batch

INPUTS, LABELS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])


def mlp(outputs: int = 4) -> nn.Module:
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


def test_outputs_that_are_no_tensor_ask_for_a_loss():
    words = ({"ids": torch.randint(9, (5, 3)), "scale": torch.tensor(2.0)}, LABELS)
    with pytest.raises(UserError, match="the model returns dict, not a tensor of logits: pass loss="):
        accumulate(Tied(), [words], "gradient")
