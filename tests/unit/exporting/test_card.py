"""The model card says what a checkpoint's header knows, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from isomorphic.checkpoints.open import open_model, read_header
from isomorphic.exporting.card import compare_sizes, licence, model_card

DEIT = "deit_base_distilled_patch16_224.fb_in1k"


def header(**changes: Any) -> dict[str, Any]:
    preprocessing = {"input_size": 224, "resize_size": 256, "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    known = {"format": 1, "builder": "timm", "name": DEIT, "kwargs": {}, "preprocessing": preprocessing}
    structure = {"attributes": {}, "gained": [], "lost": []}
    return {**known, "structure": structure, "provenance": {"arguments": {"model": DEIT}}, **changes}


@pytest.mark.parametrize(
    ("changes", "known", "told"),
    [
        ({}, "apache-2.0", f"Made from timm's weights of `{DEIT}`, which are published under apache-2.0."),
        ({"provenance": {}}, None, "The checkpoint does not say whether it was made from these; if it was, that"),
        ({"provenance": {"arguments": {"model": "other.safetensors"}}}, None, "does not say whether it was made"),
        ({"provenance": {"arguments": {"model": DEIT, "no_pretrained": True}}}, None, "trained from scratch, not made"),
        ({"builder": "torchvision", "name": "resnet50"}, None, "torchvision states no licence for the weights of"),
        ({"builder": "none", "name": "net.Net"}, None, "The model is its user's own"),
        ({"builder": "file", "name": "net.py:build"}, None, "The model is its user's own"),
    ],
)
def test_a_licence_is_stated_only_where_it_is_known(changes: dict[str, Any], known: str | None, told: str):
    stated, sentence = licence(header(**changes))
    assert stated == known and told in sentence
    card = model_card(header(**changes), "net", "me/net", None)
    assert ("\nlicense: apache-2.0\nbase_model: timm/deit" in card) == (known is not None)


def test_the_quickstarts_checkpoint():
    told = read_header("pretrained/digits_deit.safetensors")
    model, spec = open_model("pretrained/digits_deit.safetensors")
    lines = model_card(told, "digits", "me/digits", compare_sizes(model, spec)).splitlines()
    assert lines[0] == "---" and lines.index("---", 1) < lines.index("# digits")
    assert "| params | 0.21 M | 0.21 M |" in lines and "No layer is narrower than in the dense model." in lines
    assert "| top-1, in percent | 98.8889 |" in lines and "Measured by the run below on digits." in lines
    assert 'model = iso.load_model("hf-hub:me/digits")' in lines
    assert told["provenance"]["command"] in lines


def test_what_was_cut_is_told():
    changes = {"kept_blocks": {"blocks": [0, 2]}, "provenance": {}}
    changes["structure"] = {"attributes": {}, "gained": [], "lost": [], "masked": ["head.weight"]}
    card = model_card(header(**changes), "net", "me/net", None)
    assert "Of the blocks of `blocks`, these remain: 0, 2." in card
    assert "1 tensors have weights at zero" in card
    assert "The checkpoint holds no accuracy" in card and "does not say which command made it" in card
