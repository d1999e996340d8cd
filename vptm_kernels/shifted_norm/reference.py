"""The definition of `shifted_norm` in eager PyTorch; the implementations are tested against it in float64."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def shifted_norm_reference(x: Tensor, shift: Tensor | None, *, eps: float) -> Tensor:
    """`vptm_kernels.shifted_norm.shifted_norm`, whose docstring describes the arguments."""
    return F.layer_norm(x if shift is None else x + shift.to(x.dtype), x.shape[-1:], None, None, eps)
