"""Triton kernels of the backward pass. Probabilities are recomputed from the saved log-sum-exp, never stored.

With p = exp(score - lse), dp = dout @ v^T and delta_i = sum_d dout_id * out_id - dlse_i (because sum_j p_ij dp_ij is
dout_i . out_i), the gradient of a score is ds = p * (dp - delta), and

    dq = scale * ds @ k,   dk = scale * ds^T @ q,   dv = p^T @ dout,   dbias = sum over images of ds.

Sums over images run inside one program in order, over chunks of the batch; the caller adds the chunks' partial sums in
order. There are no atomics: equal inputs give bitwise equal gradients.

Kernels, by what follows the name of the op:

    delta_kernel        delta alone, where no query gradient stores it
    query_grad_kernel   dq and delta, by blocks of token rows; or dq of prompts that attend, summed over images
    key_grad_kernel     dk, dv of tokens, by blocks of keys; or of prompts, summed over images
    bias_grad_kernel    sum over images of ds, by tiles of (rows, keys)
    table_grad_kernel   sum of dbias over the pairs that share a table row
    pool_grad_kernel    sum over the images that use a row of the pool
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels_common import (
    LOG2E,
    MIXED,
    PROMPTS,
    TABLE,
    TOKENS,
    Rows,
    bias_rows,
    gathered_bias,
    head_columns,
    head_table,
    key_terms,
    keys_of,
    load_block,
    load_ids,
    load_operand_rows,
    load_rows,
    load_turned,
    mixed_rows,
    prompt_block,
    prompt_range,
    query_rows,
    query_terms,
    scores,
    store_turned_back,
    table_index,
    tail_block,
    tail_keys_left,
    token_block,
    with_columns,
)


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def _load_lse(lse_ptr, row, valid):
    """lse in base 2; +inf, which makes every probability zero, for rows past the end and for fully masked rows."""
    lse = tl.load(lse_ptr + row)
    return tl.where((lse == float("-inf")) | (valid == 0), float("inf"), lse) * LOG2E


@triton.jit
def _row_delta(do, out_row, dlse_ptr, row, LAYOUT: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr):
    delta = tl.sum(do.to(ACC) * load_rows(out_row, LAYOUT).to(ACC), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row)
    return delta


@triton.jit
def prompted_attention_delta_kernel(
    out_ptr, do_ptr, dlse_ptr, delta_ptr, rows, LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_DLSE: tl.constexpr, ACC: tl.constexpr,
):
    """out and do (B, rows, H*D), dlse (B, H, rows) -> delta (B, H, rows)."""
    H: tl.constexpr = LAYOUT.H
    D: tl.constexpr = LAYOUT.D
    row_blocks = tl.cdiv(rows, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // row_blocks).to(tl.int64)
    i = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(i, rows - 1)
    out_rows = ((bh // H) * rows + row) * (H * D) + (bh % H) * D
    do = load_rows(do_ptr + out_rows, LAYOUT)
    delta = _row_delta(do, out_ptr + out_rows, dlse_ptr + bh * rows, row, LAYOUT, HAS_DLSE, ACC)
    tl.store(delta_ptr + bh * rows + i, delta, mask=i < rows)


@triton.jit
def _query_step(dq, q, do, lse, delta, k, v, bias, valid, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
                MATH: tl.constexpr):
    s = scores(q, k, bias, HAS_BIAS, MATH)
    p = tl.exp2(s * MATH.FACTOR - lse[:, None])
    if MASK:
        p = tl.where(valid[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=MATH.PRECISION, out_dtype=MATH.ACC)


@triton.jit
def _query_grads(dq, q, do, lse, delta, row, queries, bias_head, columns, ids_ptr, prompt_column,
                 LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
                 MATH: tl.constexpr, STAGES: tl.constexpr):
    """dq plus ds @ k over all keys of one image; rows from N on are prompts."""
    BLOCK_N: tl.constexpr = KEYS.BLOCK_N
    keys = keys_of(queries, LAYOUT)
    bias = bias_rows(bias_head, columns, ids_ptr, row, queries.N, prompt_column, BIAS, WINDOW, LAYOUT.INDEX)
    every = tl.arange(0, BLOCK_N) >= 0

    full_tokens = 0
    if KEYS.TOKEN_BLOCKS > 0:
        full_tokens = (keys.N // BLOCK_N) * BLOCK_N
        tl.assume(full_tokens > 0)
        for first in tl.range(0, full_tokens, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, x = token_block(first, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH)
            dq = _query_step(dq, q, do, lse, delta, k, v, x, every, BIAS.KIND, False, MATH)

    full_prompts = 0
    if KEYS.PROMPT_BLOCKS > 0:
        full_prompts = (keys.P // BLOCK_N) * BLOCK_N
        if not LAYOUT.POOL:
            tl.assume(full_prompts > 0)
        for first in tl.range(0, full_prompts, BLOCK_N, num_stages=STAGES):
            first = tl.multiple_of(first, BLOCK_N)
            k, v, x = prompt_block(first, keys, bias, LAYOUT, KEYS, BIAS, WINDOW, MATH)
            dq = _query_step(dq, q, do, lse, delta, k, v, x, every, BIAS.PROMPT_COLUMNS | BIAS.COLUMN_BIAS, False,
                             MATH)

    if KEYS.TAIL_LOOP:
        for first in tl.range(0, tail_keys_left(keys, full_tokens, full_prompts, LAYOUT), KEYS.TAIL_1, num_stages=1):
            t = first + tl.arange(0, KEYS.TAIL_1)
            k, v, x, valid = tail_block(t, keys, full_tokens, full_prompts, bias, LAYOUT, BIAS, WINDOW, MATH)
            dq = _query_step(dq, q, do, lse, delta, k, v, x, valid, (BIAS.KIND > 0) | BIAS.COLUMN_BIAS, True, MATH)
    else:
        for i in tl.static_range((KEYS.TAIL_1 > 0) + (KEYS.TAIL_2 > 0)):
            if i == 0:
                t = tl.arange(0, KEYS.TAIL_1)
            else:
                t = KEYS.TAIL_1 + tl.arange(0, KEYS.TAIL_2)
            k, v, x, valid = tail_block(t, keys, full_tokens, full_prompts, bias, LAYOUT, BIAS, WINDOW, MATH)
            dq = _query_step(dq, q, do, lse, delta, k, v, x, valid, (BIAS.KIND > 0) | BIAS.COLUMN_BIAS, True, MATH)
    return dq


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def prompted_attention_query_grad_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, column_ptr, ids_ptr, cos_ptr, sin_ptr, out_ptr, do_ptr, lse_ptr,
    dlse_ptr, delta_ptr, grad_ptr,
    B, N, P, pool_size, prompt_column, images, stride_b, stride_pb, stride_th,
    LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr,
    BLOCK_M: tl.constexpr, STAGES: tl.constexpr, OF_PROMPTS: tl.constexpr, HAS_DLSE: tl.constexpr,
):
    """Inputs as in the forward pass; out and do (B, rows, H*D), lse and dlse (B, H, rows) -> delta (B, H, rows) and
    grad, the query section of dqkv (B, N, 3*H*D), or with OF_PROMPTS that of the partial sums (chunks, P, 3*H*D)."""
    H: tl.constexpr = LAYOUT.H
    D: tl.constexpr = LAYOUT.D
    rows = N
    if LAYOUT.PROMPT_QUERIES:
        rows = N + P
    grad_rows = N
    if OF_PROMPTS:
        grad_rows = P
    row_blocks = tl.cdiv(grad_rows, BLOCK_M)
    pid = tl.program_id(0)
    outer = pid // row_blocks
    h = outer % H
    chunk = (outer // H).to(tl.int64)
    offs_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_row = tl.minimum(offs_m, grad_rows - 1)
    stored = offs_m < grad_rows
    row = grad_row
    if OF_PROMPTS:
        row = N + grad_row
    bias_head = qkv_ptr
    if BIAS.KIND:
        bias_head = bias_ptr + h.to(tl.int64) * stride_th
    cos = head_table(cos_ptr, qkv_ptr, h, LAYOUT)
    sin = head_table(sin_ptr, qkv_ptr, h, LAYOUT)
    DP: tl.constexpr = LAYOUT.DP  # Triton 3.6 takes no field of a group in a shape
    dq = tl.zeros((BLOCK_M, DP), MATH.ACC)

    first_image = chunk
    last_image = chunk + 1
    if OF_PROMPTS:
        first_image = chunk * images
        last_image = tl.minimum(first_image + images, B)
    for b in range(first_image, last_image):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        length = P
        start = 0
        if LAYOUT.HAS_PROMPTS:
            prompts = prompt_ptr + b * stride_pb + h * D
            if LAYOUT.POOL:
                start, length = prompt_range(ranges_ptr, b, pool_size, P)
                prompts += start.to(tl.int64) * LAYOUT.STRIDE_P
        queries = Rows(tokens, prompts, N, length, cos, sin)
        if OF_PROMPTS:
            row_ptr = prompts + grad_row.to(LAYOUT.INDEX) * LAYOUT.STRIDE_P
            q = load_operand_rows(row_ptr, queries, grad_row, stored, True, LAYOUT, PROMPTS)
        else:
            row_ptr = tokens + grad_row.to(LAYOUT.INDEX) * LAYOUT.STRIDE_N
            q = load_operand_rows(row_ptr, queries, grad_row, stored, True, LAYOUT, TOKENS)
        if MATH.QUERY_SCALE != 1.0:
            q = q * MATH.QUERY_SCALE
        out_rows = (b * rows + row) * (H * D) + h * D
        do = load_rows(do_ptr + out_rows, LAYOUT)
        at = (b * H + h) * rows
        delta = _row_delta(do, out_ptr + out_rows, dlse_ptr + at, row, LAYOUT, HAS_DLSE, MATH.ACC)
        tl.store(delta_ptr + at + row, delta, mask=stored)
        lse = _load_lse(lse_ptr + at, row, stored)
        columns = head_columns(column_ptr, qkv_ptr, h, start, P, pool_size, LAYOUT, BIAS)
        dq = _query_grads(dq, q, do, lse, delta, row, queries, bias_head, columns, ids_ptr, prompt_column, LAYOUT, KEYS,
                          BIAS, WINDOW, MATH, STAGES)

    dq = dq * MATH.GRAD_SCALE
    if LAYOUT.ROTARY:
        of = Rows(qkv_ptr, qkv_ptr, N, P, cos, sin)
        base = grad_ptr + chunk * grad_rows * (3 * H * D) + h * D
        store_turned_back(dq, base, 3 * H * D, of, (pid % row_blocks) * BLOCK_M, grad_rows, LAYOUT,
                          PROMPTS if OF_PROMPTS else TOKENS)
    else:
        offs_d = tl.arange(0, LAYOUT.DP)
        keep = stored[:, None]
        if D != LAYOUT.DP:
            keep = keep & (offs_d < D)[None, :]
        at_grad = grad_ptr + (chunk * grad_rows + offs_m) * (3 * H * D) + h * D
        tl.store(at_grad[:, None] + offs_d[None, :], dq.to(grad_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def prompted_attention_key_grad_kernel(
    qkv_ptr, prompt_ptr, ranges_ptr, bias_ptr, column_ptr, ids_ptr, cos_ptr, sin_ptr, out_ptr, do_ptr, lse_ptr,
    dlse_ptr, delta_ptr, grad_ptr, column_grad_ptr,
    B, N, P, pool_size, prompt_column, images, stride_grad, stride_b, stride_pb, stride_th,
    LAYOUT: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OF_PROMPTS: tl.constexpr, HAS_DLSE: tl.constexpr,
    FUSE_DELTA: tl.constexpr, COLUMN_GRAD: tl.constexpr,
):
    """Inputs as in the query gradient, with delta (B, H, rows) -> grad, the key section of dqkv (B, N, 3*H*D), or with
    OF_PROMPTS that of the partial sums (chunks, P, stride_grad); values follow keys. COLUMN_GRAD, of prompts: also the
    partial sums (chunks, P, H) of the gradient of values of their columns.

    Scores are (rows, keys), and p and ds are transposed where they multiply from the left. FUSE_DELTA computes delta
    from out instead of loading it, for when no other kernel has stored it.
    """
    H: tl.constexpr = LAYOUT.H
    D: tl.constexpr = LAYOUT.D
    rows = N
    if LAYOUT.PROMPT_QUERIES:
        rows = N + P
    grad_keys = N
    if OF_PROMPTS:
        grad_keys = P
    key_blocks = tl.cdiv(grad_keys, BLOCK_N)
    pid = tl.program_id(0)
    outer = pid // key_blocks
    h = outer % H
    chunk = (outer // H).to(tl.int64)
    offs_n = (pid % key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    HAS_BIAS: tl.constexpr = BIAS.PROMPT_COLUMNS if OF_PROMPTS else BIAS.KIND > 0
    HAS_COLUMN: tl.constexpr = OF_PROMPTS & BIAS.COLUMN_BIAS
    bias_head = qkv_ptr
    keys = offs_n
    if BIAS.KIND:
        bias_head = bias_ptr + h.to(tl.int64) * stride_th
        if OF_PROMPTS:
            bias_head += prompt_column
        if BIAS.KIND == TABLE:
            keys = key_terms(load_ids(ids_ptr, offs_n, N, WINDOW), WINDOW)
    # The tile's columns are padded to 16, so this mask is constant over 16 and the load stays wide.
    inside = offs_n < tl.cdiv(grad_keys, 16) * 16
    cos = head_table(cos_ptr, qkv_ptr, h, LAYOUT)
    sin = head_table(sin_ptr, qkv_ptr, h, LAYOUT)
    token = tl.minimum(offs_n, N - 1)
    DP: tl.constexpr = LAYOUT.DP  # Triton 3.6 takes no field of a group in a shape
    dk = tl.zeros((BLOCK_N, DP), MATH.ACC)
    dv = tl.zeros((BLOCK_N, DP), MATH.ACC)
    dcolumn = tl.zeros((BLOCK_N,), MATH.ACC)

    first_image = chunk
    last_image = chunk + 1
    if OF_PROMPTS:
        first_image = chunk * images
        last_image = tl.minimum(first_image + images, B)
    for b in range(first_image, last_image):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        last_prompt = P - 1
        start = 0
        if LAYOUT.HAS_PROMPTS:
            prompts = prompt_ptr + b * stride_pb + h * D
            if LAYOUT.POOL:
                start, _ = prompt_range(ranges_ptr, b, pool_size, P)
                prompts += start.to(tl.int64) * LAYOUT.STRIDE_P
                # Rows past the range are computed from what stands there and not used; past the pool nothing is read.
                last_prompt = tl.minimum(P, pool_size - start) - 1
        queries = Rows(tokens, prompts, N, P, cos, sin)
        if OF_PROMPTS:
            key_ptr = prompts + tl.minimum(offs_n, last_prompt).to(LAYOUT.INDEX) * LAYOUT.STRIDE_P
            if LAYOUT.PROMPT_QUERIES:
                key_ptr += H * D
        else:
            key_ptr = tokens + H * D + token.to(LAYOUT.INDEX) * LAYOUT.STRIDE_N
        if LAYOUT.ROTARY:
            first_half = key_ptr[:, None] + tl.arange(0, LAYOUT.DP // 2)[None, :]
            k = load_turned(first_half, queries, token, inside, LAYOUT, PROMPTS if OF_PROMPTS else TOKENS)
        else:
            k = load_rows(key_ptr, LAYOUT)
        v = load_rows(key_ptr + H * D, LAYOUT)
        if MATH.QUERY_SCALE != 1.0:
            k = k * MATH.QUERY_SCALE
        columns = head_columns(column_ptr, qkv_ptr, h, start, P, pool_size, LAYOUT, BIAS)
        column = 0.0
        if HAS_COLUMN:
            column = with_columns(column, columns, tl.minimum(offs_n, last_prompt), offs_n, False, MATH)
        for first in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
            i = first + tl.arange(0, BLOCK_M)
            row = tl.minimum(i, rows - 1)
            q = query_rows(row, queries, LAYOUT)
            image = b * rows * (H * D) + h * D
            out_row = row.to(LAYOUT.INDEX) * (H * D)
            do = load_block(do_ptr + image, out_row, LAYOUT)
            at = (b * H + h) * rows
            lse = _load_lse(lse_ptr + at, row, i < rows)
            if FUSE_DELTA:
                delta = _row_delta(do, out_ptr + image + out_row, dlse_ptr + at, row, LAYOUT, HAS_DLSE, MATH.ACC)
            else:
                delta = tl.load(delta_ptr + at + row)
            x = 0.0
            if HAS_BIAS:
                bias = bias_rows(bias_head, columns, ids_ptr, row, N, prompt_column, BIAS, WINDOW, LAYOUT.INDEX)
                if BIAS.KIND == TABLE:
                    x = gathered_bias(bias, keys, WINDOW, MATH.ACC)
                else:
                    x = tl.load(bias.rows[:, None] + offs_n[None, :], mask=inside[None, :], other=0.0).to(MATH.ACC)
                    if BIAS.PARTIAL:
                        x = tl.where(bias.live[:, None], x, 0.0)
            if HAS_COLUMN:
                x = x + column
            s = scores(q, k, x, HAS_BIAS | HAS_COLUMN, MATH)
            p = tl.exp2(s * MATH.FACTOR - lse[:, None])
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
            dp = tl.dot(do, tl.trans(v), input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
            if COLUMN_GRAD:
                dcolumn += tl.sum(ds, 0)

    offs_d = tl.arange(0, LAYOUT.DP)
    keep = (offs_n < grad_keys)[:, None]
    if D != LAYOUT.DP:
        keep = keep & (offs_d < D)[None, :]
    at_grad = grad_ptr + ((chunk * grad_keys + offs_n) * stride_grad + h * D)[:, None] + offs_d[None, :]
    dk = dk * MATH.GRAD_SCALE
    if LAYOUT.ROTARY:
        of = Rows(qkv_ptr, qkv_ptr, N, P, cos, sin)
        base = grad_ptr + chunk * grad_keys * stride_grad + h * D
        store_turned_back(dk, base, stride_grad, of, (pid % key_blocks) * BLOCK_N, grad_keys, LAYOUT,
                          PROMPTS if OF_PROMPTS else TOKENS)
    else:
        tl.store(at_grad, dk.to(grad_ptr.dtype.element_ty), mask=keep)
    tl.store(at_grad + H * D, dv.to(grad_ptr.dtype.element_ty), mask=keep)
    if COLUMN_GRAD:
        tl.store(column_grad_ptr + (chunk * grad_keys + offs_n) * H + h, dcolumn, mask=offs_n < grad_keys)


@triton.jit(do_not_specialize=["B", "images"])  # a smaller last batch compiles nothing
def prompted_attention_bias_grad_kernel(
    qkv_ptr, prompt_ptr, bias_ptr, column_ptr, ids_ptr, cos_ptr, sin_ptr, do_ptr, lse_ptr, delta_ptr, grad_ptr,
    B, N, P, prompt_column, images, first_head, heads, grad_rows, grad_columns, stride_b, stride_pb, stride_th,
    LAYOUT: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):
    """Inputs as in the key gradient -> grad, partial sums (chunks, heads, grad_rows, grad_columns) in the rows and
    columns of the caller's bias."""
    H: tl.constexpr = LAYOUT.H
    D: tl.constexpr = LAYOUT.D
    rows = N
    if LAYOUT.PROMPT_QUERIES:
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
    bias_head = bias_ptr + h.to(tl.int64) * stride_th
    bias = bias_rows(bias_head, qkv_ptr, ids_ptr, row, N, prompt_column, BIAS, WINDOW, LAYOUT.INDEX)
    if BIAS.KIND == TABLE:
        x = gathered_bias(bias, key_terms(load_ids(ids_ptr, offs_n, N, WINDOW), WINDOW), WINDOW, MATH.ACC)
    elif BIAS.PROMPT_COLUMNS:
        bias_column = tl.where(column < N, column, column - N + prompt_column)
        x = tl.load(bias.rows[:, None] + bias_column[None, :]).to(MATH.ACC)
        if BIAS.COLUMN_BIAS:
            columns = head_columns(column_ptr, qkv_ptr, h, 0, P, 0, LAYOUT, BIAS)
            x = with_columns(x, columns, column - N, column >= N, True, MATH)
    else:
        # The tile's columns are padded to 16, so this mask is constant over 16 and the load stays wide.
        inside = offs_n < tl.cdiv(grad_columns, 16) * 16
        x = tl.load(bias.rows[:, None] + offs_n[None, :], mask=inside[None, :], other=0.0).to(MATH.ACC)

    cos = head_table(cos_ptr, qkv_ptr, h, LAYOUT)
    sin = head_table(sin_ptr, qkv_ptr, h, LAYOUT)
    total = tl.zeros((BLOCK_M, BLOCK_N), MATH.ACC)
    first_image = chunk * images
    for b in tl.range(first_image, tl.minimum(first_image + images, B), num_stages=STAGES):
        tokens = qkv_ptr + b * stride_b + h * D
        prompts = qkv_ptr
        if LAYOUT.PROMPT_QUERIES or BIAS.PROMPT_COLUMNS:
            prompts = prompt_ptr + b * stride_pb + h * D
        queries = Rows(tokens, prompts, N, P, cos, sin)
        q_ptr = mixed_rows(row, queries, 0, 0, N, LAYOUT, LAYOUT.PROMPT_QUERIES)
        q = load_operand_rows(q_ptr, queries, tl.minimum(row, N - 1), row < N, True, LAYOUT, MIXED)
        key_ptr = mixed_rows(column, keys_of(queries, LAYOUT), 0, 0, N, LAYOUT, BIAS.PROMPT_COLUMNS)
        k = load_operand_rows(key_ptr, queries, tl.minimum(column, N - 1), column < N, LAYOUT.KEYS_IN_REGISTERS, LAYOUT,
                              MIXED)
        v = load_rows(key_ptr + H * D, LAYOUT)
        do = load_rows(do_ptr + (b * rows + row) * (H * D) + h * D, LAYOUT)
        at = (b * H + h) * rows
        lse = _load_lse(lse_ptr + at, row, offs_m < grad_rows)
        delta = tl.load(delta_ptr + at + row)
        if MATH.QUERY_SCALE != 1.0:
            q = q * MATH.QUERY_SCALE
        s = scores(q, k, x, True, MATH)
        p = tl.exp2(s * MATH.FACTOR - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
        total += p * (dp - delta[:, None])

    grad_row = (chunk * heads + h - first_head) * grad_rows + offs_m
    at_grad = grad_ptr + (grad_row * grad_columns)[:, None] + offs_n[None, :]
    tl.store(at_grad, total, mask=(offs_m < grad_rows)[:, None] & (offs_n < grad_columns)[None, :])


@triton.jit
def prompted_attention_table_grad_kernel(
    dbias_ptr, ids_ptr, grad_ptr, first_head, N, R, H: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """dbias (heads, N, N) of heads from first_head on, ids (N,) -> their columns of grad (R, H): every program looks
    for its rows of the table among all pairs, in order, for one head."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1)
    total = tl.zeros((BLOCK_R,), ACC)
    for first_row in range(0, N, BLOCK_M):
        i = first_row + tl.arange(0, BLOCK_M)
        query, query_class = query_terms(load_ids(ids_ptr, i, N, WINDOW), WINDOW)
        for first_column in range(0, N, BLOCK_N):
            j = first_column + tl.arange(0, BLOCK_N)
            key, key_class = key_terms(load_ids(ids_ptr, j, N, WINDOW), WINDOW)
            index = table_index(query[:, None], query_class[:, None], key[None, :], key_class[None, :], WINDOW)
            at = dbias_ptr + (h.to(tl.int64) * N + i[:, None]) * N + j[None, :]
            x = tl.load(at, mask=index < R, other=0.0)
            found = index[:, :, None] == r[None, None, :]
            total += tl.sum(tl.sum(tl.where(found, x[:, :, None], 0.0), 1), 0)
    tl.store(grad_ptr + r * H + first_head + h, total.to(grad_ptr.dtype.element_ty), mask=r < R)


@triton.jit(do_not_specialize=["B"])  # a smaller last batch compiles nothing
def prompted_attention_pool_grad_kernel(
    partial_ptr, ranges_ptr, grad_ptr, B, max_length, pool_size, columns,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """partial (B, max_length, columns), ranges (B, 2) -> grad (pool_size, columns): sums of the rows that stand for a
    row of the pool."""
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
