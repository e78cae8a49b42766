"""Compiling ahead of a measurement: for which batches, under which settings, and what is said where it fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.compilation import compile_model


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What stands in for torch.compile is called with: shape, format, gradients, autocast."""
    calls: list[tuple[Any, ...]] = []

    def fake(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            is_last = images.is_contiguous(memory_format=torch.channels_last)
            calls.append((*images.shape, is_last, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return model(images)

        return forward

    monkeypatch.setattr(torch, "compile", fake)
    return calls


def test_each_size_of_batch_is_compiled_once_as_it_will_be_run(compiled_for: list[tuple[Any, ...]]):
    image = torch.ones(1, 3, 4, 4)
    compile_model(nn.Flatten(), image, [5, 5, 2])
    compile_model(nn.Flatten(), image.to(memory_format=torch.channels_last), [5], amp_dtype=torch.bfloat16)
    assert compiled_for == [
        (5, 3, 4, 4, False, False, False),
        (2, 3, 4, 4, False, False, False),
        (5, 3, 4, 4, True, False, True),
    ]


def test_a_compiler_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with pytest.raises(UserError, match="^--compile does not work here: No working C.. compiler found; leave it out$"):
        compile_model(nn.Linear(3, 2).eval(), torch.ones(1, 3), [4])


@pytest.mark.slow
def test_a_compiled_model_says_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    compiled = compile_model(model, torch.ones(1, 3, 6, 6), [4, 3])
    for size in (4, 3, 2):
        images = torch.randn(size, 3, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)
