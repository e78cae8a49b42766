"""Folders for the hub: the checkpoint byte for byte, what stands beside it, and the upload."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import isomorphic as iso
from isomorphic.errors import UserError
from isomorphic.exporting import hub
from isomorphic.models import build_model, describe_model
from isomorphic.provenance import file_sha256
from tests.stub_hub import stub_hub
from tests.versions import needs_newest_hub

DIGITS = Path("pretrained/digits_deit.safetensors")
KWARGS = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10, "img_size": 32}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's DeiT, pruned."""
    path = tmp_path_factory.mktemp("pruned") / "deit.safetensors"
    done = iso.prune(iso.load_model(DIGITS), torch.randn(1, 3, 32, 32), macs="50%", criterion="l1")
    done.save(path, name="deit_tiny_distilled_patch16_224", kwargs=KWARGS)
    return path


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_folder_of_a_pruned_model(pruned: Path, tmp_path: Path):
    exported = iso.export(pruned, None, f"{tmp_path}/hub/deit/")
    folder = tmp_path / "hub" / "deit"
    assert exported.batch_sizes == (1, 3) and exported.difference.value == 0
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [file.name for file in folder.parent.iterdir()] == ["deit"]
    assert (folder / "model.safetensors").read_bytes() == pruned.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["sha256_of_checkpoint"] == file_sha256(pruned) and config["kwargs"] == KWARGS
    assert 0 < config["macs_paper"] < 8_000_000
    card = (folder / "README.md").read_text()
    assert metadata(card)["library_name"] == "isomorphic-pruning" and "license" not in metadata(card)
    assert "| `blocks.0.mlp.fc1.weight` | 256 × 64 | " in card and 'iso.load_model("hf-hub:USER/deit")' in card


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path: Path):
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("old")
    iso.export(DIGITS, None, folder, repository="me/digits")
    assert (folder / "notes.txt").read_text() == "mine"
    assert 'iso.load_model("hf-hub:me/digits")' in (folder / "README.md").read_text()


def test_a_library_s_model_is_saved_first(tmp_path: Path):
    kwargs = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "num_classes": 10}
    iso.export("convnext_atto", None, f"{tmp_path}/net/", pretrained=False, kwargs=kwargs, input_size=32)
    assert iso.load_model(tmp_path / "net")(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert "The weights were trained from scratch" in (tmp_path / "net" / "README.md").read_text()


def test_weights_of_others_become_a_checkpoint(tmp_path: Path):
    spec = describe_model("convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "num_classes": 3})
    model, image = build_model(spec), torch.randn(1, 3, 32, 32)
    (tmp_path / "theirs").mkdir()
    save_file(model.state_dict(), tmp_path / "theirs" / "model.safetensors")
    config = {"architecture": "convnext_atto", "num_classes": 3, "model_args": spec.kwargs}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    iso.export(tmp_path / "theirs", None, f"{tmp_path}/ours/")
    assert torch.equal(iso.load_model(tmp_path / "ours")(image), model(image))


def test_a_model_that_only_its_user_builds(tmp_path: Path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    iso.prune(build(), torch.randn(1, 4), ratio=0.5, criterion="l1").save(tmp_path / "net.safetensors")
    exported = iso.export(tmp_path / "net.safetensors", None, f"{tmp_path}/net/")
    assert exported.batch_sizes == () and "Largest difference" not in str(exported)
    assert 'load_model("hf-hub:USER/net", model=build())' in (tmp_path / "net" / "README.md").read_text()
    assert iso.load_model(tmp_path / "net", model=build())(torch.zeros(1, 4)).shape == (1, 2)


def test_a_folder_that_fails_its_check_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sums = iter(range(2))
    monkeypatch.setattr(hub, "file_sha256", lambda _: str(next(sums)))
    with pytest.raises(UserError, match=r"model.safetensors is not the checkpoint of its config.json"):
        iso.export(DIGITS, None, f"{tmp_path}/net/")
    assert not list(tmp_path.iterdir())


def test_targets_and_sources_that_do_not_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write "):
        iso.export(DIGITS, None, f"{tmp_path}/file/net/")
    with pytest.raises(UserError, match=r"net.pth is no checkpoint: convert it, python tools/convert.py"):
        iso.export("net.pth", None, f"{tmp_path}/net/")
    with pytest.raises(UserError, match="no such checkpoint: missing.safetensors"):
        iso.export("missing.safetensors", None, f"{tmp_path}/net/")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@needs_newest_hub
def test_an_upload_arrives_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    iso.export(DIGITS, None, f"{tmp_path}/digits/", repository="me/digits")
    (tmp_path / "digits" / "notes.txt").write_text("mine")
    with stub_hub() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", "nobody")
        assert hub.upload(tmp_path / "digits", "me/digits") == f"{served.endpoint}/me/digits"
        assert set(served.files["me/digits"]) == {"README.md", "config.json", "model.safetensors"}
        assert served.files["me/digits"]["model.safetensors"] == DIGITS.read_bytes()
        served.writable = False
        with pytest.raises(UserError, match=r"cannot upload .* to me/digits: .*403.*log in with `hf auth login`"):
            hub.upload(tmp_path / "digits", "me/digits")
        with pytest.raises(UserError, match="cannot upload .* to a/b/c: "):
            hub.upload(tmp_path / "digits", "a/b/c")
