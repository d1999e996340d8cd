"""`residual_norm` with torch operations. Kept for the backward pass beside x_new: mean and 1/std of every row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._runtime.sizes import accumulator


def _wide(t: Tensor) -> Tensor:
    # On a CPU statistics come in the type of the rows, where 16 bits are too few.
    return t.float() if t.device.type == "cpu" and t.element_size() == 2 else t


def _like(t: Tensor | None, other: Tensor) -> Tensor | None:
    return None if t is None else t.to(other.dtype)


def per_row(row_scale: Tensor, ndim: int) -> Tensor:
    return row_scale.reshape(row_scale.shape + (1,) * (ndim - row_scale.ndim))


def forward(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_new, normed, and mean and 1/std (2, rows)."""
    added = update if row_scale is None else update * per_row(row_scale, x.ndim)
    x_new = x + added if gamma is None else torch.addcmul(x, added, gamma)
    x_new = x_new.to(x.dtype)
    rows = _wide(x_new)
    affine = _like(norm_weight, rows), _like(norm_bias, rows)
    normed, mean, rstd = torch.native_layer_norm(rows, x.shape[-1:], *affine, eps)
    return x_new.contiguous(), normed.to(update.dtype), torch.stack([mean.flatten(), rstd.flatten()])


def backward(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    x_new: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    moments: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, update, gamma, norm_weight and norm_bias."""
    of_rows, of_update, of_gamma, of_weight, of_bias = needs
    of_rows = of_rows or of_update or of_gamma
    rows = _wide(x_new)
    if grad_normed is not None:
        mean, rstd = moments.reshape(2, *x_new.shape[:-1], 1)
        weight = _like(norm_weight, rows)
        dnormed, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(rows.dtype),
            rows,
            x_new.shape[-1:],
            mean,
            rstd,
            weight,
            # Its values are not read; that there is one asks for its gradient.
            rows.new_zeros(x_new.shape[-1:]) if of_bias else None,
            [of_rows, of_weight, of_bias],
        )
        total = None if not of_rows else dnormed if grad_new is None else dnormed + grad_new
    else:
        # A copy, as the result of an op must not be its input.
        total = None if grad_new is None else grad_new.clone()
        dweight, dbias = (rows.new_zeros(x_new.shape[-1:]) if needed else None for needed in (of_weight, of_bias))
    dupdate = dgamma = None
    if total is not None and (of_update or of_gamma):
        scaled = total if row_scale is None else total * per_row(row_scale, total.ndim)
        if of_update:
            dupdate = scaled * gamma if gamma is not None else scaled.clone() if scaled is total else scaled
        if of_gamma:
            dgamma = (scaled * update).flatten(0, -2).sum(0, dtype=accumulator(total.dtype))
    return total, dupdate, dgamma, dweight, dbias
