"""Triton kernels of the forward pass.

One program attends a block of query rows of one image and head to all its keys. Keys come from two places, the image's
rows of the packed qkv and the prompts, in three parts:

    full blocks of tokens | full blocks of prompts | one or two narrow blocks of what is left of both

The last part mixes rows of both sources, so that neither wastes a block of its own, and is the only one with a mask.
Indices past the end are clamped to the last row instead of masked: loads stay wide and never leave their tensor.

Softmax is online and in base 2. With t = score * factor, where factor holds log2(e) and, without a bias, the scale, the
running row maximum m of t, the running sum l and accumulator acc follow

    m' = max(m, max_j t_j),  p_j = 2^(t_j - m'),  l' = l * 2^(m - m') + sum_j p_j,  acc' = acc * 2^(m - m') + p @ v

and lse = (m + log2 l) * ln 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def load_rows(row_ptr, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP) of rows of D elements, zeros beyond D."""
    d = tl.arange(0, DP)
    if D == DP:
        x = tl.load(row_ptr[:, None] + d[None, :])
    else:
        x = tl.load(row_ptr[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    return x


@triton.jit
def load_block(base, offset, D: tl.constexpr, DP: tl.constexpr):
    """load_rows(base + offset), cheaper: row and channel are one integer before they meet the pointer."""
    d = tl.arange(0, DP)
    if D == DP:
        x = tl.load(base + (offset[:, None] + d[None, :]))
    else:
        x = tl.load(base + (offset[:, None] + d[None, :]), mask=(d < D)[None, :], other=0.0)
    return x


@triton.jit
def mixed_rows(t, tokens, prompts, first_token, first_prompt, left, N, P, stride_n: tl.constexpr,
               stride_p: tl.constexpr,
               HAS_PROMPTS: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr):
    """`left` token rows from `first_token` on, then to prompt rows from `first_prompt` on; t counts both."""
    ptr = tokens + tl.minimum(first_token + t, N - 1).to(INDEX) * stride_n
    if HAS_PROMPTS:
        prompt = tl.maximum(tl.minimum(first_prompt + tl.maximum(t - left, 0), P - 1), 0)
        ptr = tl.where(t < left, ptr, prompts + prompt.to(INDEX) * stride_p)
        if ALIGNED:
            # A choice of two pointers forgets what is known about both: without this, reads are 2 bytes wide.
            ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def bias_rows(tile, row, N, stride_tn: tl.constexpr, PARTIAL_BIAS: tl.constexpr):
    """Pointers to the rows of a head's tile. PARTIAL_BIAS: rows from N on are prompts and have none."""
    if PARTIAL_BIAS:
        row = tl.minimum(row, N - 1)
    return tile + row * stride_tn


@triton.jit
def block_bias(bias_row, column, has_bias, PARTIAL_BIAS: tl.constexpr, ACC: tl.constexpr):
    bias = tl.load(bias_row[:, None] + column[None, :]).to(ACC)
    if PARTIAL_BIAS:
        bias = tl.where(has_bias[:, None], bias, 0.0)
    return bias


@triton.jit
def tail_bias(t, bias_row, has_bias, full_tokens, full_prompts, left, total, prompt_column,
              PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, ACC: tl.constexpr):
    """Bias of the mixed block: `left` token columns, then prompt columns up to `total`."""
    # The tile's rows are padded to 16 columns, so this mask is constant over 16 and the load stays wide.
    padded = tl.cdiv(left, 16) * 16
    bias = tl.load(bias_row[:, None] + (full_tokens + t)[None, :], mask=(t < padded)[None, :], other=0.0).to(ACC)
    bias = tl.where((t < left)[None, :], bias, 0.0)
    if PROMPT_BIAS:
        column = prompt_column + full_prompts + t - left
        bias += tl.load(bias_row[:, None] + column[None, :], mask=((t >= left) & (t < total))[None, :],
                        other=0.0).to(ACC)
    if PARTIAL_BIAS:
        bias = tl.where(has_bias[:, None], bias, 0.0)
    return bias


@triton.jit
def prompt_range(ranges_ptr, b, pool_size, max_length):
    """Start and length of an image's rows of the pool, kept inside the pool whatever the ranges say."""
    start = tl.load(ranges_ptr + 2 * b)
    length = tl.load(ranges_ptr + 2 * b + 1)
    start = tl.minimum(tl.maximum(start, 0), pool_size)
    length = tl.minimum(tl.minimum(tl.maximum(length, 0), max_length), pool_size - start)
    return tl.minimum(start, pool_size - 1), length


@triton.jit
def _attend(acc, l, m, q, k, v, bias, valid, SCALE: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
            MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if BIAS:
        s = s * SCALE + bias
    elif SCALE != 1.0:
        s = s * SCALE
    if MASK:
        s = tl.where(valid[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * FACTOR)
    p = tl.exp2(s * FACTOR - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, l, m_new


@triton.jit
def _forward_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, tile_ptr, out_ptr, lse_ptr,
    N, P, pool_size, prompt_column,
    stride_b, stride_pb, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    TOKEN_LOOP: tl.constexpr, PROMPT_LOOP: tl.constexpr, HAS_PROMPTS: tl.constexpr, POOL: tl.constexpr,
    PROMPT_QUERIES: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
    WITH_LSE: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    rows = N
    if PROMPT_QUERIES:
        rows = N + P
    row_blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // row_blocks
    b = (bh // H).to(tl.int64)
    h = bh % H
    offs_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(offs_m, rows - 1)
    offs_d = tl.arange(0, DP)

    tokens = qkv_ptr + b * stride_b + h * D
    prompts = qkv_ptr
    if HAS_PROMPTS:
        prompts = prompt_ptr + b * stride_pb + h * D
        if POOL:
            start, P = prompt_range(ranges_ptr, b, pool_size, P)
            prompts += start.to(tl.int64) * stride_p
    # Values follow keys by H*D elements in both sources, and keys follow queries where there are any.
    prompt_keys = prompts
    if PROMPT_QUERIES:
        prompt_keys = prompts + H * D
    keys = tokens + H * D

    if PROMPT_QUERIES:
        q = load_rows(mixed_rows(row, tokens, prompts, 0, 0, N, N, P, stride_n, stride_p, True, ALIGNED, INDEX), D, DP)
    else:
        q = load_block(tokens, row.to(INDEX) * stride_n, D, DP)

    bias_row = tile_ptr
    has_bias = row < N
    if BIAS:
        bias_row = bias_rows(tile_ptr + h.to(tl.int64) * stride_th, row, N, stride_tn, PARTIAL_BIAS)

    # Finite, so that a row masked so far has a maximum to subtract, and below every score that is not a mask.
    m = tl.full((BLOCK_M,), -1e30, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, DP), ACC)
    every = tl.arange(0, BLOCK_N) >= 0

    full_tokens = 0
    if TOKEN_LOOP:
        full_tokens = (N // BLOCK_N) * BLOCK_N
        # Without the zero-trip path ptxas keeps the wgmmas asynchronous (C7515 otherwise).
        tl.assume(full_tokens > 0)
        for first in tl.range(0, full_tokens, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            j = first + tl.arange(0, BLOCK_N)
            k = load_block(keys, j.to(INDEX) * stride_n, D, DP)
            v = load_block(keys + H * D, j.to(INDEX) * stride_n, D, DP)
            bias = 0.0
            if BIAS:
                bias = block_bias(bias_row, j, has_bias, PARTIAL_BIAS, ACC)
            acc, l, m = _attend(acc, l, m, q, k, v, bias, every, SCALE, FACTOR, BIAS, False, ACC, PRECISION)

    full_prompts = 0
    if PROMPT_LOOP:
        full_prompts = (P // BLOCK_N) * BLOCK_N
        if not POOL:
            tl.assume(full_prompts > 0)
        for first in tl.range(0, full_prompts, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            j = first + tl.arange(0, BLOCK_N)
            k = load_block(prompt_keys, j.to(INDEX) * stride_p, D, DP)
            v = load_block(prompt_keys + H * D, j.to(INDEX) * stride_p, D, DP)
            bias = 0.0
            if PROMPT_BIAS:
                bias = block_bias(bias_row, prompt_column + j, has_bias, PARTIAL_BIAS, ACC)
            acc, l, m = _attend(acc, l, m, q, k, v, bias, every, SCALE, FACTOR, BIAS, False, ACC, PRECISION)

    if TAIL_1 > 0:
        left = N - full_tokens
        total = left
        if HAS_PROMPTS:
            total = left + P - full_prompts
        acc, l, m = _attend_tail(
            acc, l, m, q, tl.arange(0, TAIL_1), keys, prompt_keys, bias_row, has_bias, full_tokens, full_prompts,
            left, total,
            N, P, prompt_column, stride_n, stride_p, H, D, DP, HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, ALIGNED,
            INDEX,
            SCALE,
            FACTOR, ACC, PRECISION,
        )
        if TAIL_2 > 0:
            acc, l, m = _attend_tail(
                acc, l, m, q, TAIL_1 + tl.arange(0, TAIL_2), keys, prompt_keys, bias_row, has_bias, full_tokens,
                full_prompts, left, total, N, P, prompt_column, stride_n, stride_p, H, D, DP, HAS_PROMPTS, BIAS,
                PROMPT_BIAS,
                PARTIAL_BIAS, ALIGNED, INDEX, SCALE, FACTOR, ACC, PRECISION,
            )

    stored = offs_m < rows
    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_row = out_ptr + (b * rows + offs_m) * (H * D) + h * D
    keep = stored[:, None]
    if D != DP:
        keep = keep & (offs_d < D)[None, :]
    tl.store(out_row[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=keep)
    if WITH_LSE:
        tl.store(lse_ptr + (b * H + h) * rows + offs_m, (m + tl.log2(l)) * LN2, mask=stored)


@triton.jit
def _attend_tail(acc, l, m, q, t, keys, prompt_keys, bias_row, has_bias, full_tokens, full_prompts, left, total, N, P,
                 prompt_column, stride_n: tl.constexpr, stride_p: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr,
                 HAS_PROMPTS: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
                 ALIGNED: tl.constexpr, INDEX: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr,
                 ACC: tl.constexpr, PRECISION: tl.constexpr):
    key_ptr = mixed_rows(t, keys, prompt_keys, full_tokens, full_prompts, left, N, P, stride_n, stride_p, HAS_PROMPTS,
                         ALIGNED, INDEX)
    k = load_rows(key_ptr, D, DP)
    v = load_rows(key_ptr + H * D, D, DP)
    bias = 0.0
    if BIAS:
        bias = tail_bias(t, bias_row, has_bias, full_tokens, full_prompts, left, total, prompt_column, PROMPT_BIAS,
                         PARTIAL_BIAS, ACC)
    acc, l, m = _attend(acc, l, m, q, k, v, bias, t < total, SCALE, FACTOR, BIAS, True, ACC, PRECISION)
    return acc, l, m


@triton.jit
def table_index(query, key, height, width):
    """Row of the table for token ids `query` and `key`, and whether both have a position."""
    places = height * width
    rows = (2 * height - 1) * (2 * width - 1) + 3
    has_position = (query >= 0) & (query <= places) & (key >= 0) & (key <= places)
    p = tl.maximum(query - 1, 0)
    r = tl.maximum(key - 1, 0)
    index = p + (p // width) * (width - 1) - r - (r // width) * (width - 1) + (rows - 4) // 2
    index = tl.where(key == 0, rows - 2, index)
    index = tl.where(query == 0, tl.where(key == 0, rows - 1, rows - 3), index)
    return index, has_position


@triton.jit
def load_ids(ids_ptr, i, N, HAS_IDS: tl.constexpr):
    if HAS_IDS:
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
    else:
        ids = tl.where(i < N, i, -1)
    return ids


@triton.jit
def _expand_table_kernel(table_ptr, ids_ptr, tile_ptr, N, columns, height, width, stride_r, stride_h,
                         HAS_IDS: tl.constexpr, SATURATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The (H, N, columns) tile of a table: program (row block, column block, head)."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(2)
    query = load_ids(ids_ptr, i, N, HAS_IDS)[:, None]
    key = load_ids(ids_ptr, j, N, HAS_IDS)[None, :]
    index, has_position = table_index(query, key, height, width)
    x = tl.load(table_ptr + index * stride_r + h * stride_h, mask=has_position, other=0.0)
    if SATURATE:
        # Finite values stay finite in fp16, so that rows of equal large values stay uniform; -inf stays a mask.
        limited = tl.minimum(tl.maximum(x.to(tl.float32), -65504.0), 65504.0)
        x = tl.where(x == float("-inf"), float("-inf"), limited)
    at = tile_ptr + (h.to(tl.int64) * N + i[:, None]) * columns + j[None, :]
    tl.store(at, x.to(tile_ptr.dtype.element_ty), mask=(i < N)[:, None] & (j < columns)[None, :])
