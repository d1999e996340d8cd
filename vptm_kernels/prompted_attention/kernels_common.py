"""What the forward and backward kernels share: where rows, biases and scores of a block come from.

Constants reach kernels in groups, as `tl.constexpr` named tuples; so do the pointers of one image inside kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Values of Bias.KIND besides 0, none: a dense tile per head, or the table of relative positions itself.
TILE = tl.constexpr(1)
TABLE = tl.constexpr(2)
# Which rows are turned, where there are rotary positions: none of them, all, or those that are told.
PROMPTS = tl.constexpr(0)
TOKENS = tl.constexpr(1)
MIXED = tl.constexpr(2)


class Layout(NamedTuple):
    """How rows of tokens and prompts lie, in elements."""

    H: int
    D: int
    DP: int  # D rounded up to a power of two
    STRIDE_N: int  # from one token to the next
    STRIDE_P: int  # from one prompt to the next
    ALIGNED: bool  # every row of every head starts on a multiple of 16 bytes
    INDEX: tl.dtype  # of offsets inside one image
    HAS_PROMPTS: bool
    POOL: bool  # prompts are ranges of a pool, whose lengths only the device knows
    PROMPT_QUERIES: bool
    ROTARY: bool  # queries and keys of tokens are turned as they are loaded
    TABLE_H: int  # from one head's cosines to the next, 0 where heads share them
    TABLE_N: int  # from one token's cosines to the next
    KEYS_IN_REGISTERS: bool  # as operands of products, in loops over keys


class KeyBlocks(NamedTuple):
    """How a kernel that walks over keys splits them: full blocks, then one or two narrow ones (0 for none), or with
    TAIL_LOOP as many of TAIL_1 keys as it takes.

    Numbers of full blocks are those where they are unrolled; loops ask only whether there are any.
    """

    BLOCK_N: int
    TAIL_1: int
    TAIL_2: int
    TOKEN_BLOCKS: int
    PROMPT_BLOCKS: int
    TAIL_LOOP: bool


class Bias(NamedTuple):
    """What is added to scores: a tile (H, rows, columns) on aligned rows, or a table (H, R + 1) of positions."""

    KIND: int
    PROMPT_COLUMNS: bool
    COLUMN_BIAS: bool  # beside that, every prompt has a value for its column
    PARTIAL: bool  # rows from N on are prompts and have no bias
    STRIDE: int  # from one row of a tile to the next


class Window(NamedTuple):
    """The window of patches that a table's rows are differences of."""

    HEIGHT: int
    WIDTH: int
    HAS_IDS: bool  # places of tokens are given; else token i stands at place i


class Arithmetic(NamedTuple):
    """Scores are (q * QUERY_SCALE) @ k^T * SCALE + bias; FACTOR takes them to base 2. COLUMN_SCALE: of the values of
    prompt columns, which are not scaled, where FACTOR holds the scale of scores."""

    QUERY_SCALE: float
    SCALE: float
    FACTOR: float
    COLUMN_SCALE: float
    GRAD_SCALE: float
    ACC: tl.dtype
    PRECISION: str


class Rows(NamedTuple):
    """Rows of one image and head: pointers to the first of its tokens and of its prompts, how many there are, and
    pointers to the cosines and sines that tokens are turned by."""

    tokens: Any
    prompts: Any
    N: Any
    P: Any
    cos: Any
    sin: Any


class BiasRows(NamedTuple):
    """The bias of a block of query rows: pointer to the head's tile or table, ids of tokens, the rows (pointers into
    the tile, or terms of the table's index), which of them have a bias, where columns of prompts start, and pointer to
    the head's values of the image's prompts."""

    head: Any
    ids: Any
    rows: Any
    live: Any
    prompt_column: Any
    column_values: Any


# Argument lists stand in rows, in the order in which they are passed.
# fmt: off
@triton.jit
def load_rows(row_ptr, LAYOUT: tl.constexpr):
    """(rows, DP) of rows of D elements, zeros beyond D."""
    d = tl.arange(0, LAYOUT.DP)
    if LAYOUT.D == LAYOUT.DP:
        x = tl.load(row_ptr[:, None] + d[None, :])
    else:
        x = tl.load(row_ptr[:, None] + d[None, :], mask=(d < LAYOUT.D)[None, :], other=0.0)
    return x


