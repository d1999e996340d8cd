"""The definition of `residual_norm` in eager PyTorch of any floating dtype; the other implementations are tested
against it in float64."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def residual_norm_reference(
    x: Tensor,
    update: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(x_new, normed) of `vptm_kernels.residual_norm.residual_norm`, whose docstring describes the arguments."""
    added = update
    if gamma is not None:
        added = added * gamma
    if row_scale is not None:
        added = added * row_scale.reshape(row_scale.shape + (1,) * (x.ndim - row_scale.ndim))
    x_new = (x + added).to(x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (norm_weight, norm_bias))
    return x_new, F.layer_norm(x_new, x.shape[-1:], weight, bias, eps).to(update.dtype)
