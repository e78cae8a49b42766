"""The page: what stands on it, that it needs nothing from outside, and that nothing of a file is run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import isomorphic as iso
from isomorphic.checkpoints.open import read_header
from isomorphic.errors import UserError
from isomorphic.page.facts import CutFacts
from isomorphic.page.page import Subject, page
from isomorphic.page.subjects import read_subject

X = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def facts_on(text: str) -> list[dict[str, Any]]:
    """The figures as JSON that a page carries."""
    found = re.search(r'<script type="application/json" id="facts">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


class _Balance(HTMLParser):
    """Counts open elements, and what would be fetched."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_html(text: str) -> None:
    balance = _Balance()
    balance.feed(text)
    assert not balance.open and not balance.fetched and "url(" not in text and "@import" not in text


def test_a_page_has_the_checkpoints_figures(tmp_path: Path):
    pruned = iso.prune(mlp(), X, ratio=0.5, criterion="l2")
    pruned.save(tmp_path / "net.safetensors")
    pruned.report(tmp_path / "net.html")
    text = (tmp_path / "net.html").read_text()
    check_html(text)
    assert len(text) < 500_000
    (subject,) = facts_on(text)
    tensors = pruned.model.state_dict()
    widths = {layer["name"]: layer["after"] for layer in subject["cut"]["layers"]}
    assert widths == {name: len(tensors[f"{name}.weight"]) for name in ("0", "2", "4")}
    stored = read_header(tmp_path / "net.safetensors")["provenance"]
    assert subject["cut"] == stored["cut"] and stored["cut"]["after"] == pruned.after.figures()
    for shown in ("0.45 K → ", "Asked for: ratio 0.5", "16 → ", "it reaches the model&#x27;s output"):
        assert shown in text


def test_a_page_of_the_file_is_the_page_of_the_run(tmp_path: Path):
    pruned = iso.prune(mlp(), X, ratio=0.5, criterion="l2")
    pruned.save(tmp_path / "net.safetensors")
    subject = read_subject(tmp_path / "net.safetensors")
    assert subject.cut.to_dict() == pruned.facts.to_dict()
    assert subject.title == "net.safetensors"


def test_several_models_stand_side_by_side(tmp_path: Path):
    for ratio in (0.25, 0.5, 0.75):
        iso.prune(mlp(), X, ratio=ratio, criterion="l2").save(tmp_path / f"{ratio}.safetensors")
    text = page([read_subject(tmp_path / f"{ratio}.safetensors") for ratio in (0.25, 0.5, 0.75)])
    check_html(text)
    assert [subject["title"] for subject in facts_on(text)] == [f"{ratio}.safetensors" for ratio in (0.25, 0.5, 0.75)]
    first_layer = text.split('data-layer="0"')[1].split("</div>")[0]
    assert first_layer.count('<svg class="bar"') == 3 and "c2" in first_layer


def test_what_a_file_says_is_shown_and_never_run():
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'
    cut = iso.prune(mlp(), X, ratio=0.5, criterion="l2").facts.to_dict()
    cut["layers"][0]["name"] = cut["stages"][0]["name"] = cut["classes"][0]["title"] = cut["command"] = evil
    cut["stays"][0].update(layers=evil, reason=evil, where=evil)
    cut["asked"] = {evil: evil}
    provenance = {"command": evil, "commit": evil, "versions": {evil: evil}, "hardware": {"cpu": evil, "gpus": [evil]}}
    text = page([Subject(evil, evil, CutFacts.from_dict(json.loads(json.dumps(cut))), provenance)])
    check_html(text)
    assert text.count("<script") == 2 and "<img" not in text.split('id="facts"')[0]
    assert facts_on(text)[0]["cut"]["command"] == evil


@pytest.mark.parametrize("provenance", [{}, {"versions": 3, "hardware": [], "top1": "high", "latency_ms": None}])
def test_a_provenance_that_says_little_leaves_lines_out(provenance: dict[str, Any]):
    cut = iso.prune(mlp(), X, ratio=0.5, criterion="l2").facts
    text = page([Subject("a", "b", cut, provenance)])
    check_html(text)
    assert "Top-1" not in text and "Latency" not in text


def test_measured_accuracy_and_latency_are_figures():
    cut = iso.prune(mlp(), X, ratio=0.5, criterion="l2").facts
    told = {"dense_top1": 80.5, "top1": 79.25, "latency_ms": 1.5, "latency_batch_size": 8}
    text = page([Subject("a", "b", cut, told)])
    assert "80.50% → 79.25%" in text and "1.50 ms" in text and "batch 8" in text


def test_files_of_before_pages_are_counted_where_a_library_builds_them(tmp_path: Path):
    kwargs: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", **kwargs)
    pruned = iso.prune(dense, torch.randn(1, 3, 32, 32), ratio=0.5, criterion="l2", remove_blocks=1)
    path = tmp_path / "old.safetensors"
    pruned.save(path, name="vit_tiny_patch16_224", kwargs=kwargs, provenance={"cut": None})
    old = read_subject(path)
    new = pruned.facts
    assert old.cut.stages == new.stages and not old.cut.classes and not old.cut.stays
    widths = {layer.name: (layer.before, layer.after) for layer in new.layers}
    assert {layer.name: (layer.before, layer.after) for layer in old.cut.layers} == widths
    check_html(page([old]))


def test_files_that_no_page_can_be_made_of(tmp_path: Path):
    pruned = iso.prune(mlp(), X, ratio=0.5, criterion="l2")
    pruned.save(tmp_path / "none.safetensors", provenance={"cut": None})
    with pytest.raises(UserError, match="holds no facts of its cut"):
        read_subject(tmp_path / "none.safetensors")
    pruned.save(tmp_path / "bad.safetensors", provenance={"cut": {"layers": 3}})
    with pytest.raises(UserError, match="its facts of the cut cannot be read"):
        read_subject(tmp_path / "bad.safetensors")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    with pytest.raises(UserError, match="text.safetensors"):
        read_subject(tmp_path / "text.safetensors")
    with pytest.raises(UserError, match="must end in .html"):
        pruned.report(tmp_path / "page.pdf")
    with pytest.raises(UserError, match="cannot write"):
        pruned.report(tmp_path / "text.safetensors" / "page.html")
