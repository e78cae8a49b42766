"""The moving average against one written by hand, and its decay against the reference trainer's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isomorphic.training.ema import adjusted_decay, build_ema
from isomorphic.training.recipe import EmaRecipe


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())


def test_every_update_is_the_average_by_hand():
    model = small_model().train()
    ema = build_ema(model, EmaRecipe(model_ema=True, model_ema_decay=0.75))
    assert ema is not None and not any(module.training for module in ema.module.modules())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(2, 3, 4, 4))  # the batch norm counts and averages
        ema.update(model, step=step)
        kept = 0.0 if step == 1 else 0.75  # nobody wants the weights from before training
        for name, tensor in model.state_dict().items():
            floats = tensor.is_floating_point()
            expected[name] = kept * expected[name] + (1 - kept) * tensor if floats else tensor.clone()
    state = ema.module.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), name
    assert state["1.num_batches_tracked"].item() == 4 and state["1.num_batches_tracked"].dtype == torch.int64
    assert not torch.allclose(state["1.running_var"], model.state_dict()["1.running_var"])
    assert not torch.allclose(state["0.weight"], model.state_dict()["0.weight"])


def test_training_the_model_does_not_touch_the_average():
    model = small_model()
    ema = build_ema(model, EmaRecipe(model_ema=True))
    assert ema is not None
    before = {name: tensor.clone() for name, tensor in ema.module.state_dict().items()}
    nn.init.zeros_(model[0].weight)  # type: ignore[index, arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.module.state_dict().items())
    assert ema.decay == 0.99998


def test_there_is_none_unless_the_recipe_says_so():
    assert build_ema(small_model(), EmaRecipe()) is None


@pytest.mark.parametrize(
    ("decay", "images", "steps", "epochs", "expected"),
    [
        (0.99998, 1024, 32, 600, 1 - 2e-5 * 1024 * 32 / 600),  # torchvision's recipe for ResNet50: 0.99890…
        (0.9999, 4096, 1, 300, 0.99863467),
        (0.99998, 16384, 32, 10, 0.0),  # too long for such an average: it is the model
        (1.0, 1024, 32, 600, 1.0),
    ],
)
def test_adjusted_decay(decay: float, images: int, steps: int, epochs: int, expected: float):
    assert adjusted_decay(decay, global_batch=images, steps=steps, epochs=epochs) == pytest.approx(expected, abs=1e-8)
