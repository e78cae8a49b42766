"""Checkpoints of the hub and of its folders: fetched when a user asks for one, and never because a file names it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import isomorphic as iso
from isomorphic import progress
from isomorphic.checkpoints import hub
from isomorphic.checkpoints.open import is_checkpoint, is_pth, source_file
from isomorphic.errors import UserError
from isomorphic.models import build_model, describe_model, example_inputs
from tests.stub_hub import StubHub, stub_hub
from tests.unit.checkpoints.conftest import VIT, rewritten


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.fetch.cache_clear()
        yield served
        hub.fetch.cache_clear()


DIGITS = Path("pretrained/digits_deit.safetensors").resolve()


def test_a_repository_is_fetched_once(server: StubHub):
    server.files["me/digits"] = {"model.safetensors": DIGITS.read_bytes()}
    image = torch.randn(1, 3, 32, 32)
    expected = iso.load_model(DIGITS)(image)
    assert torch.equal(iso.load_model("hf-hub:me/digits")(image), expected)
    before = len(server.asked)
    assert torch.equal(iso.load_model("hf-hub:me/digits")(image), expected)
    assert len(server.asked) == before
    assert files_of(server) == {"/me/digits/resolve/main/model.safetensors"}
    server.asked.clear()
    iso.load_model("hf-hub:me/digits@v1.0")
    assert files_of(server) == {"/me/digits/resolve/v1.0/model.safetensors"}


def files_of(server: StubHub) -> set[str]:
    """The files that were asked for; a first question is only if the hub is there."""
    return {asked.split()[1] for asked in server.asked if asked != "HEAD /"}


def test_a_file_that_was_fetched_does_without_the_hub(server: StubHub):
    server.files["me/digits"] = {"model.safetensors": DIGITS.read_bytes()}
    first = hub.fetch("hf-hub:me/digits", "model.safetensors")
    hub.fetch.cache_clear()
    server.files.clear()
    server.failing = True
    assert hub.fetch("hf-hub:me/digits", "model.safetensors") == first


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("hf-hub:digits", "is no repository: hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION"),
        ("hf-hub:me/", "is no repository: "),
        ("hf-hub:me/..", "is no repository: "),
        ("hf-hub:me/missing", "cannot fetch model.safetensors of hf-hub:me/missing: HTTP 404: there is no such"),
        ("hf-hub:me/empty", "cannot fetch model.safetensors of hf-hub:me/empty: HTTP 404: there is no such"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(server: StubHub, source: str, told: str):
    server.files["me/empty"] = {"README.md": b""}
    with pytest.raises(UserError, match=told):
        iso.load_model(source)


def test_no_connection_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    told = "cannot fetch model.safetensors of hf-hub:me/digits: Connection refused: check the connection"
    with pytest.raises(UserError, match=told):
        iso.load_model("hf-hub:me/digits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot fetch model.safetensors of hf-hub:me/digits: .*: check the connection"):
        iso.load_model("hf-hub:me/digits")


def test_a_repository_of_timm_s_is_built_as_its_config_says(server: StubHub, tmp_path: Path):
    spec = describe_model("convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "num_classes": 3})
    model = build_model(spec)
    save_file(model.state_dict(), tmp_path / "weights")
    config = {"architecture": "convnext_atto", "num_classes": 3, "model_args": spec.kwargs}
    server.files["timm/small"] = {"model.safetensors": (tmp_path / "weights").read_bytes()}
    with pytest.raises(UserError, match="cannot fetch config.json of hf-hub:timm/small: HTTP 404"):
        iso.load_model("hf-hub:timm/small")
    server.files["timm/small"]["config.json"] = json.dumps(config).encode()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(iso.load_model("hf-hub:timm/small")(image), model(image))
    again = iso.load_model("convnext_atto", kwargs=spec.kwargs, weights="hf-hub:timm/small")
    assert torch.equal(again(image), model(image))


def test_a_folder_of_weights_that_nothing_describes(tmp_path: Path):
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tensors but no model structure: not a checkpoint of this project"):
        iso.load_model(tmp_path)


def test_what_is_fetched_is_said(server: StubHub, capsys: pytest.CaptureFixture[str]):
    with progress.telling(), pytest.raises(UserError):
        iso.load_model("hf-hub:me/digits")
    assert capsys.readouterr().err == "[   0 s] fetching model.safetensors of hf-hub:me/digits, unless it is here\n"


def test_a_pickle_under_the_name_of_a_checkpoint_is_not_read(server: StubHub, tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "net.pth")
    server.files["me/pickle"] = {"model.safetensors": (tmp_path / "net.pth").read_bytes()}
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        iso.load_model("hf-hub:me/pickle", trust=True)


@pytest.mark.parametrize("source", ["hf-hub:me/net", "hf-hub:me/net.pth", "hf-hub:me/net.py", "hf-hub:me/net@v1.pt"])
def test_a_repository_is_a_checkpoint_whatever_its_name_ends_in(source: str):
    assert is_checkpoint(source) and not is_pth(source)
    assert hub.source_name(source).startswith("net")


def test_a_folder_stands_for_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "deit_tiny_patch16_224"
    folder.mkdir()
    shutil.copy(DIGITS, folder / "model.safetensors")
    image = torch.randn(1, 3, 32, 32)
    expected = iso.load_model(DIGITS)(image)
    assert torch.equal(iso.load_model(folder)(image), expected)
    assert torch.equal(iso.load_model(f"{folder}/")(image), expected)
    assert source_file(str(folder)) == folder / "model.safetensors" and hub.source_name(folder) == folder.name
    iso.export(DIGITS, None, f"{folder}/")
    monkeypatch.chdir(tmp_path)
    for source in ("local-dir:deit_tiny_patch16_224", f"local-dir:{folder}", "./deit_tiny_patch16_224"):
        assert torch.equal(iso.load_model(source)(image), expected)
    iso.export("local-dir:deit_tiny_patch16_224", None, "again/")
    assert torch.equal(iso.load_model("again/")(image), expected)
    (folder / "config.json").unlink()  # a bare name is still timm's
    assert not is_checkpoint("deit_tiny_patch16_224") and is_checkpoint("./deit_tiny_patch16_224")


def no_network(*_: Any, **__: Any) -> None:
    raise AssertionError("something was fetched")


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "hf-hub:timm/resnet18.a1_in1k"},
        {"name": "hf_hub:timm/resnet18.a1_in1k"},
        {"name": "resnet18.hf-hub:timm/resnet18"},
        {"builder": "torchvision", "name": "hf-hub:me/net"},
        {"builder": "none", "name": "hf-hub:me/net"},
        {"builder": "file", "name": "hf-hub:me/net.py:build", "sha256": "0"},
        {"builder": "hf-hub", "name": "me/net"},
        {"kwargs": {"pretrained_cfg": {"hf_hub_id": "me/net", "source": "hf-hub"}}},
        {"kwargs": {"pretrained": True}},
        {"kwargs": {"checkpoint_path": "hf-hub:me/net"}},
        {"provenance": {"parent": "hf-hub:me/net", "arguments": {"model": "hf-hub:me/net"}}},
    ],
    ids=str,
)
def test_a_checkpoint_that_names_a_repository_makes_nobody_fetch_it(
    saved_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    file = rewritten(saved_vit, tmp_path, lambda header: {**header, **changes})
    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    try:
        model = iso.load_model(file)
    except UserError:
        return
    assert model(example_inputs(VIT)).shape == (1, 10)
