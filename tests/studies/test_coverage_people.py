"""The coverage study's models of other libraries: what is in the list, what is left out, and how heads are counted."""

from __future__ import annotations

import csv
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.inputs import call, tensors_in
from studies.coverage import people
from studies.coverage.__main__ import find_people
from studies.coverage.heads import count_heads
from studies.coverage.people import ENTRIES, entry

LIBRARIES = sorted({entry.set for entry in ENTRIES})


def test_the_list_holds_what_it_promises():
    names = [entry.model for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 80
    assert len(set(LIBRARIES) - {"plain"}) >= 10
    assert [entry.model for entry in ENTRIES if not entry.model.startswith(f"{entry.set}/")] == []


def test_entries_reach_another_process_by_their_names():
    assert all(pickle.loads(pickle.dumps(entry)) is entry for entry in ENTRIES)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_s_first_model_runs(library: str):
    name = entry.IMPORTED_AS.get(library, library)
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{library} is not installed (studies/coverage/requirements.txt)")
    torch.manual_seed(0)
    example = next(entry for entry in ENTRIES if entry.set == library).example()
    assert tensors_in(call(example.model.eval(), example.inputs))


def test_what_is_not_installed_is_one_line_a_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    missing = [entry.Entry("nowhere", f"nowhere/{name}", ENTRIES[0].example) for name in ("a", "b")]
    plain = next(entry for entry in ENTRIES if entry.set == "plain")
    kept, lines = people.installed([*missing, plain])
    assert (kept, lines) == ([plain], ["nowhere is not installed, left out: nowhere/a, nowhere/b"])
    monkeypatch.setitem(entry.IMPORTED_AS, "plain", "nowhere")
    with pytest.raises(UserError, match="nothing to measure: install studies/coverage/requirements.txt"):
        find_people([plain.model])
    assert capsys.readouterr().out == f"plain is not installed, left out: {plain.model}\n"
    with pytest.raises(UserError, match="plain/nothing: not in studies/coverage/people"):
        find_people(["plain/nothing"])


@pytest.mark.slow
def test_rows_of_plain_models(run_study: Callable[..., Any], tmp_path: Path):
    flags = ("--set", "people", "--only", "plain/siamese", "plain/transformer", "--csv", tmp_path / "rows.csv")
    done = run_study("coverage", "--jobs", "2", *flags)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "rows.csv", newline="") as file:
        siamese, transformer = csv.DictReader(file)
    assert (siamese["set"], siamese["model"], siamese["status"]) == ("plain", "plain/siamese", "ok")
    assert float(siamese["prunable"]) == round((16 + 32 + 32) / (16 + 32 + 32 + 1), 4)
    assert siamese["frozen"] == "it is a single channel 1.2%" and float(siamese["isomorphic_error"]) < 1e-9
    assert (siamese["heads"], siamese["heads_stay"]) == ("0", "0")
    assert transformer["status"] == "ok"
    assert int(transformer["heads"]) + int(transformer["heads_stay"]) == 4 * (2 + 2 * 2)
    assert "plain: 2 of 2 ran" in done.stdout and "of 24 heads can go" in done.stdout


def test_people_are_measured_by_themselves(run_study: Callable[..., Any]):
    done = run_study("coverage", "--set", "timm", "people")
    assert done.returncode == 2 and "measure it by itself" in done.stderr


class Attention(nn.Module):
    """Four query heads on two key heads, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.q, self.kv = way, nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.way == "grouped":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
        if self.way == "fused":
            return F.scaled_dot_product_attention(query=q, key=k, value=v)
        return F.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


class Twice(nn.Module):
    """One attention that runs twice, and softmaxes that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention("plain")

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.attention(x), self.attention(2 * x)
        return first.softmax(dim=1) + second + x.softmax(-1).sum()


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Attention("plain"), 4),
        (Attention("fused"), 4),
        (Attention("grouped"), 2),
        (Twice(), 4),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        (nn.Linear(8, 8), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_heads_are_counted_where_attention_runs(model: nn.Module, heads: int):
    assert count_heads(model.eval(), torch.randn(2, 5, 8)) == heads
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
