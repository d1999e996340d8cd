"""What the forward and backward kernels share: where rows, biases and scores of a block come from."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Values of BIAS besides 0, none: a dense tile per head, or the table of relative positions itself.
TILE = tl.constexpr(1)
TABLE = tl.constexpr(2)


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
def query_terms(ids, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """What table_index needs of queries: a term of the index for patches, and one for everything else."""
    PLACES: tl.constexpr = HEIGHT * WIDTH
    CENTRE: tl.constexpr = ((2 * HEIGHT - 1) * (2 * WIDTH - 1) - 1) // 2
    patch = (ids > 0) & (ids <= PLACES)
    place = ids - 1
    offset = tl.where(patch, place + (place // WIDTH) * (WIDTH - 1) + CENTRE, 1 << 24)
    return offset, tl.where(patch, 0, tl.where(ids == 0, 1, 8))


@triton.jit
def key_terms(ids, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    PLACES: tl.constexpr = HEIGHT * WIDTH
    R: tl.constexpr = (2 * HEIGHT - 1) * (2 * WIDTH - 1) + 3
    patch = (ids > 0) & (ids <= PLACES)
    place = ids - 1
    offset = tl.where(patch, place + (place // WIDTH) * (WIDTH - 1), -(1 << 24))
    return offset, tl.where(patch, R - 4, tl.where(ids == 0, R - 2, R + 4))


@triton.jit
def table_index(query_offset, query_class, key_offset, key_class, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Row of the table for a pair, R where either has no position.

    Rows up to R - 4 are differences of patches; classes add up to R - 3 (class token to patch), R - 2, R - 1 or more.
    """
    R: tl.constexpr = (2 * HEIGHT - 1) * (2 * WIDTH - 1) + 3
    index = query_offset - key_offset
    return tl.where(index > R - 4, tl.minimum(query_class + key_class, R), index)


@triton.jit
def load_ids(ids_ptr, i, N, HAS_IDS: tl.constexpr):
    if HAS_IDS:
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
    else:
        ids = tl.where(i < N, i, -1)
    return ids


