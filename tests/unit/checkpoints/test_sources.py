"""What a name on the command line stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isomorphic.checkpoints.sources import is_checkpoint, is_folder, is_pth, source_file, weights_file
from isomorphic.errors import UserError
from tests.faults import one_line


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.pth.tar", "last.ckpt", "model.safetensors", "pytorch_model.bin"])
def test_names_of_files_that_need_not_be_there(name: str):
    assert is_checkpoint(name) and is_checkpoint(f"some/{name}") and source_file(name) == Path(name)
    assert is_pth(name) == (name.rpartition(".")[2] in ("pth", "pt", "tar", "ckpt"))


def test_a_bin_file_is_told_by_its_first_bytes(tmp_path: Path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert is_pth(tmp_path / "pytorch_model.bin")
    (tmp_path / "other.bin").write_text("text")
    assert not is_pth(tmp_path / "other.bin")


def test_a_folder_with_a_config_is_a_checkpoint(tmp_path: Path):
    assert not is_folder(tmp_path) and not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert is_folder(tmp_path) and is_checkpoint(str(tmp_path))
    assert is_folder("local-dir:anywhere") and not is_folder("resnet18") and not is_folder("hf-hub:timm/resnet18")


def test_the_weights_in_a_folder(tmp_path: Path):
    with pytest.raises(UserError, match=f"no weights in the folder {tmp_path}: model.safetensors or pytorch") as error:
        weights_file(tmp_path)
    one_line(error)
    for name in ("b.ckpt", "pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert weights_file(tmp_path) == weights_file(f"local-dir:{tmp_path}") == tmp_path / name
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).unlink()
    (tmp_path / "a.pth").touch()
    with pytest.raises(UserError, match=r"several files of weights in .*: name one of them \(a.pth, b.ckpt\)"):
        weights_file(tmp_path)
