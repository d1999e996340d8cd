"""Triton kernels of the forward pass.

One program attends a block of query rows of one image and head to all its keys. Keys come from two places, the image's
rows of the packed qkv and the prompts, in three parts:

    full blocks of tokens | full blocks of prompts | one or two narrow blocks of what is left of both

The last part mixes rows of both sources, so that neither wastes a block of its own, and is the only one with a mask.
Indices past the end are clamped to the last row instead of masked: loads stay wide and never leave their tensor.

Softmax is online and in base 2. With t = score * factor, where factor holds log2(e) and, without a bias, the scale, the
running row maximum m of t, the running sum l and accumulator acc follow

    m' = max(m, max_j t_j),  p_j = 2^(t_j - m'),  l' = l * 2^(m - m') + sum_j p_j,  acc' = acc * 2^(m - m') + p @ v

and lse = (m + log2 l) * ln 2. Two choices of `configs.ForwardConfig` change that:

    scores resident   the scores of all keys stay in registers: all blocks are multiplied first and share one maximum
    keys resident     a program loads all keys and values once and walks over all blocks of rows of its image and head
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_common import (
    LN2,
    PROMPTS,
    TOKENS,
    Rows,
    bias_rows,
    block_bias,
    full_keys,
    head_columns,
    head_table,
    key_terms,
    keys_of,
    load_ids,
    prompt_bias,
    prompt_block,
    prompt_range,
    query_rows,
    query_terms,
    scores,
    table_index,
    tail_block,
    tail_keys,
    tail_keys_left,
    tail_scores,
    token_block,
)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def _accumulate(acc, l, m, s, v, MATH: tl.constexpr):
    """acc, l and m with the scores and values of one more block."""
    m_new = tl.maximum(m, tl.max(s, 1) * MATH.FACTOR)
    p = tl.exp2(s * MATH.FACTOR - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
    return acc, l, m_new


@triton.jit
def _attend(acc, l, m, q, k, v, bias, valid, HAS_BIAS: tl.constexpr, MASK: tl.constexpr, MATH: tl.constexpr):
    s = scores(q, k, bias, HAS_BIAS, MATH)
    if MASK:
        s = tl.where(valid[None, :], s, float("-inf"))
    return _accumulate(acc, l, m, s, v, MATH)


@triton.jit
def _attend_streaming(q, keys, bias, LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
                      WINDOW: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr):
    """acc, l and m, from one block of scores at a time."""
    BLOCK_N: tl.constexpr = KEYS.BLOCK_N
    # Finite, so that a row masked so far has a maximum to subtract, and below every score that is not a mask.
    m = tl.full((BLOCK_M,), -1e30, MATH.ACC)
    l = tl.zeros((BLOCK_M,), MATH.ACC)
    DP: tl.constexpr = LAYOUT.DP  # Triton 3.6 takes no field of a group in a shape
    acc = tl.zeros((BLOCK_M, DP), MATH.ACC)
    every = tl.arange(0, BLOCK_N) >= 0

    full_tokens = 0
    if KEYS.TOKEN_BLOCKS > 0:
        full_tokens = (keys.N // BLOCK_N) * BLOCK_N
        # Without the zero-trip path ptxas keeps the wgmmas asynchronous (C7515 otherwise).
        tl.assume(full_tokens > 0)
        for first in tl.range(0, full_tokens, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, x = token_block(first, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH)
            acc, l, m = _attend(acc, l, m, q, k, v, x, every, BIAS.KIND, False, MATH)

    full_prompts = 0
    if KEYS.PROMPT_BLOCKS > 0:
        full_prompts = (keys.P // BLOCK_N) * BLOCK_N
        if not LAYOUT.POOL:
            tl.assume(full_prompts > 0)
        for first in tl.range(0, full_prompts, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, x = prompt_block(first, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH)
            acc, l, m = _attend(acc, l, m, q, k, v, x, every, BIAS.PROMPT_COLUMNS | BIAS.COLUMN_BIAS, False, MATH)

    if KEYS.TAIL_LOOP:
        for first in tl.range(0, tail_keys_left(keys, full_tokens, full_prompts, LAYOUT), KEYS.TAIL_1, num_stages=1):
            t = first + tl.arange(0, KEYS.TAIL_1)
            k, v, x, valid = tail_block(t, keys, full_tokens, full_prompts, bias, LAYOUT, BIAS, WINDOW, MATH)
            acc, l, m = _attend(acc, l, m, q, k, v, x, valid, (BIAS.KIND > 0) | BIAS.COLUMN_BIAS, True, MATH)
    else:
        for i in tl.static_range((KEYS.TAIL_1 > 0) + (KEYS.TAIL_2 > 0)):
            if i == 0:
                t = tl.arange(0, KEYS.TAIL_1)
            else:
                t = KEYS.TAIL_1 + tl.arange(0, KEYS.TAIL_2)
            k, v, x, valid = tail_block(t, keys, full_tokens, full_prompts, bias, LAYOUT, BIAS, WINDOW, MATH)
            acc, l, m = _attend(acc, l, m, q, k, v, x, valid, (BIAS.KIND > 0) | BIAS.COLUMN_BIAS, True, MATH)
    return acc, l, m


@triton.jit
def _key_part(i: tl.constexpr, keys, LAYOUT: tl.constexpr, KEYS: tl.constexpr):
    """k and v of part i of all keys, in the order of the module's docstring."""
    BLOCK_N: tl.constexpr = KEYS.BLOCK_N
    FULL: tl.constexpr = KEYS.TOKEN_BLOCKS + KEYS.PROMPT_BLOCKS
    if i < KEYS.TOKEN_BLOCKS:
        k, v = full_keys(keys, i * BLOCK_N, LAYOUT, BLOCK_N, TOKENS)
    elif i < FULL:
        k, v = full_keys(keys, (i - KEYS.TOKEN_BLOCKS) * BLOCK_N, LAYOUT, BLOCK_N, PROMPTS)
    else:
        if i == FULL:
            t = tl.arange(0, KEYS.TAIL_1)
        else:
            t = KEYS.TAIL_1 + tl.arange(0, KEYS.TAIL_2)
        k, v = tail_keys(t, keys, KEYS.TOKEN_BLOCKS * BLOCK_N, KEYS.PROMPT_BLOCKS * BLOCK_N, LAYOUT)
    return k, v


