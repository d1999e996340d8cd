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
    bias_rows,
    block_bias,
    full_block,
    full_keys,
    key_terms,
    load_block,
    load_ids,
    load_rows,
    mixed_rows,
    prompt_range,
    query_terms,
    scores,
    table_index,
    tail_block,
    tail_keys,
    tail_scores,
)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def _accumulate(acc, l, m, s, v, FACTOR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc, l and m with the scores and values of one more block."""
    m_new = tl.maximum(m, tl.max(s, 1) * FACTOR)
    p = tl.exp2(s * FACTOR - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, l, m_new


@triton.jit
def _attend(acc, l, m, q, k, v, bias, valid, SCALE: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
            MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    s = scores(q, k, bias, SCALE, BIAS, ACC, PRECISION)
    if MASK:
        s = tl.where(valid[None, :], s, float("-inf"))
    return _accumulate(acc, l, m, s, v, FACTOR, ACC, PRECISION)


@triton.jit
def _attend_streaming(
    q, keys, prompt_keys, source, bias_row, has_bias, N, P, prompt_column,
    stride_n: tl.constexpr, stride_p: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    TOKEN_BLOCKS: tl.constexpr, PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr, POOL: tl.constexpr,
    BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """acc, l and m, from one block of scores at a time."""
    # Finite, so that a row masked so far has a maximum to subtract, and below every score that is not a mask.
    m = tl.full((BLOCK_M,), -1e30, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, DP), ACC)
    every = tl.arange(0, BLOCK_N) >= 0

    full_tokens = 0
    if TOKEN_BLOCKS > 0:
        full_tokens = (N // BLOCK_N) * BLOCK_N
        # Without the zero-trip path ptxas keeps the wgmmas asynchronous (C7515 otherwise).
        tl.assume(full_tokens > 0)
        for first in tl.range(0, full_tokens, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, bias = full_block(keys, first, source, bias_row, first, has_bias, N, stride_n, H, D, DP, BLOCK_N,
                                    BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX, ACC)
            acc, l, m = _attend(acc, l, m, q, k, v, bias, every, SCALE, FACTOR, BIAS, False, ACC, PRECISION)

    full_prompts = 0
    if PROMPT_BLOCKS > 0:
        full_prompts = (P // BLOCK_N) * BLOCK_N
        if not POOL:
            tl.assume(full_prompts > 0)
        for first in tl.range(0, full_prompts, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, bias = full_block(prompt_keys, first, source, bias_row, prompt_column + first, has_bias, N, stride_p,
                                    H, D, DP, BLOCK_N, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX, ACC)
            acc, l, m = _attend(acc, l, m, q, k, v, bias, every, SCALE, FACTOR, PROMPT_BIAS, False, ACC, PRECISION)

    for i in tl.static_range((TAIL_1 > 0) + (TAIL_2 > 0)):
        if i == 0:
            t = tl.arange(0, TAIL_1)
        else:
            t = TAIL_1 + tl.arange(0, TAIL_2)
        k, v, bias, valid = tail_block(
            t, keys, prompt_keys, full_tokens, full_prompts, source, bias_row, has_bias, N, P, prompt_column,
            stride_n, stride_p, H, D, DP, HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH,
            ALIGNED, INDEX, ACC,
        )
        acc, l, m = _attend(acc, l, m, q, k, v, bias, valid, SCALE, FACTOR, BIAS, True, ACC, PRECISION)
    return acc, l, m


@triton.jit
def _key_part(
    i: tl.constexpr, keys, prompt_keys, N, P, stride_n: tl.constexpr, stride_p: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr,
    TAIL_2: tl.constexpr, TOKEN_BLOCKS: tl.constexpr, PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr,
):
    """k and v of part i of all keys, in the order of the module's docstring."""
    FULL: tl.constexpr = TOKEN_BLOCKS + PROMPT_BLOCKS
    if i < TOKEN_BLOCKS:
        k, v = full_keys(keys, i * BLOCK_N, stride_n, H, D, DP, BLOCK_N, INDEX)
    elif i < FULL:
        k, v = full_keys(prompt_keys, (i - TOKEN_BLOCKS) * BLOCK_N, stride_p, H, D, DP, BLOCK_N, INDEX)
    else:
        if i == FULL:
            t = tl.arange(0, TAIL_1)
        else:
            t = TAIL_1 + tl.arange(0, TAIL_2)
        k, v = tail_keys(t, keys, prompt_keys, TOKEN_BLOCKS * BLOCK_N, PROMPT_BLOCKS * BLOCK_N, N, P, stride_n,
                         stride_p, H, D, DP, HAS_PROMPTS, ALIGNED, INDEX)
    return k, v


@triton.jit
def _score_part(
    i: tl.constexpr, q, k, source, bias_row, has_bias, N, P, prompt_column,
    BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr, TOKEN_BLOCKS: tl.constexpr,
    PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr,
    PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """Scores of part i of all keys, -inf where a tail is padded."""
    FULL: tl.constexpr = TOKEN_BLOCKS + PROMPT_BLOCKS
    if i < TOKEN_BLOCKS:
        bias = 0.0
        if BIAS:
            bias = block_bias(source, bias_row, i * BLOCK_N + tl.arange(0, BLOCK_N), has_bias, N, BIAS, PARTIAL_BIAS,
                              HAS_IDS, HEIGHT, WIDTH, ACC)
        s = scores(q, k, bias, SCALE, BIAS, ACC, PRECISION)
    elif i < FULL:
        bias = 0.0
        if PROMPT_BIAS:
            column = prompt_column + (i - TOKEN_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
            bias = block_bias(source, bias_row, column, has_bias, N, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH,
                              ACC)
        s = scores(q, k, bias, SCALE, PROMPT_BIAS, ACC, PRECISION)
    else:
        if i == FULL:
            t = tl.arange(0, TAIL_1)
        else:
            t = TAIL_1 + tl.arange(0, TAIL_2)
        bias, valid = tail_scores(t, TOKEN_BLOCKS * BLOCK_N, PROMPT_BLOCKS * BLOCK_N, source, bias_row, has_bias, N, P,
                                  prompt_column, HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH,
                                  ACC)
        s = tl.where(valid[None, :], scores(q, k, bias, SCALE, BIAS, ACC, PRECISION), float("-inf"))
    return s


@triton.jit
def _attend_unrolled(
    q, keys, prompt_keys, resident_k, resident_v, source, bias_row, has_bias, N, P, prompt_column,
    stride_n: tl.constexpr, stride_p: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr,
    TOKEN_BLOCKS: tl.constexpr, PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr, QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr,
    FACTOR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):
    """acc, l and m, all parts written out: with resident scores there is one maximum, and nothing is rescaled."""
    FULL: tl.constexpr = TOKEN_BLOCKS + PROMPT_BLOCKS
    PARTS: tl.constexpr = FULL + (TAIL_1 > 0) + (TAIL_2 > 0)
    # Finite for rows that are masked as a whole.
    m = tl.full((BLOCK_M,), -1e30, ACC)
    l = tl.zeros((BLOCK_M,), ACC)
    acc = tl.zeros((BLOCK_M, DP), ACC)
    s = ()
    values = ()
    for i in tl.static_range(PARTS):
        if KEYS_RESIDENT:
            k = resident_k[i]
            v = resident_v[i]
        else:
            k, v = _key_part(i, keys, prompt_keys, N, P, stride_n, stride_p, H, D, DP, BLOCK_N, TAIL_1, TAIL_2,
                             TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, ALIGNED, INDEX)
            if QUERY_SCALE != 1.0:
                k = k * QUERY_SCALE
        x = _score_part(i, q, k, source, bias_row, has_bias, N, P, prompt_column, BLOCK_N, TAIL_1, TAIL_2,
                        TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT,
                        WIDTH, SCALE, ACC, PRECISION)
        if SCORES_RESIDENT:
            s = s + (x,)  # type: ignore[assignment]  # noqa: RUF005
            values = values + (v,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            acc, l, m = _accumulate(acc, l, m, x, v, FACTOR, ACC, PRECISION)

    if SCORES_RESIDENT:
        if FULL > 0:
            largest = s[0]  # type: ignore[misc]
            for i in tl.static_range(1, FULL):
                largest = tl.maximum(largest, s[i])
            m = tl.maximum(m, tl.max(largest, 1) * FACTOR)
        for i in tl.static_range(FULL, PARTS):
            m = tl.maximum(m, tl.max(s[i], 1) * FACTOR)
        for i in tl.static_range(PARTS):
            p = tl.exp2(s[i] * FACTOR - m[:, None])
            l += tl.sum(p, 1)
            acc = tl.dot(p.to(values[i].dtype), values[i], acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, l, m


@triton.jit
def _attend_rows(
    first, tokens, prompts, keys, prompt_keys, resident_k, resident_v, bias_ptr, ids_ptr, out_ptr, lse_ptr,
    b, h, N, P, rows, prompt_column, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr, TOKEN_BLOCKS: tl.constexpr,
    PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    POOL: tl.constexpr, PROMPT_QUERIES: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr,
    PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WITH_LSE: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """Attend and store the rows from `first` on."""
    row = tl.minimum(first + tl.arange(0, BLOCK_M), rows - 1)
    offs_d = tl.arange(0, DP)
    if PROMPT_QUERIES:
        q = load_rows(mixed_rows(row, tokens, prompts, 0, 0, N, N, P, stride_n, stride_p, True, ALIGNED, INDEX), D, DP)
    else:
        q = load_block(tokens, row.to(INDEX) * stride_n, D, DP)
    # Scaled queries take registers as an operand of wgmma; where all keys or all scores stay, keys are scaled instead.
    if QUERY_SCALE != 1.0 and not KEYS_RESIDENT and not SCORES_RESIDENT:
        q = q * QUERY_SCALE

    source = bias_ptr
    bias_row = bias_ptr
    has_bias = row < N
    if BIAS:
        source = (bias_ptr + h.to(tl.int64) * stride_th, ids_ptr)
        bias_row = bias_rows(source, row, N, stride_tn, BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX)

    if KEYS_RESIDENT or SCORES_RESIDENT:
        acc, l, m = _attend_unrolled(
            q, keys, prompt_keys, resident_k, resident_v, source, bias_row, has_bias, N, P, prompt_column, stride_n,
            stride_p, H, D, DP, BLOCK_M, BLOCK_N, TAIL_1, TAIL_2, KEYS_RESIDENT, SCORES_RESIDENT, TOKEN_BLOCKS,
            PROMPT_BLOCKS, HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ALIGNED, INDEX,
            QUERY_SCALE, SCALE, FACTOR, ACC, PRECISION,
        )
    else:
        acc, l, m = _attend_streaming(
            q, keys, prompt_keys, source, bias_row, has_bias, N, P, prompt_column, stride_n, stride_p, H, D, DP,
            BLOCK_M, BLOCK_N, TAIL_1, TAIL_2, TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, POOL, BIAS, PROMPT_BIAS,
            PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ALIGNED, INDEX, SCALE, FACTOR, ACC, PRECISION, STAGES,
        )

    out = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    # Offsets and masks depend on the thread alone, and masks on the offsets: row numbers would be held in registers
    # from the loads of queries on, and spill where 128 rows take all of them.
    at = (b * rows + first) * (H * D) + h * D
    i = tl.arange(0, BLOCK_M)
    offset = i[:, None] * (H * D) + offs_d[None, :]
    keep = offset < tl.minimum(rows - first, BLOCK_M) * (H * D)
    if D != DP:
        keep = keep & (offs_d < D)[None, :]
    tl.store(out_ptr + at + offset, out.to(out_ptr.dtype.element_ty), mask=keep)
    if WITH_LSE:
        tl.store(lse_ptr + ((b * H + h) * rows + first) + i, (m + tl.log2(l)) * LN2, mask=i < rows - first)


@triton.jit
def _forward_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, ids_ptr, out_ptr, lse_ptr,
    N, P, pool_size, prompt_column,
    stride_b, stride_pb, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    KEYS_RESIDENT: tl.constexpr, SCORES_RESIDENT: tl.constexpr, HEADS_FIRST: tl.constexpr, TOKEN_BLOCKS: tl.constexpr,
    PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    POOL: tl.constexpr, PROMPT_QUERIES: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr,
    PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WITH_LSE: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    rows = N
    if PROMPT_QUERIES:
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

    resident_k = ()
    resident_v = ()
    if KEYS_RESIDENT:
        for i in tl.static_range(TOKEN_BLOCKS + PROMPT_BLOCKS + (TAIL_1 > 0) + (TAIL_2 > 0)):
            k, v = _key_part(i, keys, prompt_keys, N, P, stride_n, stride_p, H, D, DP, BLOCK_N, TAIL_1, TAIL_2,
                             TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, ALIGNED, INDEX)
            if QUERY_SCALE != 1.0:
                k = k * QUERY_SCALE
            resident_k = resident_k + (k,)  # type: ignore[assignment]  # noqa: RUF005
            resident_v = resident_v + (v,)  # type: ignore[assignment]  # noqa: RUF005
        tl.assume(rows > 0)
        for row in tl.range(0, rows, BLOCK_M, num_stages=1, loop_unroll_factor=1):
            _attend_rows(
                row, tokens, prompts, keys, prompt_keys, resident_k, resident_v, bias_ptr, ids_ptr, out_ptr, lse_ptr,
                b, h, N, P, rows, prompt_column, stride_th, stride_n, stride_p, stride_tn, H, D, DP, BLOCK_M, BLOCK_N,
                TAIL_1, TAIL_2, KEYS_RESIDENT, SCORES_RESIDENT, TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, POOL,
                PROMPT_QUERIES, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, WITH_LSE, ALIGNED, INDEX,
                QUERY_SCALE, SCALE, FACTOR, ACC, PRECISION, STAGES,
            )
    else:
        _attend_rows(
            first, tokens, prompts, keys, prompt_keys, resident_k, resident_v, bias_ptr, ids_ptr, out_ptr, lse_ptr,
            b, h, N, P, rows, prompt_column, stride_th, stride_n, stride_p, stride_tn, H, D, DP, BLOCK_M, BLOCK_N,
            TAIL_1, TAIL_2, KEYS_RESIDENT, SCORES_RESIDENT, TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, POOL,
            PROMPT_QUERIES, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, WITH_LSE, ALIGNED, INDEX,
            QUERY_SCALE, SCALE, FACTOR, ACC, PRECISION, STAGES,
        )


@triton.jit
def _expand_table_kernel(table_ptr, ids_ptr, tile_ptr, N, columns, stride_r, stride_h,
                         HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr):
    """The (H, N, columns) tile of a table: program (row block, column block, head)."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(2)
    query, query_class = query_terms(load_ids(ids_ptr, i, N, HAS_IDS), HEIGHT, WIDTH)
    key, key_class = key_terms(load_ids(ids_ptr, j, N, HAS_IDS), HEIGHT, WIDTH)
    index = table_index(query[:, None], query_class[:, None], key[None, :], key_class[None, :], HEIGHT, WIDTH)
    R: tl.constexpr = (2 * HEIGHT - 1) * (2 * WIDTH - 1) + 3
    x = tl.load(table_ptr + index * stride_r + h * stride_h, mask=index < R, other=0.0)
    at = tile_ptr + (h.to(tl.int64) * N + i[:, None]) * columns + j[None, :]
    tl.store(at, x.to(tile_ptr.dtype.element_ty), mask=(i < N)[:, None] & (j < columns)[None, :])
