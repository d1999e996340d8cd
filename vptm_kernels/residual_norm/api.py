"""The public function: argument checks and choice of implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._runtime.arguments import shape_of
from .._runtime.triton_support import choose
from .configs import MAX_WIDTH
from .ops import residual_norm_op


def residual_norm(
    x: Tensor,
    update: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What stands between two linears of a transformer block: add the update of a branch, then normalise.

    On an H200 it moves its rows at 85 % of the speed of a copy (`docs/kernels.md`). On a CPU `torch.addmm` with beta=1,
    which adds the residual in the matrix product, followed by LayerNorm is the way to go where there is no gamma and no
    row_scale.

    Args:
        x: (..., C), the residual stream, at least two dimensions; float16, bfloat16, float32 or float64. Any strides
            with a unit last one.
        update: of the shape and dtype of x, or 16 bits with a float32 x, as under autocast.
        gamma: (C,), LayerScale. Any floating dtype, as all that follow.
        row_scale: leading dimensions of x, (B,) or (B, N): factor of the rows below, 0 or 1 / keep for stochastic
            depth. It gets no gradient.
        norm_weight, norm_bias: (C,) of the LayerNorm; None where folded into the next linear.
        eps: of the LayerNorm.
        impl: "auto" is "triton" for GPU tensors of float16, bfloat16 or float32 with C <= 8192, else "torch". An
            explicit "triton" or "torch" never falls back.

    Returns:
        x_new, in the dtype of x, and normed, in the dtype of update. Statistics are those of x_new as it is stored, in
        float32 (float64 for float64).

    Gradients reach x, update, gamma, norm_weight and norm_bias. Only those asked for are computed, in a fixed order:
    equal inputs give bitwise equal gradients. There is no second derivative. Kept for the backward pass: x_new, two
    numbers a row, and the update only if gamma is learned. Autocast changes nothing.

    Equal to::

        x_new = x + row_scale[..., None] * gamma * update
        normed = layer_norm(x_new, (C,), norm_weight, norm_bias, eps)

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.

    >>> import torch
    >>> from vptm_kernels.residual_norm import residual_norm
    >>> x, update = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    >>> x_new, normed = residual_norm(x, update, gamma=torch.full((8,), 0.1), eps=1e-6)
    >>> torch.equal(normed, torch.nn.functional.layer_norm(x_new, (8,), eps=1e-6))
    True
    """
    named = {"x": x, "update": update}
    optional = {"gamma": gamma, "row_scale": row_scale, "norm_weight": norm_weight, "norm_bias": norm_bias}
    named |= {name: t for name, t in optional.items() if t is not None}
    _check(named, eps)
    wide = x.shape[-1] > MAX_WIDTH
    impl = choose(impl, x, lacking=f"at most {MAX_WIDTH} channels, got {x.shape[-1]}" if wide else None)
    learned = (x, update, gamma, norm_weight, norm_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    inputs = (x, update, *(None if t is None else t.contiguous() for t in (gamma, row_scale, norm_weight, norm_bias)))
    x_new, normed, _ = residual_norm_op(*inputs, float(eps), keep, impl)
    return x_new, normed


def _check(named: dict[str, Tensor], eps: float) -> None:
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    x, update = named["x"], named["update"]
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite non-negative number, got {eps!r}")
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., C) of at least two dimensions, got {shape_of(x)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if update.shape != x.shape:
        raise ValueError(f"update must have the shape of x, {shape_of(x)}, got {shape_of(update)}")
    narrow = (torch.float16, torch.bfloat16) if x.dtype == torch.float32 else ()
    if update.dtype not in (x.dtype, *narrow):
        wider = ", or 16 bits" if narrow else ""
        raise ValueError(f"update must have the dtype of x, {x.dtype}{wider}, got {update.dtype}")
    for name, t in named.items():
        if t.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
        if name in ("x", "update") and t.stride(-1) != 1:
            raise ValueError(f"{name} must have a unit last stride, got strides {tuple(t.stride())}")
        if name in ("gamma", "norm_weight", "norm_bias") and shape_of(t) != (x.shape[-1],):
            raise ValueError(f"{name} must be (C,) = ({x.shape[-1]},), got {shape_of(t)}")
    if "row_scale" in named:
        row_scale = named["row_scale"]
        if not 1 <= row_scale.ndim < x.ndim or row_scale.shape != x.shape[: row_scale.ndim]:
            leading = " or ".join(str(shape_of(x)[:n]) for n in range(1, x.ndim))
            raise ValueError(f"row_scale must be leading dimensions of x, {leading}, got {shape_of(row_scale)}")
        if row_scale.requires_grad:
            raise ValueError("row_scale must not require a gradient, got one that does")
