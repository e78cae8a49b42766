"""What captured graphs return, and what is said of models that cannot be captured."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.exporting.capture import capture, output_names, plain_outputs
from isomorphic.inputs import call
from tests.unit.exporting import networks
from tests.versions import needs_newest_export

pytestmark = needs_newest_export

HERE = Path(networks.__file__)


def line_number(code: str) -> int:
    return 1 + [line.strip() for line in HERE.read_text().splitlines()].index(code)


@pytest.mark.parametrize(
    ("network", "code", "reason"),
    [
        (networks.Branch, "if x.sum() > 0:", "it decides by numbers that are only known when the model runs"),
        (networks.ToNumpy, "return torch.from_numpy(self.layer(x).detach().numpy())", ".numpy() is not supported"),
        (networks.Looped, "return torch.stack([self.layer(row) for row in x])", "fixed_batch=True (--fixed-batch 1)"),
        (networks.Viewed, "return self.layer(x).view(2, -1)", "the model's code fixes the batch"),
        (networks.Odd, "return self.layer(x) if len(x) % 2 else x", "the model's code fixes the batch"),
    ],
)
def test_the_line_that_cannot_be_captured_is_named(
    network: type[nn.Module], code: str, reason: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError) as caught:
        capture(network().eval(), torch.randn(1, 4), any_batch=True, outputs=plain_outputs)
    told = str(caught.value)
    assert f"networks.py:{line_number(code)}, `{code}`" in told and reason in told
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("network", [networks.Looped, networks.Odd])
def test_what_fixes_the_batch_can_be_captured_for_one(network: type[nn.Module]):
    model, images = network().eval(), torch.randn(3, 4)
    program = capture(model, images, any_batch=False, outputs=plain_outputs)
    assert torch.equal(program.module()(images), model(images))


def test_a_table_for_the_last_batch_is_forgotten():
    model = networks.Anchored().eval()
    model(torch.randn(3, 4))
    program = capture(model, torch.randn(1, 4), any_batch=True, outputs=plain_outputs).module()
    for size in (1, 3, 5):
        images = torch.randn(size, 4)
        assert torch.allclose(program(images), model(images))


def test_the_length_of_a_batch_stays_free():
    model = networks.Measured().eval()
    program = capture(model, torch.randn(1, 4), any_batch=True, outputs=plain_outputs).module()
    assert program(torch.randn(5, 4)).shape == (5, 2, 2)


def test_other_classes_become_dicts():
    boxes, pair = networks.Boxes(torch.ones(1), 2, [torch.zeros(1)]), networks.Pair(torch.ones(2), torch.ones(3))
    found = plain_outputs(None, (boxes, pair))
    assert found == (
        {"scores": torch.ones(1), "count": 2, "corners": [torch.zeros(1)]},
        {"mean": pair.mean, "spread": pair.spread},
    )
    assert type(plain_outputs(None, OrderedDict(a=torch.ones(1)))) is dict
    assert plain_outputs(None, object()) is None


def test_keyword_and_nested_inputs_keep_their_batch_free():
    class Model(networks.Net):
        def forward(self, pair, *, scale, offset=None):
            return self.layer(pair["a"]) * scale + pair["b"][0]

    model = Model().eval()
    inputs = {"scale": torch.randn(1, 1), "pair": {"a": torch.randn(1, 4), "b": (torch.randn(1, 4), 2)}, "offset": None}
    program = capture(model, inputs, any_batch=True, outputs=plain_outputs).module()
    three = {"scale": torch.randn(3, 1), "pair": {"a": torch.randn(3, 4), "b": (torch.randn(3, 4), 2)}, "offset": None}
    assert torch.allclose(call(program, three), call(model, three))


def test_sizes_that_only_look_like_the_batch_stay():
    class Model(networks.Net):
        def forward(self, x, table):
            return self.layer(x) @ table

    model = Model().eval()
    program = capture(model, (torch.randn(1, 4), torch.randn(4, 2)), any_batch=True, outputs=plain_outputs)
    shapes = [tuple(map(str, node.meta["val"].shape)) for node in program.graph.nodes if node.name in ("x", "table")]
    assert re.fullmatch(r"s\d+", shapes[0][0]) and shapes[1] == ("4", "2")


def test_outputs_are_named_by_their_places():
    places = ["output['logits']", "output['boxes'][0].corners", "output", "output[0]", "output['logits_out']"]
    names = ["logits_out", "boxes_0_corners", "output", "output_0", "logits_out_out"]
    assert output_names(places, taken=["logits"]) == names


def test_a_way_of_its_own_for_large_batches_is_told(tmp_path: Path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.shape[0] < 64 else self.layer(x).relu()

    with pytest.raises(UserError, match="takes another way for batches of more than 63, and a graph holds one: let it"):
        iso.export(Net(), torch.randn(1, 4), tmp_path / "net.pt2")
    assert iso.export(Net(), torch.randn(1, 4), tmp_path / "net.pt2", fixed_batch=True).difference.value == 0
