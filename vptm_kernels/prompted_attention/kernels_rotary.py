"""Triton kernel of rotary positions as a pass of its own, where kernels of attention do not turn what they load."""

from __future__ import annotations

import triton
import triton.language as tl


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit(do_not_specialize=["rows"])  # a smaller last batch compiles nothing
def prompted_attention_rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, out_ptr,
    rows, N, stride_b, stride_n, stride_th, stride_tn,
    H: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, SECTIONS: tl.constexpr, BACK: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):
    """qkv (B, N, 3*H*D), rows = B*N; cos and sin (H or 1, N, D/2) -> out (B, N, 3*H*D), queries and keys turned, or
    turned BACK, which may be in place; with 3 SECTIONS values too, as they are. A program takes some rows of one head,
    in halves of its channels."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1)
    c = tl.arange(0, HALF_P)
    live = (r < rows)[:, None] & (c < HALF)[None, :]
    n = (r % N).to(tl.int64)
    table = h * stride_th + n[:, None] * stride_tn + c[None, :]
    cos = tl.load(cos_ptr + table, mask=live, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + table, mask=live, other=0.0).to(ACC)
    if BACK:
        sin = -sin
    at = ((r // N).to(tl.int64) * stride_b + n * stride_n)[:, None] + h * (2 * HALF) + c[None, :]
    to = r.to(tl.int64)[:, None] * (6 * H * HALF) + h * (2 * HALF) + c[None, :]
    for section in tl.static_range(SECTIONS):
        first = tl.load(qkv_ptr + at + section * (2 * H * HALF), mask=live, other=0.0)
        second = tl.load(qkv_ptr + at + section * (2 * H * HALF) + HALF, mask=live, other=0.0)
        if section < 2:
            x, y = first.to(ACC), second.to(ACC)
            first = (x * cos - y * sin).to(first.dtype)
            second = (y * cos + x * sin).to(second.dtype)
        tl.store(out_ptr + to + section * (2 * H * HALF), first, mask=live)
        tl.store(out_ptr + to + section * (2 * H * HALF) + HALF, second, mask=live)
