"""Triton kernels of the forward pass.

One program takes one split of an image: some of its tokens, for all heads. It walks over the channels twice, with
tokens j, heads h and w_h the query times the key weights:

    first    the products x_j . w_h, and the mean and variance of every token, chunk by chunk
    second   the same channels again, from cache, normalised and summed with the split's softmax weights

Raw tokens are multiplied, since LN(x_j) . w_h = (x_j . w_h - mean_j sum(w_h)) / std_j: nothing is rounded before the
product, and the difference is taken in the accumulator's type. With mean_j far above std_j that difference cancels as
many digits as x_j itself has lost: in 16 bits x_j is exact and the accumulator has 13 to 16 bits more. Tokens of 32 or
64 bits are centred first, on the mean of their first channels, which costs a pass through registers and keeps those
digits too. Sums for mean and variance are always taken around that centre: the mean of b of C numbers is never further
than sqrt(C / b) standard deviations from the mean of all, so their squares lose a factor 1 + C / b of accuracy at most.

A second kernel merges the splits in order, prompts last, by the running maximum m, sum l and weighted sums of each,
in base 2:

    m' = max(m, m_s),  l' = l * 2^(m - m') + l_s * 2^(m_s - m'),  acc' = acc * 2^(m - m') + acc_s * 2^(m_s - m')

Indices past the last token or head are clamped instead of masked, so that loads stay wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def load_chunk(base, row_offset, c, C: tl.constexpr, EVEN: tl.constexpr):
    """Channels c of rows, zeros beyond C."""
    at = base + (row_offset[:, None] + c[None, :])
    if EVEN:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(c < C)[None, :], other=0.0)
    return x


@triton.jit
def first_mean(base, row_offset, C: tl.constexpr, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Mean of the first channels of every row, near enough to its mean to be subtracted before rounding."""
    x = load_chunk(base, row_offset, tl.arange(0, BLOCK_C), C, EVEN).to(ACC)
    FIRST: tl.constexpr = BLOCK_C if BLOCK_C < C else C
    return tl.sum(x, 1) * (1.0 / FIRST)


@triton.jit
def prompt_logits(prompts_ptr, bias_row, p, N, P, stride_ph, stride_pp, h,
                  PROMPT_BIAS: tl.constexpr, ACC: tl.constexpr):
    """Scaled scores of prompts p with their bias, -inf beyond P."""
    inside = (p < P)[None, :]
    t = tl.load(prompts_ptr + h[:, None] * stride_ph + p[None, :] * stride_pp, mask=inside, other=0.0).to(ACC)
    if PROMPT_BIAS:
        t += tl.load(bias_row[:, None] + (N + p)[None, :], mask=inside, other=0.0).to(ACC)
    return tl.where(inside, t, float("-inf"))


