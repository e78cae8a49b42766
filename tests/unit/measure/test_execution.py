"""Ways to run a model: how they are written, and what they do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure import execution
from isomorphic.measure.execution import ExecutionMode, batch_runner, parse_mode


@pytest.mark.parametrize(
    ("text", "mode", "written"),
    [
        ("eager", ExecutionMode(), "fp32"),
        ("fp32", ExecutionMode(), "fp32"),
        ("bf16+channels_last", ExecutionMode(torch.bfloat16, channels_last=True), "bf16+channels_last"),
        ("compile+fp16", ExecutionMode(torch.float16, compiled=True), "fp16+compile"),
        ("eager+cuda_graph", ExecutionMode(cuda_graph=True), "fp32+cuda_graph"),
    ],
)
def test_modes_as_people_write_them(text: str, mode: ExecutionMode, written: str):
    assert parse_mode(text) == mode and str(mode) == written and parse_mode(written) == mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf17", "'bf17' is no way to run a model: join fp32, bf16, fp16, eager, "),
        ("", "'' is no way"),
        ("fp32+bf16", "contradicts or repeats itself"),
        ("eager+compile", "contradicts"),
        ("compile+compile", "repeats"),
    ],
)
def test_what_is_no_mode(text: str, message: str):
    with pytest.raises(UserError) as caught:
        parse_mode(text)
    assert message in str(caught.value)


class Formats(nn.Module):
    """Notes the memory formats of images and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        last = torch.channels_last
        self.seen.append(
            (images.is_contiguous(memory_format=last), self.layer.weight.is_contiguous(memory_format=last))
        )
        return self.layer(images)


def test_channels_last_is_that_of_a_copy():
    model, images = Formats().eval(), torch.randn(1, 3, 8, 8)
    run: Any = batch_runner(model, images, 2, ExecutionMode(channels_last=True))
    run()
    copied = run.args[0]  # of a partial of `call`
    assert copied is not model and copied.seen == [(True, True)]
    batch_runner(model, images, 2, ExecutionMode())()
    assert model.seen == [(False, False)]


def test_inputs_by_name_and_masks_without_channels():
    class Masked(nn.Module):
        def forward(self, *, image: Tensor, mask: Tensor) -> tuple[int, int]:
            return len(image), len(mask)

    inputs = {"image": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(1, 4)}
    assert batch_runner(Masked(), inputs, 5, ExecutionMode(channels_last=True))() == (5, 5)


def test_each_model_is_compiled_for_one_size_apart_from_the_others(monkeypatch: pytest.MonkeyPatch):
    """After eight sizes or models of one class, torch.compile would go back to eager without an error."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(tuple(inputs[-1].shape) if inputs else None)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiler(model, backend=backend, **options))
    models = [nn.Sequential(nn.Linear(3, width), nn.ReLU()).eval() for width in range(4, 10)]
    image = torch.ones(1, 3)
    with torch.no_grad():
        runs = [batch_runner(model, image, size, ExecutionMode(compiled=True)) for model in models for size in (2, 1)]
        assert len(graphs) == len(runs) == 12
        for run in runs:
            run()
    assert len(graphs) == 12, "nothing was compiled again, and nothing fell back"


def test_a_model_that_a_cuda_graph_does_not_hold(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors …")

    monkeypatch.setattr(execution.torch.cuda, "device", refuse)
    message = "^a CUDA graph does not hold this model: CUDA error: operation not permitted .*; leave out cuda_graph$"
    with pytest.raises(UserError, match=message):
        execution.captured(lambda: None, torch.ones(1))
