"""Launches of the Triton kernels: strides, block sizes and the buffers they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.sizes import accumulator, next_power_of_2
from .._runtime.triton_support import architecture
from .configs import blocks_per_program, row_block
from .kernels import residual_norm_backward_kernel, residual_norm_forward_kernel


def _three(t: Tensor) -> Tensor:
    """(outer, inner, C) of the same rows, copied only if no such view exists."""
    if t.ndim == 2:
        return t[None]
    return t if t.ndim == 3 else t.reshape(-1, *t.shape[-2:])


def _constants(x: Tensor, gamma: Tensor | None, row_scale: Tensor | None, weight: Tensor | None) -> dict[str, Any]:
    width = x.shape[-1]
    rows, num_warps = row_block(architecture(x.device), width)
    return {
        "C": width,
        "CP": next_power_of_2(width),
        "BLOCK_R": rows,
        "GAMMA": gamma is not None,
        "ROW_SCALE": row_scale is not None,
        "WEIGHT": weight is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _per_scale(x: Tensor, row_scale: Tensor | None) -> int:
    """Consecutive rows that share one entry of row_scale."""
    return 1 if row_scale is None or row_scale.numel() == 0 else _rows(x) // row_scale.numel()


def forward(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, constants = _rows(x), _constants(x, gamma, row_scale, norm_weight)
    x_new, normed = x.new_empty(x.shape), update.new_empty(x.shape)
    moments = x.new_empty((2, rows) if keep else (0,), dtype=accumulator(x.dtype))
    if rows:
        x, update = _three(x), _three(update)
        residual_norm_forward_kernel[(-(-rows // constants["BLOCK_R"]),)](
            *(x, update, gamma, row_scale, norm_weight, norm_bias, x_new, normed, moments),
            *(rows, x.shape[1], x.stride(0), x.stride(1), update.stride(0), update.stride(1)),
            _per_scale(x, row_scale),
            BIAS=norm_bias is not None,
            KEEP=keep,
            EPS=eps,
            **constants,
        )
    return x_new, normed, moments


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
    rows, constants = _rows(x_new), _constants(x_new, gamma, row_scale, norm_weight)
    row_blocks = -(-rows // constants["BLOCK_R"])
    blocks = blocks_per_program(row_blocks, any(needs[2:]))
    programs = -(-row_blocks // blocks) if row_blocks else 0
    dx = x_new.new_empty(x_new.shape) if needs[0] else None
    dupdate = update.new_empty(x_new.shape) if needs[1] else None
    sums = x_new.new_empty(programs, 3, x_new.shape[-1], dtype=accumulator(x_new.dtype)) if any(needs[2:]) else None
    if rows:
        strided = _three(update if needs[2] else x_new)
        residual_norm_backward_kernel[(programs,)](
            None if grad_new is None else grad_new.contiguous(),
            None if grad_normed is None else grad_normed.contiguous(),
            *(x_new, strided, gamma, row_scale, norm_weight, moments, dx, dupdate, sums),
            *(rows, strided.shape[1], strided.stride(0), strided.stride(1), _per_scale(x_new, row_scale), blocks),
            NEW=grad_new is not None,
            NORMED=grad_normed is not None,
            OF_X=needs[0],
            OF_UPDATE=needs[1],
            OF_GAMMA=needs[2],
            OF_WEIGHT=needs[3],
            OF_BIAS=needs[4],
            **constants,
        )
    of_parameters = [None] * 3 if sums is None else [sums[:, i].sum(0) if needs[2 + i] else None for i in range(3)]
    return dx, dupdate, *of_parameters
