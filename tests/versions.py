"""What tests know of the versions that they run with; `bash scripts/test.sh --oldest` runs them with old ones."""

from __future__ import annotations

import huggingface_hub
import pytest
import timm
import torch
from packaging.version import Version

# The newest set of versions, which golden numbers are of: see constraints.txt.
IS_NEWEST_TORCH = Version(torch.__version__) >= Version("2.14")
IS_NEWEST_TIMM = Version(timm.__version__) >= Version("1.0.31")

needs_newest_export = pytest.mark.skipif(not IS_NEWEST_TORCH, reason="exporting is tested from torch 2.14 on")
needs_sharding_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards models on GPUs only"
)
needs_newest_hub = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1"), reason="the stand-in for the hub answers newer clients"
)
