"""Triton kernels of the gradients through the token axis. Logits are computed again, tile by tile, from the saved
log-sum-exp; every element is summed by one program, or by a fixed number of splits that are added in order.

With g = dL/d(a @ readerᵀ), twice = 2 dL/d(Σ a²) and da = g @ reader + twice a, the gradient of the logits is

    logits        dt = da
    softmax       dt = a (da - Σ_v a da)            Σ_v a da = <g, out> + twice Σ a²
    log-softmax   dt = da - exp(a) Σ_v da           Σ_v da = <g, Σ_v reader> + twice Σ_v a

so that what is subtracted is known per row before the first tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_fwd import LOGITS, SOFTMAX, token_logits


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit(do_not_specialize=["B"])  # a smaller last batch compiles nothing
def prototype_cosine_reader_grad_kernel(
    hidden, weight, bias, grad, saved, out,
    B, C, V, D, stride_h, stride_w,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out (D, V) = gᵀ a, a block of dims and tokens per program, over all rows.

    hidden (B, C), weight (V, C), bias (V,), grad (B, D), saved (2, B): log-sum-exp first.
    """
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D, BLOCK_V), ACC)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        last = tl.minimum(rows, B - 1).to(tl.int64)
        a = token_logits(hidden + last * stride_h, weight, bias, v, C, V, stride_w,
                         HAS_BIAS, ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_C)
        if ACTIVATION != LOGITS:
            a -= tl.load(saved + last)[:, None]
            if ACTIVATION == SOFTMAX:
                a = tl.exp(a)
        ok = (rows < B)[:, None] & (dims < D)[None, :]
        g = tl.load(grad + last[:, None] * D + dims[None, :], mask=ok, other=0.0)
        acc = tl.dot(tl.trans(g), a.to(g.dtype), acc, input_precision=PRECISION, out_dtype=ACC)
    ok = (dims < D)[:, None] & (v < V)[None, :]
    tl.store(out + dims.to(tl.int64)[:, None] * V + v[None, :], acc.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["B", "per_split"])  # a smaller last batch compiles nothing
def prototype_cosine_hidden_grad_kernel(
    hidden, weight, bias, reader, grad, saved, subtract, twice, part, bias_part,
    B, C, V, D, per_split, stride_h, stride_w, stride_r,
    ACTIVATION: tl.constexpr, SQUARES: tl.constexpr, HAS_BIAS: tl.constexpr,
    FOR_HIDDEN: tl.constexpr, FOR_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """part (S, B, C) = dt @ weight over a split's tokens; bias_part (row blocks, V) = sum of dt over a block's rows.

    hidden (B, C), weight (V, C), bias (V,), reader (D, V), grad (B, D), saved (2, B): log-sum-exp first; subtract and
    twice (B,).
    """
    per_split = per_split // BLOCK_V * BLOCK_V  # says that it is a multiple; tl.multiple_of of an argument does nothing
    split = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    channel = tl.program_id(2) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_ok = rows < B
    last = tl.minimum(rows, B - 1).to(tl.int64)
    first, stop = split * per_split, tl.minimum(split * per_split + per_split, V)
    acc = tl.zeros((BLOCK_B, BLOCK_O), ACC)
    tl.assume(stop > first)
    for start in range(first, stop, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        token_ok = v < stop
        token = tl.minimum(v, V - 1).to(tl.int64)
        dt = tl.zeros((BLOCK_B, BLOCK_V), ACC)
        tl.assume(D > 0)
        for first_dim in range(0, D, BLOCK_D):
            d = first_dim + tl.arange(0, BLOCK_D)
            g = tl.load(grad + last[:, None] * D + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
            r = tl.load(reader + tl.minimum(d, D - 1).to(tl.int64)[:, None] * stride_r + v[None, :],
                        mask=(d < D)[:, None] & token_ok[None, :], other=0.0)
            dt = tl.dot(g, r, dt, input_precision=PRECISION, out_dtype=ACC)
        if ACTIVATION != LOGITS or SQUARES:
            a = token_logits(hidden + last * stride_h, weight, bias, v, C, V, stride_w,
                             HAS_BIAS, ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_C)
            if ACTIVATION != LOGITS:
                a -= tl.load(saved + last)[:, None]
            if ACTIVATION == SOFTMAX:
                a = tl.exp(a)
            if SQUARES:
                dt += tl.load(twice + rows, mask=row_ok, other=0.0)[:, None] * a
            if ACTIVATION == SOFTMAX:
                dt = (dt - tl.load(subtract + rows, mask=row_ok, other=0.0)[:, None]) * a
            if ACTIVATION > SOFTMAX:
                dt -= tl.load(subtract + rows, mask=row_ok, other=0.0)[:, None] * tl.exp(a)
        dt = tl.where(row_ok[:, None] & token_ok[None, :], dt, 0.0)
        if FOR_HIDDEN:
            w = tl.load(weight + token[:, None] * stride_w + channel[None, :],
                        mask=token_ok[:, None] & (channel < C)[None, :], other=0.0)
            acc = tl.dot(dt.to(w.dtype), w, acc, input_precision=PRECISION, out_dtype=ACC)
        if FOR_BIAS:
            if tl.program_id(2) == 0:
                tl.store(bias_part + tl.program_id(1).to(tl.int64) * V + v, tl.sum(dt, 0), mask=token_ok)
    if FOR_HIDDEN:
        to = part + (split.to(tl.int64) * B + rows[:, None]) * C + channel[None, :]
        tl.store(to, acc, mask=row_ok[:, None] & (channel < C)[None, :])
