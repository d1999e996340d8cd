"""The Triton kernel: a program holds a few whole rows, so that mean and variance take two passes over registers."""

from __future__ import annotations

import triton
import triton.language as tl


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit(do_not_specialize=["rows"])  # a smaller last batch compiles nothing
def shifted_norm_kernel(
    x_ptr, shift_ptr, out_ptr, rows,
    C: tl.constexpr, CP: tl.constexpr, BLOCK_R: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """x (rows, C), shift (C,) -> out (rows, C)."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, CP)
    inside = (c < C)[None, :]
    live = (r < rows)[:, None] & inside
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    y = tl.load(x_ptr + at, mask=live, other=0.0).to(ACC)
    if SHIFT:
        y = y + tl.load(shift_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    # a constant factor: Triton's quotient of float32 is two ulp off
    mean = tl.sum(y, 1) * (1.0 / C)
    y = tl.where(inside, y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(y * y, 1) * (1.0 / C) + EPS)
    tl.store(out_ptr + at, (y * rstd[:, None]).to(out_ptr.dtype.element_ty), mask=live)
