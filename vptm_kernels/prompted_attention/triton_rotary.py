"""The launch of the rotary kernel."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.sizes import next_power_of_2
from .._runtime.triton_support import architecture
from .kernels_rotary import prompted_attention_rotate_kernel

# of one half of the channels of a program, eight for each thread of four warps
_ELEMENTS = 1024


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, back: bool) -> Tensor:
    """`vptm_kernels.prompted_attention.rotary.rotate`, or the other way round."""
    batch, tokens, width = qkv.shape
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if out.numel() == 0:
        return out
    half = width // (6 * num_heads)
    padded = next_power_of_2(half)
    rows = 64 if architecture(qkv.device) == "cpu" else max(1, _ELEMENTS // padded)
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    wide = torch.float64 in (qkv.dtype, cos.dtype)
    prompted_attention_rotate_kernel[(-(-batch * tokens // rows), num_heads)](
        *(qkv, cos, sin, out, batch * tokens, tokens, qkv.stride(0), qkv.stride(1)),
        *(cos.stride(0) if cos.ndim == 3 else 0, cos.stride(-2)),
        H=num_heads,
        HALF=half,
        HALF_P=padded,
        BACK=back,
        BLOCK_R=rows,
        ACC=tl.float64 if wide else tl.float32,
        num_warps=4,
    )
    return out
