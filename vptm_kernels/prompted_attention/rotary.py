"""Rotary positions: queries and keys of tokens turned by an angle for each pair of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._runtime.arguments import shape_of, tensor

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


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor | None = None, back: bool = False) -> Tensor:
    """`x` (..., H, N, D) with channels i and i + D/2, x and y, as `x cos - y sin` and `y cos + x sin`; `back` the other
    way round. Computed in the wider of both types, rounded once; `out` has the type of `x` and shares no memory."""
    if out is None:
        out = torch.empty_like(x)
    first, second = x.chunk(2, -1)
    to_first, to_second = out.chunk(2, -1)
    sign = -1 if back else 1
    torch.addcmul(first * cos, second, sin, value=-sign, out=to_first)
    torch.addcmul(second * cos, first, sin, value=sign, out=to_second)
    return out
