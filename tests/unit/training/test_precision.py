"""Number formats."""

from __future__ import annotations

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.training.precision import amp_name, build_scaler, pick_amp_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_amp_is_fp16_on_cuda_as_published_and_bf16_elsewhere():
    assert pick_amp_dtype(None, CUDA) is torch.float16
    assert pick_amp_dtype(None, CPU) is torch.bfloat16
    assert pick_amp_dtype("bf16", CUDA) is torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs a CUDA device.*--amp-dtype bf16"):
        pick_amp_dtype("fp16", CPU)


def test_only_fp16_is_scaled():
    assert build_scaler(torch.float16, CPU).is_enabled()
    assert not build_scaler(torch.bfloat16, CPU).is_enabled()
    assert not build_scaler(None, CPU).is_enabled()


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (None, None)])
def test_names_of_autocast(dtype: torch.dtype | None, name: str | None):
    assert amp_name(dtype) == name