# a smaller last batch must not compile: strides of tensors that stand heads first count images
@triton.jit(do_not_specialize=["B", "stride_wb", "stride_wh"])
def readout_attention_split_kernel(
    x_ptr, w_ptr, bias_ptr, part_ptr, statistics_ptr, moments_ptr,
    B, N, splits, stride_b, stride_n: tl.constexpr, stride_wb, stride_wh, stride_bias,
    C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, CENTRE: tl.constexpr,
    EPS: tl.constexpr,
    INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """x (B, N, C), w (B, H, C), bias (H, N) -> part (B, splits, H, C) weighted sums, statistics (B, splits, 2, H)
    maximum and sum, moments (2, B, N) mean and 1/std. ALIGNED: strides of w are multiples of 16, which Triton does not
    look at."""
    if ALIGNED:
        # tl.multiple_of says nothing about an argument
        stride_wb, stride_wh = stride_wb // 16 * 16, stride_wh // 16 * 16
    pid = tl.program_id(0)
    split = pid % splits
    b = (pid // splits).to(tl.int64)
    j = split * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(j, N - 1)
    h = tl.arange(0, HP)
    head = tl.minimum(h, H - 1)
    x_base = x_ptr + b * stride_b
    w_base = w_ptr + b * stride_wb
    x_row = row.to(INDEX) * stride_n
    w_row = head.to(INDEX) * stride_wh
    dtype = w_ptr.dtype.element_ty

    centre = first_mean(x_base, x_row, C, EVEN, BLOCK_C, ACC)
    # Eight channels are summed at a time, which one thread holds, and threads once at the end.
    sums = tl.zeros((BLOCK_N, BLOCK_C // 8), ACC)
    squares = tl.zeros((BLOCK_N, BLOCK_C // 8), ACC)
    w_sum = tl.zeros((HP,), ACC)
    s = tl.zeros((HP, BLOCK_N), ACC)
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        x = load_chunk(x_base, x_row, c, C, EVEN)
        w = load_chunk(w_base, w_row, c, C, EVEN)
        centred = x.to(ACC) - centre[:, None]
        if not EVEN:
            centred = tl.where((c < C)[None, :], centred, 0.0)
        sums += tl.sum(tl.reshape(centred, (BLOCK_N, BLOCK_C // 8, 8)), 2)
        squares += tl.sum(tl.reshape(centred * centred, (BLOCK_N, BLOCK_C // 8, 8)), 2)
        w_sum += tl.sum(w.to(ACC), 1)
        if CENTRE:
            x = centred.to(dtype)
        s = tl.dot(w, tl.trans(x), s, input_precision=PRECISION, out_dtype=ACC)
    # products with a constant: on an NVIDIA GPU a quotient is off by up to two units in the last place, also by 1
    offset = tl.sum(sums, 1) * (1.0 / C)
    mean = centre + offset
    rstd = tl.rsqrt(tl.maximum(tl.sum(squares, 1) * (1.0 / C) - offset * offset, 0.0) + EPS)
    if not CENTRE:
        offset = mean
    s = (s - w_sum[:, None] * offset[None, :]) * rstd[None, :]
    if BIAS:
        s += tl.load(bias_ptr + head[:, None] * stride_bias + row[None, :]).to(ACC)
    s = tl.where((j < N)[None, :], s * LOG2E, float("-inf"))
    # Finite, so that a head masked so far has a maximum to subtract, and below every score that is not a mask.
    m = tl.maximum(tl.max(s, 1), -1e30)
    p = tl.exp2(s - m[:, None])

    at = (b * splits + split) * 2 * H + h
    tl.store(statistics_ptr + at, m, mask=h < H)
    tl.store(statistics_ptr + at + H, tl.sum(p, 1), mask=h < H)
    if KEEP:
        tl.store(moments_ptr + b * N + j, mean, mask=j < N)
        tl.store(moments_ptr + (B + b) * N + j, rstd, mask=j < N)
    p = p.to(dtype)
    out = part_ptr + ((b * splits + split) * H + h[:, None]) * C
    for first in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        x = load_chunk(x_base, x_row, c, C, EVEN)
        normed = ((x.to(ACC) - mean[:, None]) * rstd[:, None]).to(dtype)
        acc = tl.dot(p, normed, input_precision=PRECISION, out_dtype=ACC)
        tl.store(out + c[None, :], acc, mask=(h < H)[:, None] & (c < C)[None, :])


# a smaller last batch must not compile: strides of tensors that stand heads first count images
@triton.jit(do_not_specialize=["stride_pb", "stride_ph"])
def readout_attention_merge_kernel(
    part_ptr, statistics_ptr, prompts_ptr, bias_ptr, mixed_ptr, weights_ptr, mass_ptr, lse_ptr,
    N, P, splits, stride_pb, stride_ph, stride_pp, stride_bias,
    C: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, PROMPT_BIAS: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
):
    """part (B, splits, H, C), statistics (B, splits, 2, H), prompts (B, H, P) scaled scores, bias (H, N + P) -> mixed
    (B, H, C), weights (B, H, P) of prompts, mass (B, H) of tokens, lse (B, H): log-sum-exp in base 2, -inf where
    nothing is attended to."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.arange(0, HP)
    head = tl.minimum(h, H - 1)
    statistics = statistics_ptr + b * splits * 2 * H + head
    bias_row = bias_ptr
    if PROMPT_BIAS:
        bias_row = bias_ptr + head * stride_bias

    m = tl.full((HP,), -1e30, ACC)
    of_tokens = tl.zeros((HP,), ACC)
    acc = tl.zeros((HP, BLOCK_C), ACC)
    for split in range(0, splits):
        other = tl.load(statistics + split * 2 * H)
        m_new = tl.maximum(m, other)
        old, new = tl.exp2(m - m_new), tl.exp2(other - m_new)
        of_tokens = of_tokens * old + tl.load(statistics + split * 2 * H + H) * new
        at = part_ptr + ((b * splits + split) * H + head[:, None]) * C + c[None, :]
        acc = acc * old[:, None] + tl.load(at, mask=(c < C)[None, :], other=0.0) * new[:, None]
        m = m_new
    l = of_tokens
    top = m
    if HAS_PROMPTS:
        prompts = prompts_ptr + b * stride_pb
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            t = prompt_logits(prompts, bias_row, p, N, P, stride_ph, stride_pp, head, PROMPT_BIAS, ACC) * LOG2E
            new = tl.maximum(top, tl.max(t, 1))
            l = l * tl.exp2(top - new) + tl.sum(tl.exp2(t - new[:, None]), 1)
            top = new
    share = tl.exp2(m - top) / tl.where(l == 0.0, 1.0, l)
    tl.store(mixed_ptr + (b * H + h[:, None]) * C + c[None, :], (acc * share[:, None]).to(mixed_ptr.dtype.element_ty),
             mask=(h < H)[:, None] & (c < C)[None, :])

    if tl.program_id(1) == 0:
        tl.store(mass_ptr + b * H + h, (of_tokens * share).to(mass_ptr.dtype.element_ty), mask=h < H)
        if KEEP:
            tl.store(lse_ptr + b * H + h, top + tl.log2(l), mask=h < H)
        if HAS_PROMPTS:
            inverse = 1.0 / tl.where(l == 0.0, 1.0, l)
            for first in range(0, P, BLOCK_P):
                p = first + tl.arange(0, BLOCK_P)
                t = prompt_logits(prompts, bias_row, p, N, P, stride_ph, stride_pp, head, PROMPT_BIAS, ACC)
                weights = tl.exp2(t * LOG2E - top[:, None]) * inverse[:, None]
                tl.store(weights_ptr + (b * H + h[:, None]) * P + p[None, :],
                         weights.to(weights_ptr.dtype.element_ty), mask=(h < H)[:, None] & (p < P)[None, :])