@triton.jit
def load_block(base, offset, LAYOUT: tl.constexpr):
    """load_rows(base + offset), cheaper: row and channel are one integer before they meet the pointer."""
    d = tl.arange(0, LAYOUT.DP)
    if LAYOUT.D == LAYOUT.DP:
        x = tl.load(base + (offset[:, None] + d[None, :]))
    else:
        x = tl.load(base + (offset[:, None] + d[None, :]), mask=(d < LAYOUT.D)[None, :], other=0.0)
    return x


@triton.jit
def head_table(table_ptr, none, h, LAYOUT: tl.constexpr):
    """Pointer to a head's cosines or sines."""
    table = none  # Triton 3.6 returns no None
    if LAYOUT.ROTARY:
        table = table_ptr + h.to(tl.int64) * LAYOUT.TABLE_H
    return table


@triton.jit
def load_angles(cos, sin, table, inside, LAYOUT: tl.constexpr, MASK: tl.constexpr):
    """Cosines and sines (rows, DP // 2) at offsets `table` of their rows."""
    c = tl.arange(0, LAYOUT.DP // 2)
    # Row pointers first: what a thread reads of a row is then one pointer and constants.
    cos_ptr = (cos + table)[:, None] + c[None, :]
    sin_ptr = (sin + table)[:, None] + c[None, :]
    if MASK:
        x = tl.load(cos_ptr, mask=inside, other=0.0)
        y = tl.load(sin_ptr, mask=inside, other=0.0)
    else:
        x = tl.load(cos_ptr)
        y = tl.load(sin_ptr)
    return x, y


@triton.jit
def load_turned(first, of, n, tokens, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """(rows, DP) of queries or keys, those of tokens turned by the angles of rows `n`: channels i and i + D/2 of a row,
    x and y, become x cos - y sin and y cos + x sin. `first`: pointers to the first half of channels, (rows, DP // 2).

    Halves come from memory one by one, so a thread holds both channels of a pair. They stand at 0 and DP // 2, with
    zeros behind each where D is no power of two: products of queries and keys do not care for the order of channels.
    """
    HALF: tl.constexpr = LAYOUT.D // 2
    inside = (tl.arange(0, LAYOUT.DP // 2) < HALF)[None, :]
    if LAYOUT.D == LAYOUT.DP:
        x = tl.load(first)
        y = tl.load(first + HALF)
    else:
        x = tl.load(first, mask=inside, other=0.0)
        y = tl.load(first + HALF, mask=inside, other=0.0)
    if ROWS != PROMPTS:
        cos, sin = load_angles(of.cos, of.sin, n.to(LAYOUT.INDEX) * LAYOUT.TABLE_N, inside, LAYOUT,
                               LAYOUT.D != LAYOUT.DP)
        if ROWS == MIXED:
            # Chosen after they are loaded: as the mask of the loads it takes registers that spill.
            cos = tl.where(tokens[:, None], cos, 1.0)
            sin = tl.where(tokens[:, None], sin, 0.0)
        ACC: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
        cos = cos.to(ACC)
        sin = sin.to(ACC)
        wide_x = x.to(ACC)
        wide_y = y.to(ACC)
        x = (wide_x * cos - wide_y * sin).to(x.dtype)
        y = (wide_y * cos + wide_x * sin).to(y.dtype)
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def load_turned_once(first, of, n, tokens, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """load_turned behind a branch that is always taken, for operands in registers: Triton carries the layout that a
    product wants of one through arithmetic up to its loads, so that four conversions stand for one and every product
    turns the rows for itself. It stops at a branch."""
    DP: tl.constexpr = LAYOUT.DP  # Triton 3.6 takes no field of a group in a shape
    x = tl.zeros((first.shape[0], DP), first.dtype.element_ty)
    if of.N > 0:
        x = load_turned(first, of, n, tokens, LAYOUT, ROWS)
    return x


@triton.jit
def load_operand(first, of, n, tokens, IN_REGISTERS: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """load_turned of what is an operand of products, in registers or not."""
    if IN_REGISTERS:
        x = load_turned_once(first, of, n, tokens, LAYOUT, ROWS)
    else:
        x = load_turned(first, of, n, tokens, LAYOUT, ROWS)
    return x


@triton.jit
def load_operand_rows(row_ptr, of, n, tokens, IN_REGISTERS: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """load_rows of queries or keys, those of tokens turned by the angles of rows `n`."""
    if LAYOUT.ROTARY:
        first = row_ptr[:, None] + tl.arange(0, LAYOUT.DP // 2)[None, :]
        x = load_operand(first, of, n, tokens, IN_REGISTERS, LAYOUT, ROWS)
    else:
        x = load_rows(row_ptr, LAYOUT)
    return x


@triton.jit
def store_turned_back(grad, base, STRIDE, of, first, rows, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """Store the gradient (rows, DP) of queries or keys as `load_turned` gave them, turned back, as those from row
    `first` on of `rows`."""
    HALF: tl.constexpr = LAYOUT.D // 2
    HALF_P: tl.constexpr = LAYOUT.DP // 2
    BLOCK: tl.constexpr = grad.shape[0]
    x, y = tl.split(tl.permute(tl.reshape(grad, (BLOCK, 2, HALF_P)), (0, 2, 1)))
    # Offsets depend on the thread alone: those that rows were loaded from would be held in registers until here.
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, HALF_P)
    keep = (i < rows - first)[:, None] & (c < HALF)[None, :]
    if ROWS != PROMPTS:
        table = tl.cast(first, tl.int64) * LAYOUT.TABLE_N
        cos, sin = load_angles(of.cos + table, of.sin + table, i.to(LAYOUT.INDEX) * LAYOUT.TABLE_N, keep, LAYOUT, True)
        cos = cos.to(grad.dtype)
        sin = sin.to(grad.dtype)
        turned = x * cos + y * sin
        y = y * cos - x * sin
        x = turned
    at = base + tl.cast(first, tl.int64) * STRIDE + (i[:, None] * STRIDE + c[None, :])
    tl.store(at, x.to(base.dtype.element_ty), mask=keep)
    tl.store(at + HALF, y.to(base.dtype.element_ty), mask=keep)


@triton.jit
def mixed_rows(t, of, first_token, first_prompt, left, LAYOUT: tl.constexpr, WITH_PROMPTS: tl.constexpr):
    """`left` token rows from `first_token` on, then to prompt rows from `first_prompt` on; t counts both."""
    ptr = of.tokens + tl.minimum(first_token + t, of.N - 1).to(LAYOUT.INDEX) * LAYOUT.STRIDE_N
    if WITH_PROMPTS:
        prompt = tl.maximum(tl.minimum(first_prompt + tl.maximum(t - left, 0), of.P - 1), 0)
        # Chosen as integers: Triton 3.6 and 3.7 end the process where they compile a choice of two pointers for AMD.
        other = of.prompts + prompt.to(LAYOUT.INDEX) * LAYOUT.STRIDE_P
        ptr = tl.where(t < left, ptr.to(tl.int64), other.to(tl.int64)).to(of.tokens.dtype)
        if LAYOUT.ALIGNED:
            # A choice forgets what is known about both: without this, reads are 2 bytes wide.
            ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def query_rows(row, of, LAYOUT: tl.constexpr):
    """(rows, DP) of queries; those from N on are prompts."""
    if LAYOUT.PROMPT_QUERIES:
        ptr = mixed_rows(row, of, 0, 0, of.N, LAYOUT, True)
        q = load_operand_rows(ptr, of, tl.minimum(row, of.N - 1), row < of.N, True, LAYOUT, MIXED)
    elif LAYOUT.ROTARY:
        q = load_operand_rows(of.tokens + row.to(LAYOUT.INDEX) * LAYOUT.STRIDE_N, of, row, row, True, LAYOUT, TOKENS)
    else:
        q = load_block(of.tokens, row.to(LAYOUT.INDEX) * LAYOUT.STRIDE_N, LAYOUT)
    return q


@triton.jit
def keys_of(queries, LAYOUT: tl.constexpr):
    """Keys follow queries by H*D elements where there are any, and values follow keys by as many."""
    prompts = queries.prompts
    if LAYOUT.PROMPT_QUERIES:
        prompts = prompts + LAYOUT.H * LAYOUT.D
    return Rows(queries.tokens + LAYOUT.H * LAYOUT.D, prompts, queries.N, queries.P, queries.cos, queries.sin)


@triton.jit
def query_terms(ids, WINDOW: tl.constexpr):
    """What table_index needs of queries: a term of the index for patches, and one for everything else."""
    PLACES: tl.constexpr = WINDOW.HEIGHT * WINDOW.WIDTH
    CENTRE: tl.constexpr = ((2 * WINDOW.HEIGHT - 1) * (2 * WINDOW.WIDTH - 1) - 1) // 2
    patch = (ids > 0) & (ids <= PLACES)
    place = ids - 1
    offset = tl.where(patch, place + (place // WINDOW.WIDTH) * (WINDOW.WIDTH - 1) + CENTRE, 1 << 24)
    return offset, tl.where(patch, 0, tl.where(ids == 0, 1, 8))


@triton.jit
def key_terms(ids, WINDOW: tl.constexpr):
    PLACES: tl.constexpr = WINDOW.HEIGHT * WINDOW.WIDTH
    R: tl.constexpr = (2 * WINDOW.HEIGHT - 1) * (2 * WINDOW.WIDTH - 1) + 3
    patch = (ids > 0) & (ids <= PLACES)
    place = ids - 1
    offset = tl.where(patch, place + (place // WINDOW.WIDTH) * (WINDOW.WIDTH - 1), -(1 << 24))
    return offset, tl.where(patch, R - 4, tl.where(ids == 0, R - 2, R + 4))


@triton.jit
def table_index(query_offset, query_class, key_offset, key_class, WINDOW: tl.constexpr):
    """Row of the table for a pair, R where either has no position.

    Rows up to R - 4 are differences of patches; classes add up to R - 3 (class token to patch), R - 2, R - 1 or more.
    """
    R: tl.constexpr = (2 * WINDOW.HEIGHT - 1) * (2 * WINDOW.WIDTH - 1) + 3
    index = query_offset - key_offset
    return tl.where(index > R - 4, tl.minimum(query_class + key_class, R), index)


@triton.jit
def load_ids(ids_ptr, i, N, WINDOW: tl.constexpr):
    if WINDOW.HAS_IDS:
        ids = tl.load(ids_ptr + i, mask=i < N, other=-1)
    else:
        ids = tl.where(i < N, i, -1)
    return ids


@triton.jit
def bias_rows(head, column_values, ids_ptr, row, N, prompt_column, BIAS: tl.constexpr, WINDOW: tl.constexpr,
              INDEX: tl.constexpr):
    """BiasRows of query rows; those from N on are prompts."""
    live = row < N
    rows = row
    ids = head  # Triton 3.6 returns no None
    if WINDOW.HAS_IDS:
        ids = ids_ptr
    if BIAS.KIND == TABLE:
        rows = query_terms(load_ids(ids_ptr, row, N, WINDOW), WINDOW)
    elif BIAS.KIND:
        if BIAS.PARTIAL:
            row = tl.minimum(row, N - 1)
        rows = head + row.to(INDEX) * BIAS.STRIDE
    return BiasRows(head, ids, rows, live, prompt_column, column_values)


@triton.jit
def head_columns(column_ptr, none, h, start, P, pool_size, LAYOUT: tl.constexpr, BIAS: tl.constexpr):
    """Pointer to a head's values (H, P) for prompt columns, or (H, pool_size) from row `start` of the pool on."""
    values = none  # Triton 3.6 returns no None
    if BIAS.COLUMN_BIAS:
        if LAYOUT.POOL:
            values = column_ptr + (h * pool_size + start)
        else:
            values = column_ptr + h * P
    return values


@triton.jit
def with_columns(x, values, prompt, valid, MASK: tl.constexpr, MATH: tl.constexpr):
    """x, a bias of scores or 0.0, plus the values of these prompts, the same for every query."""
    if MASK:
        value = tl.load(values + prompt, mask=valid, other=0.0)
    else:
        value = tl.load(values + prompt)
    return x + (value.to(MATH.ACC) * MATH.COLUMN_SCALE)[None, :]


@triton.jit
def gathered_bias(bias, keys, WINDOW: tl.constexpr, ACC: tl.constexpr):
    """Bias of all pairs of query_terms `bias.rows` and key_terms `keys`; row R of the table is zero."""
    index = table_index(bias.rows[0][:, None], bias.rows[1][:, None], keys[0][None, :], keys[1][None, :], WINDOW)
    return tl.load(bias.head + index).to(ACC)


@triton.jit
def block_bias(bias, column, N, BIAS: tl.constexpr, WINDOW: tl.constexpr, ACC: tl.constexpr):
    if BIAS.KIND == TABLE:
        x = gathered_bias(bias, key_terms(load_ids(bias.ids, column, N, WINDOW), WINDOW), WINDOW, ACC)
    else:
        x = tl.load(bias.rows[:, None] + column[None, :]).to(ACC)
        if BIAS.PARTIAL:
            x = tl.where(bias.live[:, None], x, 0.0)
    return x


@triton.jit
def tail_bias(bias, t, full_tokens, full_prompts, left, total, N, BIAS: tl.constexpr, WINDOW: tl.constexpr,
              MATH: tl.constexpr):
    """Bias of the mixed block: `left` token columns, then prompt columns up to `total`."""
    ACC: tl.constexpr = MATH.ACC
    x = 0.0
    if BIAS.KIND == TABLE:
        x = gathered_bias(bias, key_terms(load_ids(bias.ids, full_tokens + t, N, WINDOW), WINDOW), WINDOW, ACC)
    elif BIAS.KIND:
        # The tile's rows are padded to 16 columns, so this mask is constant over 16 and the load stays wide.
        padded = tl.cdiv(left, 16) * 16
        x = tl.load(bias.rows[:, None] + (full_tokens + t)[None, :], mask=(t < padded)[None, :], other=0.0)
        # Chosen before it is converted: half the registers while the load is under way.
        x = tl.where((t < left)[None, :], x, tl.zeros_like(x)).to(ACC)
        if BIAS.PROMPT_COLUMNS:
            column = bias.prompt_column + full_prompts + t - left
            x += tl.load(bias.rows[:, None] + column[None, :], mask=((t >= left) & (t < total))[None, :],
                         other=0.0).to(ACC)
        if BIAS.PARTIAL:
            x = tl.where(bias.live[:, None], x, 0.0)
    if BIAS.COLUMN_BIAS:
        prompt = full_prompts + t - left
        x = with_columns(x, bias.column_values, prompt, (t >= left) & (t < total), True, MATH)
    return x


@triton.jit
def prompt_range(ranges_ptr, b, pool_size, max_length):
    """Start and length of an image's rows of the pool, kept inside the pool whatever the ranges say."""
    start = tl.load(ranges_ptr + 2 * b)
    length = tl.load(ranges_ptr + 2 * b + 1)
    start = tl.minimum(tl.maximum(start, 0), pool_size)
    length = tl.minimum(tl.minimum(tl.maximum(length, 0), max_length), pool_size - start)
    return tl.minimum(start, pool_size - 1), length


@triton.jit
def scores(q, k, bias, HAS_BIAS: tl.constexpr, MATH: tl.constexpr):
    """q @ k^T * SCALE + bias."""
    if HAS_BIAS and MATH.SCALE == 1.0:
        # The product starts from the bias, which saves an addition per score.
        start = tl.broadcast_to(bias, (q.shape[0], k.shape[0]))
        s = tl.dot(q, tl.trans(k), start, input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
    else:
        s = tl.dot(q, tl.trans(k), input_precision=MATH.PRECISION, out_dtype=MATH.ACC)
        if HAS_BIAS:
            s = s * MATH.SCALE + bias
        elif MATH.SCALE != 1.0:
            s = s * MATH.SCALE
    return s


@triton.jit
def full_keys(keys, first, LAYOUT: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """k and v of the whole block of tokens or prompts from row `first` on."""
    # A scalar pointer per block, and offsets that no loop changes.
    STRIDE: tl.constexpr = LAYOUT.STRIDE_N if ROWS == TOKENS else LAYOUT.STRIDE_P
    base = keys.prompts
    if ROWS == TOKENS:
        base = keys.tokens
    base += tl.cast(first, tl.int64) * STRIDE
    i = tl.arange(0, BLOCK_N)
    offset = i.to(LAYOUT.INDEX) * STRIDE
    if LAYOUT.ROTARY:
        table = tl.cast(first, tl.int64) * LAYOUT.TABLE_N
        of = Rows(keys.tokens, keys.prompts, keys.N, keys.P, keys.cos + table, keys.sin + table)
        at = base + (offset[:, None] + tl.arange(0, LAYOUT.DP // 2)[None, :])
        k = load_operand(at, of, i, i, LAYOUT.KEYS_IN_REGISTERS, LAYOUT, ROWS)
    else:
        k = load_block(base, offset, LAYOUT)
    return k, load_block(base + LAYOUT.H * LAYOUT.D, offset, LAYOUT)


@triton.jit
def token_block(first, keys, bias, LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
                MATH: tl.constexpr):
    """k, v and bias of the whole block of tokens from `first` on."""
    k, v = full_keys(keys, first, LAYOUT, KEYS.BLOCK_N, TOKENS)
    x = 0.0
    if BIAS.KIND:
        x = block_bias(bias, first + tl.arange(0, KEYS.BLOCK_N), keys.N, BIAS, WINDOW, MATH.ACC)
    return k, v, x


@triton.jit
def prompt_bias(first, N, bias, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, MATH: tl.constexpr):
    """Bias of the whole block of prompts from `first` on, of one row where it is the same for all."""
    prompt = first + tl.arange(0, BLOCK_N)
    x = 0.0
    if BIAS.PROMPT_COLUMNS:
        x = block_bias(bias, bias.prompt_column + prompt, N, BIAS, WINDOW, MATH.ACC)
    if BIAS.COLUMN_BIAS:
        x = with_columns(x, bias.column_values, prompt, prompt, False, MATH)
    return x


@triton.jit
def prompt_block(first, keys, bias, LAYOUT: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
                 MATH: tl.constexpr):
    """k, v and bias of the whole block of prompts from `first` on."""
    k, v = full_keys(keys, first, LAYOUT, KEYS.BLOCK_N, PROMPTS)
    return k, v, prompt_bias(first, keys.N, bias, KEYS.BLOCK_N, BIAS, WINDOW, MATH)


@triton.jit
def tail_keys(t, keys, full_tokens, full_prompts, LAYOUT: tl.constexpr):
    """k and v of keys t of what full blocks leave: tokens first, then prompts."""
    left = keys.N - full_tokens
    key_ptr = mixed_rows(t, keys, full_tokens, full_prompts, left, LAYOUT, LAYOUT.HAS_PROMPTS)
    n = tl.minimum(full_tokens + t, keys.N - 1)
    k = load_operand_rows(key_ptr, keys, n, t < left, LAYOUT.KEYS_IN_REGISTERS, LAYOUT, MIXED)
    return k, load_rows(key_ptr + LAYOUT.H * LAYOUT.D, LAYOUT)


@triton.jit
def tail_keys_left(keys, full_tokens, full_prompts, LAYOUT: tl.constexpr):
    """How many keys full blocks leave."""
    total = keys.N - full_tokens
    if LAYOUT.HAS_PROMPTS:
        total += keys.P - full_prompts
    return total


@triton.jit
def tail_scores(t, keys, full_tokens, full_prompts, bias, LAYOUT: tl.constexpr, BIAS: tl.constexpr,
                WINDOW: tl.constexpr, MATH: tl.constexpr):
    """Bias and validity of the keys of tail_keys."""
    left = keys.N - full_tokens
    total = tail_keys_left(keys, full_tokens, full_prompts, LAYOUT)
    x = tail_bias(bias, t, full_tokens, full_prompts, left, total, keys.N, BIAS, WINDOW, MATH)
    return x, t < total


@triton.jit
def tail_block(t, keys, full_tokens, full_prompts, bias, LAYOUT: tl.constexpr, BIAS: tl.constexpr,
               WINDOW: tl.constexpr, MATH: tl.constexpr):
    """k, v, bias and validity of keys t of what full blocks leave: tokens first, then prompts."""
    k, v = tail_keys(t, keys, full_tokens, full_prompts, LAYOUT)
    x, valid = tail_scores(t, keys, full_tokens, full_prompts, bias, LAYOUT, BIAS, WINDOW, MATH)
    return k, v, x, valid
