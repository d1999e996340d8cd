"""Triton kernels from hidden states to reader @ activation(token logits), and on to cosines.

A program of the first kernel takes a block of rows, a block of reader rows (D) and a split of the tokens. It walks over
its tokens in tiles: logits t = W h + b, activation a, acc += a @ readerᵀ. Nothing as long as V is stored. With the
running row maximum m, everything is relative to m:

    softmax       p = exp(t - m),  l = Σ p,  acc = Σ p r,  s2 = Σ p²,  rescaled by exp(m - m') when m grows to m'
    log-softmax   x = t - m <= 0,  l = Σ exp x,  acc = Σ x r,  s1 = Σ x,  s2 = Σ x²,  seen = Σ r,  n tokens so far,
                  and with u = m - m' <= 0:  acc += u seen,  s2 += 2 u s1 + n u²,  s1 += n u

All terms of s1 and s2 have one sign, so that nothing cancels however far the logits are from zero. The second kernel
adds the splits in a fixed order, moving each to the common maximum by the same rules, and subtracts log Σ exp at the
end.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOGITS = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def token_logits(hidden_rows, weight, bias, v, C, V, stride_w,
                 HAS_BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_B, BLOCK_V) logits of the tokens v; those past the end repeat the last one."""
    last = tl.minimum(v, V - 1)
    columns = weight + last.to(tl.int64)[None, :] * stride_w
    t = tl.zeros((BLOCK_B, BLOCK_V), ACC)
    # Without a path of no trips the tensor-core instructions of neighbouring loops need not be serialised.
    tl.assume(C > 0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        h = tl.load(hidden_rows[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
        w = tl.load(columns + c[:, None], mask=(c < C)[:, None], other=0.0)
        t = tl.dot(h, w, t, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        t += tl.load(bias + last).to(ACC)[None, :]
    return t


@triton.jit(do_not_specialize=["B", "per_split"])  # a smaller last batch compiles nothing
def prototype_cosine_readout_kernel(
    hidden, weight, bias, reader, part, seen_part, statistics,
    B, C, V, D, per_split, stride_h, stride_w, stride_r,
    ACTIVATION: tl.constexpr, SQUARES: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """hidden (B, C), weight (V, C), bias (V,), reader (D, V) -> by splits, part (S, B, D), seen_part (S, D) and
    statistics (S, 4, B): m, l, s1, s2."""
    per_split = per_split // BLOCK_V * BLOCK_V  # says that it is a multiple; tl.multiple_of of an argument does nothing
    split = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    hidden_rows = hidden + tl.minimum(rows, B - 1).to(tl.int64) * stride_h
    reader_rows = reader + tl.minimum(dims, D - 1).to(tl.int64) * stride_r
    first, stop = split * per_split, tl.minimum(split * per_split + per_split, V)

    acc = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    m = tl.full((BLOCK_B,), float("-inf"), ACC)
    l = tl.zeros((BLOCK_B,), ACC)
    s1 = tl.zeros((BLOCK_B,), ACC)
    s2 = tl.zeros((BLOCK_B,), ACC)
    seen = tl.zeros((BLOCK_D,), ACC)
    tl.assume(stop > first)
    for start in range(first, stop, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        t = token_logits(hidden_rows, weight, bias, v, C, V, stride_w,
                         HAS_BIAS, ACC, PRECISION, BLOCK_B, BLOCK_V, BLOCK_C)
        r = tl.load(reader_rows[:, None] + v[None, :], mask=(dims < D)[:, None] & (v < stop)[None, :], other=0.0)
        if ACTIVATION == LOGITS:
            a = tl.where((v < stop)[None, :], t, 0.0)
        else:
            t = tl.where((v < stop)[None, :], t, float("-inf"))
            new = tl.maximum(m, tl.max(t, 1))
            if ACTIVATION == SOFTMAX:
                scale = tl.exp(m - new)
                a = tl.exp(t - new[:, None])
                l = l * scale + tl.sum(a, 1)
                s2 = s2 * scale * scale
                acc = acc * scale[:, None]
            else:
                seen_tokens = (start - first).to(ACC)
                u = tl.where(seen_tokens > 0, m - new, 0.0)
                l = l * tl.exp(u) + tl.sum(tl.exp(t - new[:, None]), 1)
                a = tl.where((v < stop)[None, :], t - new[:, None], 0.0)
                s2 += 2.0 * u * s1 + seen_tokens * u * u
                s1 += seen_tokens * u + tl.sum(a, 1)
                acc += u[:, None] * seen[None, :]
                seen += tl.sum(r.to(ACC), 1)
            m = new
        if SQUARES:
            s2 += tl.sum(a * a, 1)
        acc = tl.dot(a.to(r.dtype), tl.trans(r), acc, input_precision=PRECISION, out_dtype=ACC)

    row_ok = rows < B
    to = part + (split.to(tl.int64) * B + rows[:, None]) * D + dims[None, :]
    tl.store(to, acc, mask=row_ok[:, None] & (dims < D)[None, :])
    if tl.program_id(2) == 0:
        at = statistics + split * 4 * B + rows
        if ACTIVATION != LOGITS:
            tl.store(at, m, mask=row_ok)
            tl.store(at + B, l, mask=row_ok)
            tl.store(at + 2 * B, s1, mask=row_ok)
        tl.store(at + 3 * B, s2, mask=row_ok)
    if ACTIVATION > SOFTMAX:
        if tl.program_id(1) == 0:
            tl.store(seen_part + split * D + dims, seen, mask=dims < D)


@triton.jit(do_not_specialize=["B", "per_split", "S"])  # a smaller last batch compiles nothing
def prototype_cosine_combine_kernel(
    part, seen_part, statistics, out, squared, saved,
    B, V, D, per_split, S,
    ACTIVATION: tl.constexpr, SQUARES: tl.constexpr, ACC: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """part (S, B, D), seen_part (S, D), statistics (S, 4, B) -> out (B, D), squared (B,) and saved (2, B): log-sum-exp
    and the sum of a. BLOCK_S splits are added at a time."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    splits = tl.arange(0, BLOCK_S)
    row_ok = rows < B
    tile_ok = row_ok[:, None] & (dims < D)[None, :]
    m = tl.full((BLOCK_B,), float("-inf"), ACC)
    if ACTIVATION != LOGITS:
        for first in range(0, S, BLOCK_S):
            s = first + splits[:, None]
            largest = tl.load(statistics + s * 4 * B + rows[None, :], mask=(s < S) & row_ok[None, :],
                              other=float("-inf"))
            m = tl.maximum(m, tl.max(largest, 0))
        m = tl.where(row_ok, m, 0.0)
    acc = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    l = tl.zeros((BLOCK_B,), ACC)
    s1 = tl.zeros((BLOCK_B,), ACC)
    s2 = tl.zeros((BLOCK_B,), ACC)
    seen = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, S, BLOCK_S):
        s = first + splits
        ok = (s < S)[:, None] & row_ok[None, :]
        at = statistics + s[:, None] * 4 * B + rows[None, :]
        row = s.to(tl.int64)[:, None, None] * B + rows[None, :, None]
        x = tl.load(part + row * D + dims[None, None, :], mask=(s < S)[:, None, None] & tile_ok[None, :, :], other=0.0)
        x2 = tl.load(at + 3 * B, mask=ok, other=0.0)
        if ACTIVATION == LOGITS:
            acc += tl.sum(x, 0)
            s2 += tl.sum(x2, 0)
        else:
            u = tl.where(ok, tl.load(at, mask=ok, other=0.0) - m[None, :], 0.0)
            scale = tl.exp(u)
            l += tl.sum(tl.load(at + B, mask=ok, other=0.0) * scale, 0)
            if ACTIVATION == SOFTMAX:
                acc += tl.sum(x * scale[:, :, None], 0)
                s2 += tl.sum(x2 * scale * scale, 0)
            else:
                n = tl.maximum(tl.minimum(per_split, V - s * per_split), 0).to(ACC)[:, None]
                r = tl.load(seen_part + s[:, None] * D + dims[None, :], mask=(s < S)[:, None] & (dims < D)[None, :],
                            other=0.0)
                x1 = tl.load(at + 2 * B, mask=ok, other=0.0)
                acc += tl.sum(x + u[:, :, None] * r[:, None, :], 0)
                s2 += tl.sum(x2 + 2.0 * u * x1 + n * u * u, 0)
                s1 += tl.sum(x1 + n * u, 0)
                seen += tl.sum(r, 0)
    if ACTIVATION == SOFTMAX:
        acc = acc / l[:, None]
        s2 = s2 / (l * l)
    if ACTIVATION > SOFTMAX:
        log_l = tl.log(l)
        acc -= log_l[:, None] * seen[None, :]
        s2 += V * log_l * log_l - 2.0 * log_l * s1
        s1 -= V * log_l
    tl.store(out + rows.to(tl.int64)[:, None] * D + dims[None, :], acc, mask=tile_ok)
    if tl.program_id(1) == 0:
        if SQUARES:
            tl.store(squared + rows, s2, mask=row_ok)
        if ACTIVATION != LOGITS:
            tl.store(saved + rows, m + tl.log(l), mask=row_ok)
            tl.store(saved + B + rows, s1, mask=row_ok)


@triton.jit
def prototype_cosine_task_linear_kernel(
    hidden, weight, bias, task_ids, out, T, C, D, stride_h, stride_t, stride_w, stride_b,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[i] = weight[task_ids[i]] @ hidden[i] + bias[task_ids[i]], one row and block of D per program.

    hidden (B, C), weight (T, D, C), bias (T, D), task_ids (B,) -> out (B, D).
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    task = tl.minimum(tl.maximum(tl.load(task_ids + row), 0), T - 1).to(tl.int64)
    weight_rows = weight + task * stride_t + tl.minimum(dims, D - 1).to(tl.int64) * stride_w
    acc = tl.zeros((BLOCK_D, BLOCK_C), ACC)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        h = tl.load(hidden + row * stride_h + c, mask=c < C, other=0.0)
        w = tl.load(weight_rows[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
        acc += w.to(ACC) * h.to(ACC)[None, :]
    e = tl.sum(acc, 1) + tl.load(bias + task * stride_b + dims, mask=dims < D, other=0.0).to(ACC)
    tl.store(out + row * D + dims, e, mask=dims < D)


@triton.jit
def _inverse_norm(squares, eps):
    """1 / max(root of squares, eps). One approximate instruction instead of a root and a quotient for every cosine."""
    return tl.minimum(tl.rsqrt(squares), 1.0 / eps)


@triton.jit(do_not_specialize=["B"])  # a smaller last batch compiles nothing
def prototype_cosine_cosine_kernel(
    embedding, prototypes, out, B, K, D, stride_c, eps,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """embedding (B, D), prototypes (K, D) -> out (B, K)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    classes = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    embedding_rows = embedding + tl.minimum(rows, B - 1).to(tl.int64) * D
    prototype_rows = prototypes + tl.minimum(classes, K - 1).to(tl.int64) * stride_c
    acc = tl.zeros((BLOCK_B, BLOCK_K), ACC)
    row_squares = tl.zeros((BLOCK_B,), ACC)
    class_squares = tl.zeros((BLOCK_K,), ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        e = tl.load(embedding_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        c = tl.load(prototype_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0).to(ACC)
        acc = tl.dot(e, tl.trans(c), acc, input_precision=PRECISION, out_dtype=ACC)
        row_squares += tl.sum(e * e, 1)
        class_squares += tl.sum(c * c, 1)
    acc = acc * _inverse_norm(row_squares, eps)[:, None] * _inverse_norm(class_squares, eps)[None, :]
    ok = (rows < B)[:, None] & (classes < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + classes[None, :], acc, mask=ok)


@triton.jit
def prototype_cosine_task_cosine_kernel(
    embedding, prototypes, task_ids, offsets, out, T, D, widest, stride_c, eps,
    ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One row per program, against the classes of its own task; -inf beyond them.

    embedding (B, D), prototypes (all classes, D), task_ids (B,), offsets (T + 1,) -> out (B, widest).
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    task = tl.minimum(tl.maximum(tl.load(task_ids + row), 0), T - 1)
    first = tl.load(offsets + task)
    count = tl.load(offsets + task + 1) - first
    prototype_rows = prototypes + (first + tl.minimum(k, count - 1)).to(tl.int64) * stride_c
    products = tl.zeros((BLOCK_K,), ACC)
    class_squares = tl.zeros((BLOCK_K,), ACC)
    row_squares = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        e = tl.load(embedding + row * D + d, mask=d < D, other=0.0)
        c = tl.load(prototype_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0).to(ACC)
        products += tl.sum(c * e[None, :], 1)
        class_squares += tl.sum(c * c, 1)
        row_squares += e * e
    cosine = products * _inverse_norm(tl.sum(row_squares, 0), eps) * _inverse_norm(class_squares, eps)
    tl.store(out + row * widest + k, tl.where(k < count, cosine, float("-inf")), mask=k < widest)
