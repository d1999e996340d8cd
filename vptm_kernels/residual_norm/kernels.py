"""Triton kernels: a program holds a few whole rows, so that mean and variance take two passes over registers.

With y = x + row_scale gamma update, n = (y - mean) / std, and gradients g_y and g_n of both outputs,

    dy = g_y + (g_n w - mean(g_n w) - n mean(g_n w n)) / std,   dx = dy,   dupdate = row_scale gamma dy
    dgamma = sum over rows of row_scale update dy,   dw = sum of g_n n,   db = sum of g_n

Sums over rows are made in order by each program over its rows, and then over programs. Means are products with the
constant 1 / C: a quotient is off by up to two units in the last place on an NVIDIA GPU, also by 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def _rows(base, r, inner, stride_outer, stride_inner, c):
    """Pointers to the elements of rows r of an (outer, inner, C) tensor."""
    outer = (r // inner).to(tl.int64)
    return base + (outer * stride_outer + (r % inner).to(tl.int64) * stride_inner)[:, None] + c[None, :]


@triton.jit(do_not_specialize=["rows"])  # a smaller last batch compiles nothing
def residual_norm_forward_kernel(
    x_ptr, update_ptr, gamma_ptr, scale_ptr, weight_ptr, bias_ptr, new_ptr, normed_ptr, moments_ptr,
    rows, inner, stride_xo, stride_xi, stride_uo, stride_ui, rows_per_scale,
    C: tl.constexpr, CP: tl.constexpr, BLOCK_R: tl.constexpr, GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):
    """x and update (outer, inner, C); gamma, weight and bias (C,); scale (rows / rows_per_scale,) -> new and normed
    (rows, C), moments (2, rows): mean and 1/std."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, CP)
    inside = (c < C)[None, :]
    live = (r < rows)[:, None] & inside
    y = tl.load(_rows(x_ptr, r, inner, stride_xo, stride_xi, c), mask=live, other=0.0).to(ACC)
    added = tl.load(_rows(update_ptr, r, inner, stride_uo, stride_ui, c), mask=live, other=0.0).to(ACC)
    if GAMMA:
        added = added * tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    if ROW_SCALE:
        added = added * tl.load(scale_ptr + r // rows_per_scale, mask=r < rows, other=0.0).to(ACC)[:, None]
    new = (y + added).to(new_ptr.dtype.element_ty)
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(new_ptr + at, new, mask=live)
    # What is normalised is what was stored.
    y = new.to(ACC)
    mean = tl.sum(y, 1) * (1.0 / C)
    y = tl.where(inside, y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(y * y, 1) * (1.0 / C) + EPS)
    y = y * rstd[:, None]
    if KEEP:
        tl.store(moments_ptr + r, mean, mask=r < rows)
        tl.store(moments_ptr + rows + r, rstd, mask=r < rows)
    if WEIGHT:
        y = y * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    tl.store(normed_ptr + at, y.to(normed_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows", "blocks"])  # a smaller last batch compiles nothing
def residual_norm_backward_kernel(
    grad_new_ptr, grad_normed_ptr, new_ptr, update_ptr, gamma_ptr, scale_ptr, weight_ptr, moments_ptr,
    dx_ptr, dupdate_ptr, sums_ptr,
    rows, inner, stride_uo, stride_ui, rows_per_scale, blocks,
    C: tl.constexpr, CP: tl.constexpr, BLOCK_R: tl.constexpr, NEW: tl.constexpr, NORMED: tl.constexpr,
    GAMMA: tl.constexpr, ROW_SCALE: tl.constexpr, WEIGHT: tl.constexpr, OF_X: tl.constexpr, OF_UPDATE: tl.constexpr,
    OF_GAMMA: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_BIAS: tl.constexpr, ACC: tl.constexpr,
):
    """grad_new, grad_normed and new (rows, C), update (outer, inner, C), gamma and weight (C,), scale (rows /
    rows_per_scale,), moments (2, rows) -> dx and dupdate (rows, C), sums (programs, 3, C): of gamma, norm_weight and
    norm_bias, those that are asked for."""
    pid = tl.program_id(0)
    c = tl.arange(0, CP)
    inside = (c < C)[None, :]
    dgamma = tl.zeros((CP,), ACC)
    dweight = tl.zeros((CP,), ACC)
    dbias = tl.zeros((CP,), ACC)
    first = pid
    last = pid + 1
    if OF_GAMMA or OF_WEIGHT or OF_BIAS:
        first = pid * blocks
        last = first + blocks
    for block in range(first, last):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        live = (r < rows)[:, None] & inside
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        dy = tl.zeros((BLOCK_R, CP), ACC)
        if NORMED:
            mean = tl.load(moments_ptr + r, mask=r < rows, other=0.0)
            rstd = tl.load(moments_ptr + rows + r, mask=r < rows, other=0.0)
            g = tl.load(grad_normed_ptr + at, mask=live, other=0.0).to(ACC)
            n = tl.load(new_ptr + at, mask=live, other=0.0).to(ACC)
            n = tl.where(inside, (n - mean[:, None]) * rstd[:, None], 0.0)
            if OF_WEIGHT:
                dweight += tl.sum(g * n, 0)
            if OF_BIAS:
                dbias += tl.sum(g, 0)
            if WEIGHT:
                g = g * tl.load(weight_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
            along_ones, along_n = tl.sum(g, 1) * (1.0 / C), tl.sum(g * n, 1) * (1.0 / C)
            dy = (g - along_ones[:, None] - n * along_n[:, None]) * rstd[:, None]
        if NEW:
            dy += tl.load(grad_new_ptr + at, mask=live, other=0.0).to(ACC)
        if OF_X:
            tl.store(dx_ptr + at, dy.to(dx_ptr.dtype.element_ty), mask=live)
        if ROW_SCALE:
            dy = dy * tl.load(scale_ptr + r // rows_per_scale, mask=r < rows, other=0.0).to(ACC)[:, None]
        if OF_GAMMA:
            update = tl.load(_rows(update_ptr, r, inner, stride_uo, stride_ui, c), mask=live, other=0.0).to(ACC)
            dgamma += tl.sum(tl.where(live, dy * update, 0.0), 0)
        if OF_UPDATE:
            if GAMMA:
                dy = dy * tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
            tl.store(dupdate_ptr + at, dy.to(dupdate_ptr.dtype.element_ty), mask=live)
    if OF_GAMMA:
        tl.store(sums_ptr + pid * 3 * C + c, dgamma, mask=c < C)
    if OF_WEIGHT:
        tl.store(sums_ptr + (pid * 3 + 1) * C + c, dweight, mask=c < C)
    if OF_BIAS:
        tl.store(sums_ptr + (pid * 3 + 2) * C + c, dbias, mask=c < C)