@triton.jit
def _score_part(i: tl.constexpr, q, k, keys, bias, LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
                WINDOW: tl.constexpr, MATH: tl.constexpr):
    """Scores of part i of all keys, -inf where a tail is padded."""
    BLOCK_N: tl.constexpr = KEYS.BLOCK_N
    FULL: tl.constexpr = KEYS.TOKEN_BLOCKS + KEYS.PROMPT_BLOCKS
    if i < KEYS.TOKEN_BLOCKS:
        x = 0.0
        if BIAS.KIND:
            x = block_bias(bias, i * BLOCK_N + tl.arange(0, BLOCK_N), keys.N, BIAS, WINDOW, MATH.ACC)
        s = scores(q, k, x, BIAS.KIND, MATH)
    elif i < FULL:
        x = prompt_bias((i - KEYS.TOKEN_BLOCKS) * BLOCK_N, keys.N, bias, BLOCK_N, BIAS, WINDOW, MATH)
        s = scores(q, k, x, BIAS.PROMPT_COLUMNS | BIAS.COLUMN_BIAS, MATH)
    else:
        if i == FULL:
            t = tl.arange(0, KEYS.TAIL_1)
        else:
            t = KEYS.TAIL_1 + tl.arange(0, KEYS.TAIL_2)
        x, valid = tail_scores(t, keys, KEYS.TOKEN_BLOCKS * BLOCK_N, KEYS.PROMPT_BLOCKS * BLOCK_N, bias, LAYOUT, BIAS,
                               WINDOW, MATH)
        s = tl.where(valid[None, :], scores(q, k, x, (BIAS.KIND > 0) | BIAS.COLUMN_BIAS, MATH), float("-inf"))
    return s


