"""Triton kernels of the backward pass. Probabilities are recomputed from the saved log-sum-exp, never stored.

With p = exp(score - lse), dp = dout @ v^T and delta_i = sum_d dout_id * out_id - dlse_i (because sum_j p_ij dp_ij is
dout_i . out_i), the gradient of a score is ds = p * (dp - delta), and

    dq = scale * ds @ k,   dk = scale * ds^T @ q,   dv = p^T @ dout,   dbias = sum over images of ds.

Sums over images run inside one program in order, over chunks of the batch; the caller adds the chunks' partial sums in
order. There are no atomics: equal inputs give bitwise equal gradients.

    _delta_kernel        delta alone, where no _query_grad_kernel stores it
    _query_grad_kernel   dq and delta, by blocks of token rows; or dq of prompts that attend, summed over images
    _key_grad_kernel     dk, dv of tokens, by blocks of keys; or of prompts, summed over images
    _bias_grad_kernel    sum over images of ds, by tiles of (rows, keys)
    _table_grad_kernel   sum of dbias over the pairs that share a table row
    _pool_grad_kernel    sum over the images that use a row of the pool
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_common import (
    LOG2E,
    TABLE,
    bias_rows,
    full_block,
    gathered_bias,
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
)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def _load_lse(lse_ptr, row, valid):
    """lse in base 2; +inf, which makes every probability zero, for rows past the end and for fully masked rows."""
    lse = tl.load(lse_ptr + row)
    return tl.where((lse == float("-inf")) | (valid == 0), float("inf"), lse) * LOG2E


@triton.jit
def _row_delta(do, out_row, dlse_ptr, row, D: tl.constexpr, DP: tl.constexpr, HAS_DLSE: tl.constexpr,
               ACC: tl.constexpr):
    delta = tl.sum(do.to(ACC) * load_rows(out_row, D, DP).to(ACC), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row)
    return delta


@triton.jit
def _delta_kernel(out_ptr, do_ptr, dlse_ptr, delta_ptr, rows, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                  BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr):
    row_blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // row_blocks).to(tl.int64)
    i = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(i, rows - 1)
    out_rows = ((bh // H) * rows + row) * (H * D) + (bh % H) * D
    do = load_rows(do_ptr + out_rows, D, DP)
    delta = _row_delta(do, out_ptr + out_rows, dlse_ptr + bh * rows, row, D, DP, HAS_DLSE, ACC)
    tl.store(delta_ptr + bh * rows + i, delta, mask=i < rows)


@triton.jit
def _query_step(dq, q, do, lse, delta, k, v, bias, valid, SCALE: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
                MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    s = scores(q, k, bias, SCALE, BIAS, ACC, PRECISION)
    p = tl.exp2(s * FACTOR - lse[:, None])
    if MASK:
        p = tl.where(valid[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _query_grads(
    dq, q, do, lse, delta, row, tokens, prompts, source, N, P, prompt_column,
    stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr, TOKEN_BLOCKS: tl.constexpr,
    PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr, POOL: tl.constexpr, PROMPT_QUERIES: tl.constexpr,
    BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """dq plus ds @ k over all keys of one image; rows from N on are prompts."""
    keys = tokens + H * D
    prompt_keys = prompts
    if PROMPT_QUERIES:
        prompt_keys = prompts + H * D
    has_bias = row < N
    bias_row = row
    if BIAS:
        bias_row = bias_rows(source, row, N, stride_tn, BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX)
    every = tl.arange(0, BLOCK_N) >= 0

    full_tokens = 0
    if TOKEN_BLOCKS > 0:
        full_tokens = (N // BLOCK_N) * BLOCK_N
        tl.assume(full_tokens > 0)
        for first in tl.range(0, full_tokens, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, bias = full_block(keys, first, source, bias_row, first, has_bias, N, stride_n, H, D, DP, BLOCK_N,
                                    BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX, ACC)
            dq = _query_step(dq, q, do, lse, delta, k, v, bias, every, SCALE, FACTOR, BIAS, False, ACC, PRECISION)

    full_prompts = 0
    if PROMPT_BLOCKS > 0:
        full_prompts = (P // BLOCK_N) * BLOCK_N
        if not POOL:
            tl.assume(full_prompts > 0)
        for first in tl.range(0, full_prompts, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, bias = full_block(prompt_keys, first, source, bias_row, prompt_column + first, has_bias, N, stride_p,
                                    H, D, DP, BLOCK_N, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX, ACC)
            dq = _query_step(dq, q, do, lse, delta, k, v, bias, every, SCALE, FACTOR, PROMPT_BIAS, False, ACC,
                             PRECISION)

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
        dq = _query_step(dq, q, do, lse, delta, k, v, bias, valid, SCALE, FACTOR, BIAS, True, ACC, PRECISION)
    return dq


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def _query_grad_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, ids_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, grad_ptr,
    B, N, P, pool_size, prompt_column, images,
    stride_b, stride_pb, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_1: tl.constexpr, TAIL_2: tl.constexpr,
    TOKEN_BLOCKS: tl.constexpr, PROMPT_BLOCKS: tl.constexpr, HAS_PROMPTS: tl.constexpr, POOL: tl.constexpr,
    PROMPT_QUERIES: tl.constexpr, OF_PROMPTS: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr,
    PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DLSE: tl.constexpr, ALIGNED: tl.constexpr,
    INDEX: tl.constexpr, QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr,
    FACTOR: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """grad_ptr: query section of dqkv (B, N, 3*H*D); with OF_PROMPTS that of the partial sums (chunks, P, 3*H*D)."""
    rows = N
    if PROMPT_QUERIES:
        rows = N + P
    own_rows = N
    if OF_PROMPTS:
        own_rows = P
    row_blocks = tl.cdiv(own_rows, BLOCK_M)
    pid = tl.program_id(0)
    outer = pid // row_blocks
    h = outer % H
    chunk = (outer // H).to(tl.int64)
    offs_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_row = tl.minimum(offs_m, own_rows - 1)
    stored = offs_m < own_rows
    row = own_row
    if OF_PROMPTS:
        row = N + own_row
    source = qkv_ptr
    if BIAS:
        source = (bias_ptr + h.to(tl.int64) * stride_th, ids_ptr)
    dq = tl.zeros((BLOCK_M, DP), ACC)

    first_image = chunk
    last_image = chunk + 1
    if OF_PROMPTS:
        first_image = chunk * images
        last_image = tl.minimum(first_image + images, B)
    for b in range(first_image, last_image):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        length = P
        if HAS_PROMPTS:
            prompts = prompt_ptr + b * stride_pb + h * D
            if POOL:
                start, length = prompt_range(ranges_ptr, b, pool_size, P)
                prompts += start.to(tl.int64) * stride_p
        if OF_PROMPTS:
            q = load_rows(prompts + own_row.to(INDEX) * stride_p, D, DP)
        else:
            q = load_rows(tokens + own_row.to(INDEX) * stride_n, D, DP)
        if QUERY_SCALE != 1.0:
            q = q * QUERY_SCALE
        out_rows = (b * rows + row) * (H * D) + h * D
        do = load_rows(do_ptr + out_rows, D, DP)
        at = (b * H + h) * rows
        delta = _row_delta(do, out_ptr + out_rows, dlse_ptr + at, row, D, DP, HAS_DLSE, ACC)
        tl.store(delta_ptr + at + row, delta, mask=stored)
        lse = _load_lse(lse_ptr + at, row, stored)
        dq = _query_grads(
            dq, q, do, lse, delta, row, tokens, prompts, source, N, length, prompt_column, stride_n, stride_p,
            stride_tn, H, D, DP, BLOCK_N, TAIL_1, TAIL_2, TOKEN_BLOCKS, PROMPT_BLOCKS, HAS_PROMPTS, POOL,
            PROMPT_QUERIES, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ALIGNED, INDEX, SCALE, FACTOR,
            ACC, PRECISION,
            STAGES,
        )

    offs_d = tl.arange(0, DP)
    keep = stored[:, None]
    if D != DP:
        keep = keep & (offs_d < D)[None, :]
    grad_row = grad_ptr + (chunk * own_rows + offs_m) * (3 * H * D) + h * D
    tl.store(grad_row[:, None] + offs_d[None, :], (dq * GRAD_SCALE).to(grad_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def _key_grad_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, ids_ptr, out_ptr, do_ptr, lse_ptr, dlse_ptr, delta_ptr, grad_ptr,
    B, N, P, pool_size, prompt_column, images, stride_grad,
    stride_b, stride_pb, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PROMPTS: tl.constexpr, POOL: tl.constexpr, PROMPT_QUERIES: tl.constexpr, OF_PROMPTS: tl.constexpr,
    BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    HAS_DLSE: tl.constexpr, FUSE_DELTA: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr,
    QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr, GRAD_SCALE: tl.constexpr, FACTOR: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """grad_ptr: the key section of dqkv; with OF_PROMPTS that of the partial sums (chunks, P, stride_grad).

    Scores are computed transposed, (keys, rows),
    so that p and ds multiply from the left as they are. FUSE_DELTA computes
    delta from out instead of loading it, for when no other kernel has stored it.
    """
    rows = N
    if PROMPT_QUERIES:
        rows = N + P
    own_keys = N
    if OF_PROMPTS:
        own_keys = P
    key_blocks = tl.cdiv(own_keys, BLOCK_N)
    pid = tl.program_id(0)
    outer = pid // key_blocks
    h = outer % H
    chunk = (outer // H).to(tl.int64)
    offs_n = (pid % key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    HAS_BIAS: tl.constexpr = PROMPT_BIAS if OF_PROMPTS else BIAS
    source = qkv_ptr
    keys = offs_n
    if BIAS:
        head_bias = bias_ptr + h.to(tl.int64) * stride_th
        if OF_PROMPTS:
            head_bias += prompt_column
        source = (head_bias, ids_ptr)
        if BIAS == TABLE:
            keys = key_terms(load_ids(ids_ptr, offs_n, N, HAS_IDS), HEIGHT, WIDTH)
    # The tile's columns are padded to 16, so this mask is constant over 16 and the load stays wide.
    inside = offs_n < tl.cdiv(own_keys, 16) * 16
    dk = tl.zeros((BLOCK_N, DP), ACC)
    dv = tl.zeros((BLOCK_N, DP), ACC)

    first_image = chunk
    last_image = chunk + 1
    if OF_PROMPTS:
        first_image = chunk * images
        last_image = tl.minimum(first_image + images, B)
    for b in range(first_image, last_image):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        last_prompt = P - 1
        if HAS_PROMPTS:
            prompts = prompt_ptr + b * stride_pb + h * D
            if POOL:
                start, _ = prompt_range(ranges_ptr, b, pool_size, P)
                prompts += start.to(tl.int64) * stride_p
                # Rows past the range are computed from what stands there and not used; past the pool nothing is read.
                last_prompt = tl.minimum(P, pool_size - start) - 1
        if OF_PROMPTS:
            key_ptr = prompts + tl.minimum(offs_n, last_prompt).to(INDEX) * stride_p
            if PROMPT_QUERIES:
                key_ptr += H * D
        else:
            key_ptr = tokens + H * D + tl.minimum(offs_n, N - 1).to(INDEX) * stride_n
        k = load_rows(key_ptr, D, DP)
        v = load_rows(key_ptr + H * D, D, DP)
        if QUERY_SCALE != 1.0:
            k = k * QUERY_SCALE
        for first in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
            i = first + tl.arange(0, BLOCK_M)
            row = tl.minimum(i, rows - 1)
            if PROMPT_QUERIES:
                q_ptr = mixed_rows(row, tokens, prompts, 0, 0, N, N, P, stride_n, stride_p, True, ALIGNED, INDEX)
                q = load_rows(q_ptr, D, DP)
            else:
                q = load_block(tokens, row.to(INDEX) * stride_n, D, DP)
            image = b * rows * (H * D) + h * D
            out_row = row.to(INDEX) * (H * D)
            do = load_block(do_ptr + image, out_row, D, DP)
            at = (b * H + h) * rows
            lse = _load_lse(lse_ptr + at, row, i < rows)
            if FUSE_DELTA:
                delta = _row_delta(do, out_ptr + image + out_row, dlse_ptr + at, row, D, DP, HAS_DLSE, ACC)
            else:
                delta = tl.load(delta_ptr + at + row)
            bias = 0.0
            if HAS_BIAS:
                at_bias = bias_rows(source, row, N, stride_tn, BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, INDEX)
                if BIAS == TABLE:
                    bias = gathered_bias(source, at_bias, keys, HEIGHT, WIDTH, ACC)
                else:
                    bias = tl.load(at_bias[:, None] + offs_n[None, :], mask=inside[None, :], other=0.0).to(ACC)
                    if PARTIAL_BIAS:
                        bias = tl.where((row < N)[:, None], bias, 0.0)
            s = scores(q, k, bias, SCALE, HAS_BIAS, ACC, PRECISION)
            p = tl.exp2(s * FACTOR - lse[:, None])
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION, out_dtype=ACC)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION, out_dtype=ACC)

    offs_d = tl.arange(0, DP)
    keep = (offs_n < own_keys)[:, None]
    if D != DP:
        keep = keep & (offs_d < D)[None, :]
    at_grad = grad_ptr + ((chunk * own_keys + offs_n) * stride_grad + h * D)[:, None] + offs_d[None, :]
    tl.store(at_grad, (dk * GRAD_SCALE).to(grad_ptr.dtype.element_ty), mask=keep)
    tl.store(at_grad + H * D, dv.to(grad_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def _bias_grad_kernel(
    qkv_ptr, prompt_ptr, bias_ptr, ids_ptr, do_ptr, lse_ptr, delta_ptr, grad_ptr,
    B, N, P, prompt_column, images, first_head, heads, grad_rows, grad_columns,
    stride_b, stride_pb, stride_th, stride_n: tl.constexpr, stride_p: tl.constexpr, stride_tn: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PROMPT_QUERIES: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr, INDEX: tl.constexpr, QUERY_SCALE: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    """grad_ptr: partial sums (chunks, heads, grad_rows, grad_columns) in the rows and columns of the caller's bias."""
    rows = N
    if PROMPT_QUERIES:
        rows = N + P
    row_blocks = tl.cdiv(grad_rows, BLOCK_M)
    column_blocks = tl.cdiv(grad_columns, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    outer = pid // row_blocks
    offs_n = (outer % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    outer = outer // column_blocks
    h = first_head + outer % heads
    chunk = (outer // heads).to(tl.int64)
    row = tl.minimum(offs_m, grad_rows - 1)
    column = tl.minimum(offs_n, grad_columns - 1)
    source = (bias_ptr + h.to(tl.int64) * stride_th, ids_ptr)
    bias_row = bias_rows(source, row, N, stride_tn, BIAS, False, HAS_IDS, HEIGHT, WIDTH, INDEX)
    if BIAS == TABLE:
        keys = key_terms(load_ids(ids_ptr, offs_n, N, HAS_IDS), HEIGHT, WIDTH)
        bias = gathered_bias(source, bias_row, keys, HEIGHT, WIDTH, ACC)
    elif PROMPT_BIAS:
        bias_column = tl.where(column < N, column, column - N + prompt_column)
        bias = tl.load(bias_row[:, None] + bias_column[None, :]).to(ACC)
    else:
        # The tile's columns are padded to 16, so this mask is constant over 16 and the load stays wide.
        inside = offs_n < tl.cdiv(grad_columns, 16) * 16
        bias = tl.load(bias_row[:, None] + offs_n[None, :], mask=inside[None, :], other=0.0).to(ACC)

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    first_image = chunk * images
    for b in tl.range(first_image, tl.minimum(first_image + images, B), num_stages=STAGES):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        prompt_keys = qkv_ptr
        if PROMPT_QUERIES or PROMPT_BIAS:
            prompts = prompt_ptr + b * stride_pb + h * D
            prompt_keys = prompts
            if PROMPT_QUERIES:
                prompt_keys = prompts + H * D
        q_ptr = mixed_rows(row, tokens, prompts, 0, 0, N, N, P, stride_n, stride_p, PROMPT_QUERIES, ALIGNED, INDEX)
        key_ptr = mixed_rows(column, tokens + H * D, prompt_keys, 0, 0, N, N, P, stride_n, stride_p, PROMPT_BIAS,
                             ALIGNED, INDEX)
        q = load_rows(q_ptr, D, DP)
        k = load_rows(key_ptr, D, DP)
        v = load_rows(key_ptr + H * D, D, DP)
        do = load_rows(do_ptr + (b * rows + row) * (H * D) + h * D, D, DP)
        at = (b * H + h) * rows
        lse = _load_lse(lse_ptr + at, row, offs_m < grad_rows)
        delta = tl.load(delta_ptr + at + row)
        if QUERY_SCALE != 1.0:
            q = q * QUERY_SCALE
        s = scores(q, k, bias, SCALE, True, ACC, PRECISION)
        p = tl.exp2(s * FACTOR - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        total += p * (dp - delta[:, None])

    grad_row = (chunk * heads + h - first_head) * grad_rows + offs_m
    at_grad = grad_ptr + (grad_row * grad_columns)[:, None] + offs_n[None, :]
    tl.store(at_grad, total, mask=(offs_m < grad_rows)[:, None] & (offs_n < grad_columns)[None, :])


@triton.jit
def _table_grad_kernel(
    dbias_ptr, ids_ptr, grad_ptr, first_head, N, R,
    H: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """grad_ptr (R, H): every program looks for its rows of the table among all pairs, in order, for one head.

    dbias_ptr (heads, N, N) holds heads from first_head on.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1)
    total = tl.zeros((BLOCK_R,), ACC)
    for first_row in range(0, N, BLOCK_M):
        i = first_row + tl.arange(0, BLOCK_M)
        query, query_class = query_terms(load_ids(ids_ptr, i, N, HAS_IDS), HEIGHT, WIDTH)
        for first_column in range(0, N, BLOCK_N):
            j = first_column + tl.arange(0, BLOCK_N)
            key, key_class = key_terms(load_ids(ids_ptr, j, N, HAS_IDS), HEIGHT, WIDTH)
            index = table_index(query[:, None], query_class[:, None], key[None, :], key_class[None, :], HEIGHT, WIDTH)
            at = dbias_ptr + (h.to(tl.int64) * N + i[:, None]) * N + j[None, :]
            x = tl.load(at, mask=index < R, other=0.0)
            found = index[:, :, None] == r[None, None, :]
            total += tl.sum(tl.sum(tl.where(found, x[:, :, None], 0.0), 1), 0)
    tl.store(grad_ptr + r * H + first_head + h, total.to(grad_ptr.dtype.element_ty), mask=r < R)


@triton.jit(do_not_specialize=["B"])  # a smaller last batch compiles nothing
def _pool_grad_kernel(
    partial_ptr, ranges_ptr, grad_ptr, B, max_length, pool_size, columns,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """grad_ptr (pool_size, columns): sums of the rows of partial (B, max_length, columns) that stand for a pool row."""
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), ACC)
    for b in range(0, B):
        start, length = prompt_range(ranges_ptr, b, pool_size, max_length)
        used = (s >= start) & (s < start + length)
        at = (b * max_length + s - start)[:, None].to(tl.int64) * columns + c[None, :]
        total += tl.load(partial_ptr + at, mask=used[:, None] & (c < columns)[None, :], other=0.0)
    keep = (s < pool_size)[:, None] & (c < columns)[None, :]
    tl.store(grad_ptr + s[:, None].to(tl.int64) * columns + c[None, :], total.to(grad_ptr.dtype.element_ty), mask=keep)
