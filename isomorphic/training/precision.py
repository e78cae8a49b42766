"""Mixed precision, and the choice between fast and deterministic kernels."""

from __future__ import annotations

import os

import torch

from isomorphic.errors import UserError

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TEACHER_DTYPES = ("auto", "fp32", *AMP_DTYPES)


def pick_amp_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Returns the autocast dtype of that name; for None, fp16 on CUDA, as published, and bf16 elsewhere.

    Raises:
        UserError: fp16 without CUDA, where gradients cannot be scaled.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--amp-dtype fp16 needs a CUDA device and this is {device}: pass --amp-dtype bf16")
    return AMP_DTYPES[name or ("fp16" if device.type == "cuda" else "bf16")]


def amp_name(dtype: torch.dtype | None) -> str | None:
    """Returns the name of an autocast dtype, as flags and files have it; None for full precision."""
    return next((name for name, known in AMP_DTYPES.items() if known == dtype), None)


def pick_teacher_dtype(name: str, amp_dtype: torch.dtype | None) -> torch.dtype | None:
    """Returns the autocast dtype of a teacher, None for fp32; "auto" is the student's `amp_dtype`, else bf16.

    No gradient flows through a teacher, so low precision affects its logits only.
    """
    if name == "fp32":
        return None
    return AMP_DTYPES.get(name, amp_dtype or torch.bfloat16)


def build_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Returns a loss scaler for fp16, in which small gradients would underflow; for other dtypes it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)


def choose_algorithms(deterministic: bool) -> None:
    """Selects deterministic kernels on a GPU, or else the fastest ones for a batch's shape.

    On the CPU, runs with the same number of threads are deterministic either way.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