@triton.jit
def bias_rows(source, row, N, stride_tn: tl.constexpr, BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
              HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    """What block_bias must know of query rows: pointers into the tile, or terms of the table's index.

    PARTIAL_BIAS: rows from N on are prompts and have no bias.
    """
    if BIAS == TABLE:
        rows = query_terms(load_ids(source[1], row, N, HAS_IDS), HEIGHT, WIDTH)
    else:
        if PARTIAL_BIAS:
            row = tl.minimum(row, N - 1)
        rows = source[0] + row.to(INDEX) * stride_tn
    return rows


@triton.jit
def gathered_bias(source, rows, keys, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Bias of all pairs of query_terms `rows` and key_terms `keys`; row R of the table is zero."""
    index = table_index(rows[0][:, None], rows[1][:, None], keys[0][None, :], keys[1][None, :], HEIGHT, WIDTH)
    return tl.load(source[0] + index).to(ACC)


@triton.jit
def block_bias(source, rows, column, has_bias, N, BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
               HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    if BIAS == TABLE:
        bias = gathered_bias(source, rows, key_terms(load_ids(source[1], column, N, HAS_IDS), HEIGHT, WIDTH), HEIGHT,
                             WIDTH, ACC)
    else:
        bias = tl.load(rows[:, None] + column[None, :]).to(ACC)
        if PARTIAL_BIAS:
            bias = tl.where(has_bias[:, None], bias, 0.0)
    return bias


@triton.jit
def tail_bias(source, t, rows, has_bias, full_tokens, full_prompts, left, total, prompt_column, N, BIAS: tl.constexpr,
              PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr,
              WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Bias of the mixed block: `left` token columns, then prompt columns up to `total`."""
    if BIAS == TABLE:
        bias = gathered_bias(source, rows, key_terms(load_ids(source[1], full_tokens + t, N, HAS_IDS), HEIGHT, WIDTH),
                             HEIGHT, WIDTH, ACC)
    else:
        # The tile's rows are padded to 16 columns, so this mask is constant over 16 and the load stays wide.
        padded = tl.cdiv(left, 16) * 16
        bias = tl.load(rows[:, None] + (full_tokens + t)[None, :], mask=(t < padded)[None, :], other=0.0)
        # Chosen before it is converted: half the registers while the load is under way.
        bias = tl.where((t < left)[None, :], bias, tl.zeros_like(bias)).to(ACC)
        if PROMPT_BIAS:
            column = prompt_column + full_prompts + t - left
            bias += tl.load(rows[:, None] + column[None, :], mask=((t >= left) & (t < total))[None, :],
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
def scores(q, k, bias, SCALE: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """q @ k^T * SCALE + bias."""
    if BIAS and SCALE == 1.0:
        # The product starts from the bias, which saves an addition per score.
        s = tl.dot(q, tl.trans(k), bias, input_precision=PRECISION, out_dtype=ACC)
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            s = s * SCALE + bias
        elif SCALE != 1.0:
            s = s * SCALE
    return s


@triton.jit
def full_keys(keys, first, stride: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
              BLOCK_N: tl.constexpr, INDEX: tl.constexpr):
    """k and v of the whole block of keys from row `first` on."""
    # A scalar pointer per block, and offsets that no loop changes.
    base = keys + tl.cast(first, tl.int64) * stride
    offset = tl.arange(0, BLOCK_N).to(INDEX) * stride
    return load_block(base, offset, D, DP), load_block(base + H * D, offset, D, DP)


@triton.jit
def full_block(keys, first, source, bias_row, column, has_bias, N, stride: tl.constexpr, H: tl.constexpr,
               D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr,
               PARTIAL_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               INDEX: tl.constexpr, ACC: tl.constexpr):
    """full_keys and their bias, which stands from `column` on."""
    k, v = full_keys(keys, first, stride, H, D, DP, BLOCK_N, INDEX)
    bias = 0.0
    if BIAS:
        j = column + tl.arange(0, BLOCK_N)
        bias = block_bias(source, bias_row, j, has_bias, N, BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ACC)
    return k, v, bias


@triton.jit
def tail_keys(t, keys, prompt_keys, full_tokens, full_prompts, N, P, stride_n: tl.constexpr, stride_p: tl.constexpr,
              H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_PROMPTS: tl.constexpr, ALIGNED: tl.constexpr,
              INDEX: tl.constexpr):
    """k and v of keys t of what full blocks leave: tokens first, then prompts."""
    key_ptr = mixed_rows(t, keys, prompt_keys, full_tokens, full_prompts, N - full_tokens, N, P, stride_n, stride_p,
                         HAS_PROMPTS, ALIGNED, INDEX)
    return load_rows(key_ptr, D, DP), load_rows(key_ptr + H * D, D, DP)


@triton.jit
def tail_scores(t, full_tokens, full_prompts, source, bias_row, has_bias, N, P, prompt_column,
                HAS_PROMPTS: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
                HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Bias and validity of the keys of tail_keys."""
    left = N - full_tokens
    total = left
    if HAS_PROMPTS:
        total = left + P - full_prompts
    bias = 0.0
    if BIAS:
        bias = tail_bias(source, t, bias_row, has_bias, full_tokens, full_prompts, left, total, prompt_column, N, BIAS,
                         PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ACC)
    return bias, t < total


@triton.jit
def tail_block(t, keys, prompt_keys, full_tokens, full_prompts, source, bias_row, has_bias, N, P, prompt_column,
               stride_n: tl.constexpr, stride_p: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               HAS_PROMPTS: tl.constexpr, BIAS: tl.constexpr, PROMPT_BIAS: tl.constexpr, PARTIAL_BIAS: tl.constexpr,
               HAS_IDS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
               INDEX: tl.constexpr, ACC: tl.constexpr):
    """k, v, bias and validity of keys t of what full blocks leave: tokens first, then prompts."""
    k, v = tail_keys(t, keys, prompt_keys, full_tokens, full_prompts, N, P, stride_n, stride_p, H, D, DP, HAS_PROMPTS,
                     ALIGNED, INDEX)
    bias, valid = tail_scores(t, full_tokens, full_prompts, source, bias_row, has_bias, N, P, prompt_column,
                              HAS_PROMPTS, BIAS, PROMPT_BIAS, PARTIAL_BIAS, HAS_IDS, HEIGHT, WIDTH, ACC)
    return k, v, bias, valid
