"""The evaluation transform is Pillow's, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from isomorphic.data.sources import DataSource, build_dataset
from isomorphic.data.transforms import Preprocessing, eval_transform
from isomorphic.errors import UserError


def test_eval_transform_is_pillow_resize_crop_and_normalise():
    pixels = np.random.default_rng(0).integers(256, size=(300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    tensor = eval_transform(Preprocessing(input_size=224, resize_size=256))(image)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)  # 400·256/300 = 341.3
    left, top = round((341 - 224) / 2), round((256 - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert tensor.shape == (3, 224, 224) and tensor.dtype == torch.float32
    assert type(tensor) is torch.Tensor
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_eval_transform_follows_interpolation_mean_and_std():
    image = Image.fromarray(np.random.default_rng(1).integers(256, size=(20, 20, 3), dtype=np.uint8))
    plain = Preprocessing(8, 9, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    bilinear = eval_transform(plain)(image)
    expected = np.asarray(image.resize((9, 9), Image.Resampling.BILINEAR), dtype=np.float32)[:8, :8] / 255
    np.testing.assert_allclose(bilinear.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    shifted = eval_transform(Preprocessing(8, 9, "bilinear", (0.5, 0.0, 0.0), (0.25, 1.0, 1.0)))(image)
    torch.testing.assert_close(shifted[0], (bilinear[0] - 0.5) / 0.25)
    torch.testing.assert_close(shifted[1:], bilinear[1:])


def test_eval_transform_enlarges_digits():
    dataset = build_dataset(DataSource("digits"), "val", eval_transform(Preprocessing(32, 36)))
    assert dataset[0][0].shape == (3, 32, 32)


def test_eval_transform_refuses_what_would_spoil_images():
    with pytest.raises(UserError, match="256 are too small for an input of 288.*--val-resize-size 288"):
        eval_transform(Preprocessing(input_size=288))
    with pytest.raises(UserError, match="unknown interpolation 'cubic': choose one of .*bicubic"):
        eval_transform(Preprocessing(interpolation="cubic"))
