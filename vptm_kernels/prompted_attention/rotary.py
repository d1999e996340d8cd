"""Rotary positions: queries and keys of tokens turned by an angle for each pair of channels, before attention.

It is a pass of its own, one kernel where Triton runs: it reads qkv, and writes it again, turned. Backward turns
gradients back and keeps nothing but the two tables. What is traced gets the formula, which a compiler fuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._runtime.arguments import shape_of, tensor
from .._runtime.direct import direct
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import device_of

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, each (N, D/2) for all heads or (H, N, D/2)."""


def check_rotary(rotary: Any, qkv: Tensor, num_heads: int) -> Rotary:
    """(cos, sin) that fit `qkv`, which was checked; else ValueError or TypeError."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of tensors (cos, sin), got {type(rotary).__name__}")
    tokens, head_dim = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    if head_dim % 2:
        raise ValueError(f"rotary must come with an even head dimension, got D = {head_dim}")
    shared = (tokens, head_dim // 2)
    for name, t in zip(("rotary[0] (cos)", "rotary[1] (sin)"), rotary):
        if shape_of(tensor(name, t)) not in (shared, (num_heads, *shared)) or not t.is_floating_point():
            raise ValueError(
                f"{name} must be a floating point (N, D/2) = {shared} or (H, N, D/2) = {(num_heads, *shared)}, "
                f"got {shape_of(t)} {t.dtype}"
            )
        if t.device != qkv.device:
            raise ValueError(f"{name} must be on the device of qkv, {qkv.device}, got {t.device}")
        if t.requires_grad:
            raise ValueError(f"{name} must be a constant, got one that requires a gradient")
    return rotary[0], rotary[1]


def rotate(qkv: Tensor, rotary: Rotary, num_heads: int, impl: str) -> Tensor:
    """`qkv` (B, N, 3*H*D) with queries and keys turned, in memory of its own: channels i and i + D/2 of a head, x
    and y, become `x cos - y sin` and `y cos + x sin`. Computed in the wider of both types, rounded once.

    impl: "triton" or "torch".
    """
    cos, sin = rotary
    if nothing_traces(qkv, cos, sin):
        turned: Tensor = _rotate(qkv, cos, sin, num_heads, impl, False)
        return turned
    first, second = _halves(qkv, num_heads)
    cos, sin = (_by_row(t) for t in rotary)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 4).to(qkv.dtype)
    return torch.cat([turned.flatten(2), qkv[..., 2 * qkv.shape[2] // 3 :]], 2)


def _halves(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """First and second half of the channels of queries and keys, (B, N, 2, H, D/2) each."""
    width = qkv.shape[2] // 3
    first, second = qkv[..., : 2 * width].unflatten(2, (2, num_heads, 2, width // (2 * num_heads))).unbind(4)
    return first, second


def _by_row(table: Tensor) -> Tensor:
    """(N, 1, 1 or H, D/2)."""
    return table[:, None, None] if table.ndim == 2 else table.transpose(0, 1)[:, None]


def _forward(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, impl: str, back: bool) -> Tensor:
    if impl == "triton":
        from . import triton_rotary

        with device_of(qkv):
            return triton_rotary.rotate(qkv, cos, sin, num_heads, back)
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    width = qkv.shape[2] // 3
    out[..., 2 * width :] = qkv[..., 2 * width :]
    first, second = _halves(qkv, num_heads)
    turned_first, turned_second = _halves(out, num_heads)
    cos, sin = _by_row(cos), _by_row(sin)
    sign = -1 if back else 1
    torch.addcmul(first * cos, second, sin, value=-sign, out=turned_first)
    torch.addcmul(second * cos, first, sin, value=sign, out=turned_second)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (cos, sin), (num_heads, impl, back) = ctx.saved_tensors, ctx.options
    if nothing_traces(grad, cos, sin):
        # of a gradient that autograd made, which may be expanded
        rows = grad if grad.stride(-1) == 1 else grad.contiguous()
        turned = _rotate(rows, cos, sin, num_heads, impl, not back)
    else:
        turned = rotate(grad, (cos, sin if back else -sin), num_heads, impl)
    return turned, None, None, None, None, None


_rotate = direct(_forward, _setup_context, _backward)