@triton.jit
def _attend_unrolled(q, keys, resident_k, resident_v, bias, LAYOUT: tl.constexpr, KEYS: tl.constexpr,
                     BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr,
                     KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr):
    """acc, l and m, all parts written out: with resident scores there is one maximum, and nothing is rescaled."""
    FULL: tl.constexpr = KEYS.TOKEN_BLOCKS + KEYS.PROMPT_BLOCKS
    PARTS: tl.constexpr = FULL + (KEYS.TAIL_1 > 0) + (KEYS.TAIL_2 > 0)
    # Finite for rows that are masked as a whole.
    m = tl.full((BLOCK_M,), -1e30, MATH.ACC)
    l = tl.zeros((BLOCK_M,), MATH.ACC)
    DP: tl.constexpr = LAYOUT.DP  # Triton 3.6 takes no field of a group in a shape
    acc = tl.zeros((BLOCK_M, DP), MATH.ACC)
    s = ()
    values = ()
    for i in tl.static_range(PARTS):
        if KEYS_RESIDENT:
            k = resident_k[i]
            v = resident_v[i]
        else:
            k, v = _key_part(i, keys, LAYOUT, KEYS)
            if MATH.QUERY_SCALE != 1.0:
                k = k * MATH.QUERY_SCALE
        x = _score_part(i, q, k, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH)
        if SCORES_RESIDENT:
            s = s + (x,)  # type: ignore[assignment]  # noqa: RUF005
            values = values + (v,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            acc, l, m = _accumulate(acc, l, m, x, v, MATH)

    if SCORES_RESIDENT:
        if FULL > 0:
            largest = s[0]  # type: ignore[misc]
            for i in tl.static_range(1, FULL):
                largest = tl.maximum(largest, s[i])
            m = tl.maximum(m, tl.max(largest, 1) * MATH.FACTOR)
        for i in tl.static_range(FULL, PARTS):
            m = tl.maximum(m, tl.max(s[i], 1) * MATH.FACTOR)
        for i in tl.static_range(PARTS):
            p = tl.exp2(s[i] * MATH.FACTOR - m[:, None])
            l += tl.sum(p, 1)
            acc = tl.dot(p.to(values[i].dtype), values[i], acc, input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
    return acc, l, m


@triton.jit
def _attend_rows(first, queries, keys, resident_k, resident_v, bias_ptr, columns, ids_ptr, out_ptr, lse_ptr, b, h, rows,
                 prompt_column, stride_th, LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr,
                 WINDOW: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
                 KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr, WITH_LSE: tl.constexpr):
    """Attend and store the rows from `first` on."""
    row = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
    offs_d = tl.arange(0, LAYOUT.DP)
    q = query_rows(row, queries, LAYOUT)
    # Scaled queries take registers as an operand of wgmma; where all keys or all scores stay, keys are scaled instead.
    if MATH.QUERY_SCALE != 1.0 and not KEYS_RESIDENT and not SCORES_RESIDENT:
        q = q * MATH.QUERY_SCALE

    head = queries.tokens
    if BIAS.KIND:
        head = bias_ptr + h.to(tl.int64) * stride_th
    bias = bias_rows(head, columns, ids_ptr, row, queries.N, prompt_column, BIAS, WINDOW, LAYOUT.INDEX)

    if KEYS_RESIDENT or SCORES_RESIDENT:
        acc, l, m = _attend_unrolled(q, keys, resident_k, resident_v, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH, BLOCK_M,
                                     KEYS_RESIDENT, SCORES_RESIDENT)
    else:
        acc, l, m = _attend_streaming(q, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH, BLOCK_M, STAGES)

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    # Offsets and masks depend on the thread alone, and masks on the offsets: row numbers would be held in registers
    # from the loads of queries on, and spill where 128 rows take all of them.
    width: tl.constexpr = LAYOUT.H * LAYOUT.D
    at = (b * rows + first) * width + h * LAYOUT.D
    i = tl.arange(0, BLOCK_M)
    offset = i[:, None] * width + offs_d[None, :]
    keep = offset < tl.minimum(rows - first, BLOCK_M) * width
    if LAYOUT.D != LAYOUT.DP:
        keep = keep & (offs_d < LAYOUT.D)[None, :]
    tl.store(out_ptr + at + offset, out.to(out_ptr.dtype.element_ty), mask=keep)
    if WITH_LSE:
        tl.store(lse_ptr + ((b * LAYOUT.H + h) * rows + first) + i, (m + tl.log2(l)) * LN2, mask=i < rows - first)


@triton.jit
def prompted_attention_forward_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, column_ptr, ids_ptr, cos_ptr, sin_ptr, out_ptr, lse_ptr,
    N, P, pool_size, prompt_column, stride_b, stride_pb, stride_th,
    LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr, KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr,
    HEADS_FIRST: tl.constexpr, WITH_LSE: tl.constexpr,
):
    """qkv (B, N, 3*H*D); prompts (P, 2*H*D), per image (B, P, 2*H*D), a pool (pool_size, 2*H*D) with ranges (B, 2), or
    (P, 3*H*D) where they attend; bias (H, rows, columns) or (H, R + 1), values of prompt columns (H, P) or
    (H, pool_size), ids (N,), cos and sin (H or 1, N, D/2) -> out (B, rows, H*D) and lse (B, H, rows)."""
    H: tl.constexpr = LAYOUT.H
    rows = N
    if LAYOUT.PROMPT_QUERIES:
        rows = N + P
    row_blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    if KEYS_RESIDENT:
        h = pid % H
        b = pid // H
        first = 0
    elif HEADS_FIRST:
        h = pid % H
        b = pid // H // row_blocks
        first = (pid // H) % row_blocks * BLOCK_M
    else:
        h = pid // row_blocks % H
        b = pid // row_blocks // H
        first = (pid % row_blocks) * BLOCK_M
    b = b.to(tl.int64)

    prompts = qkv_ptr
    length = P
    start = 0
    if LAYOUT.HAS_PROMPTS:
        prompts = prompt_ptr + b * stride_pb + h * LAYOUT.D
        if LAYOUT.POOL:
            start, length = prompt_range(ranges_ptr, b, pool_size, P)
            prompts += start.to(tl.int64) * LAYOUT.STRIDE_P
    cos = head_table(cos_ptr, qkv_ptr, h, LAYOUT)
    sin = head_table(sin_ptr, qkv_ptr, h, LAYOUT)
    queries = Rows(qkv_ptr + b * stride_b + h * LAYOUT.D, prompts, N, length, cos, sin)
    keys = keys_of(queries, LAYOUT)
    columns = head_columns(column_ptr, qkv_ptr, h, start, P, pool_size, LAYOUT, BIAS)

    resident_k = ()
    resident_v = ()
    if KEYS_RESIDENT:
        PARTS: tl.constexpr = KEYS.TOKEN_BLOCKS + KEYS.PROMPT_BLOCKS + (KEYS.TAIL_1 > 0) + (KEYS.TAIL_2 > 0)
        for i in tl.static_range(PARTS):
            k, v = _key_part(i, keys, LAYOUT, KEYS)
            if MATH.QUERY_SCALE != 1.0:
                k = k * MATH.QUERY_SCALE
            resident_k = resident_k + (k,)  # type: ignore[assignment]  # noqa: RUF005
            resident_v = resident_v + (v,)  # type: ignore[assignment]  # noqa: RUF005
        tl.assume(rows > 0)
        for row in tl.range(0, rows, BLOCK_M, num_stages=1, loop_unroll_factor=1):
            _attend_rows(row, queries, keys, resident_k, resident_v, bias_ptr, columns, ids_ptr, out_ptr, lse_ptr, b, h,
                         rows, prompt_column, stride_th, LAYOUT, KEYS, BIAS, WINDOW, MATH, BLOCK_M, STAGES,
                         KEYS_RESIDENT, SCORES_RESIDENT, WITH_LSE)
    else:
        _attend_rows(first, queries, keys, resident_k, resident_v, bias_ptr, columns, ids_ptr, out_ptr, lse_ptr, b, h,
                     rows, prompt_column, stride_th, LAYOUT, KEYS, BIAS, WINDOW, MATH, BLOCK_M, STAGES,
                     KEYS_RESIDENT, SCORES_RESIDENT, WITH_LSE)


@triton.jit
def prompted_attention_expand_table_kernel(
    table_ptr, ids_ptr, tile_ptr, N, columns, stride_r, stride_h, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """table (R, H), ids (N,) -> tile (H, N, columns): program (row block, column block, head)."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(2)
    query, query_class = query_terms(load_ids(ids_ptr, i, N, WINDOW), WINDOW)
    key, key_class = key_terms(load_ids(ids_ptr, j, N, WINDOW), WINDOW)
    index = table_index(query[:, None], query_class[:, None], key[None, :], key_class[None, :], WINDOW)
    R: tl.constexpr = (2 * WINDOW.HEIGHT - 1) * (2 * WINDOW.WIDTH - 1) + 3
    x = tl.load(table_ptr + index * stride_r + h * stride_h, mask=index < R, other=0.0)
    at = tile_ptr + (h.to(tl.int64) * N + i[:, None]) * columns + j[None, :]
    tl.store(at, x.to(tile_ptr.dtype.element_ty), mask=(i < N)[:, None] & (j < columns)[None, :])
