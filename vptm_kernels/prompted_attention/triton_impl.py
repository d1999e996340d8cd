"""Launches of the Triton kernels: pointers, strides, block sizes and the few buffers they need.

Besides outputs and lse: the tile of a table (or its copy by heads), a copy of a dense bias on odd rows; in backward
delta (as lse), the prompts' partial sums over chunks of the batch, and the dense gradient of a bias by chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._runtime.triton_support import architecture, interpreting
from .bias import ROW_ALIGNMENT
from .configs import (
    Config,
    ForwardConfig,
    bias_grad_config,
    compiler_options,
    fits_tile,
    forward_config,
    heads_per_table_grad,
    images_per_program,
    key_grad_config,
    query_grad_config,
    table_grad_blocks,
    tails,
)
from .kernels_bwd import (
    _bias_grad_kernel,
    _delta_kernel,
    _key_grad_kernel,
    _pool_grad_kernel,
    _query_grad_kernel,
    _table_grad_kernel,
)
from .kernels_common import LOG2E, TABLE, TILE
from .kernels_fwd import _expand_table_kernel, _forward_kernel

_TRITON_DTYPES = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


class _Problem(NamedTuple):
    """Sizes and flags that every kernel of one call shares."""

    batch: int
    tokens: int
    prompts: int  # the bound of the lengths for pooled prompts
    heads: int
    head_dim: int
    rows: int  # query rows of one image
    pool_size: int
    pooled: bool
    prompt_queries: bool
    image_strides: tuple[int, int]  # of qkv and prompts
    row_strides: tuple[int, int]
    aligned: bool
    int64: bool
    accumulator: torch.dtype
    precision: str
    scale: float
    arch: str
    dtype_bits: int

    @property
    def target(self) -> tuple[str, int, int]:
        return self.arch, self.dtype_bits, self.head_dim

    def constants(self, bias: _Bias) -> dict[str, Any]:
        query_scale, scale, factor = 1.0, self.scale, LOG2E.value
        if bias.kind and _only_shifts_exponents(scale):
            # Queries take the scale, and the product of queries and keys starts from the bias.
            query_scale, scale = scale, 1.0
        elif not bias.kind and scale > 0:
            # The scale joins the factor of the exponent. A negative one would turn the maximum into a minimum, and zero
            # would make NaN of masked scores.
            scale, factor = 1.0, factor * scale
        far_bias = self.rows * bias.row_stride >= 2**31
        return {
            "H": self.heads,
            "D": self.head_dim,
            "DP": triton.next_power_of_2(self.head_dim),
            "HAS_PROMPTS": self.prompts > 0,
            "POOL": self.pooled,
            "PROMPT_QUERIES": self.prompt_queries,
            "BIAS": bias.kind,
            "PROMPT_BIAS": bias.prompt_columns,
            "PARTIAL_BIAS": bias.kind > 0 and self.prompt_queries and not bias.prompt_rows,
            "HAS_IDS": bias.token_ids is not None,
            "HEIGHT": bias.window[0],
            "WIDTH": bias.window[1],
            "ALIGNED": self.aligned,
            "INDEX": triton.language.int64 if self.int64 or far_bias else triton.language.int32,
            "stride_n": self.row_strides[0],
            "stride_p": self.row_strides[1],
            "stride_tn": bias.row_stride,
            "QUERY_SCALE": query_scale,
            "SCALE": scale,
            "FACTOR": factor,
            "ACC": _TRITON_DTYPES[self.accumulator],
            "PRECISION": self.precision,
            "enable_fp_fusion": True,
        }

    def key_parts(self, block_n: int, resident: bool = False) -> dict[str, Any]:
        """How kernels that walk over keys split them into full blocks and tails.

        Numbers of blocks are constants for unrolled (resident) keys; loops only need to know whether there are any.
        """
        tail_1, tail_2 = tails(self.tokens, self.prompts, block_n, pooled=self.pooled)
        blocks = self.tokens // block_n, self.prompts // block_n
        token_blocks, prompt_blocks = blocks if resident else (min(1, n) for n in blocks)
        return {"TAIL_1": tail_1, "TAIL_2": tail_2, "TOKEN_BLOCKS": token_blocks, "PROMPT_BLOCKS": prompt_blocks}


class _Bias(NamedTuple):
    """The bias as kernels read it.

    A tile (H, rows, columns) on aligned rows, token columns first, prompt columns from a multiple of 16 on; or a table
    (H, R + 1) of relative positions and the token ids.
    """

    data: Tensor | None = None
    kind: int = 0
    prompt_columns: bool = False
    prompt_rows: bool = False
    prompt_column: int = 0
    token_ids: Tensor | None = None
    window: tuple[int, int] = (0, 0)

    @property
    def head_stride(self) -> int:
        return 0 if self.data is None else self.data.stride(0)

    @property
    def bits(self) -> int:
        return 0 if self.data is None else self.data.element_size() * 8

    @property
    def row_stride(self) -> int:
        return self.data.stride(1) if self.data is not None and self.kind == TILE.value else 0


def _only_shifts_exponents(scale: float) -> bool:
    """Whether 16-bit queries times `scale` keep all their bits: a power of two, near enough to 1 for fp16."""
    return 2**-4 <= scale <= 1 and math.frexp(scale)[0] == 0.5


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _blocks(config: Config | ForwardConfig, arch: str) -> dict[str, int]:
    limit = config.max_registers if isinstance(config, ForwardConfig) else 0
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **({"maxnreg": limit} if limit else {}),
        **compiler_options(arch),
    }


def _problem(
    qkv: Tensor,
    prompts: Tensor | None,
    ranges: Tensor | None,
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
) -> _Problem:
    batch, tokens, width = qkv.shape
    pooled = ranges is not None and prompts is not None
    length = 0 if prompts is None else max_prompt_length if pooled else prompts.shape[-2]
    # The stride of a dimension of one element may be anything: take the one it would have.
    stride_n = qkv.stride(1) if tokens > 1 else width
    stride_pb = stride_p = 0
    if prompts is not None:
        stride_pb = prompts.stride(0) if prompts.ndim == 3 else 0
        stride_p = prompts.stride(-2) if prompts.shape[-2] > 1 else prompts.shape[-1]
    element = qkv.element_size()
    steps = [qkv.data_ptr(), stride_n * element, qkv.stride(0) * element, width // 3 // num_heads * element]
    if prompts is not None:
        steps += [prompts.data_ptr(), stride_pb * element, stride_p * element]
    reach = max(tokens * stride_n, (0 if prompts is None else prompts.shape[-2]) * stride_p)
    exact = qkv.dtype == torch.float64
    return _Problem(
        batch=batch,
        tokens=tokens,
        prompts=length,
        heads=num_heads,
        head_dim=width // (3 * num_heads),
        rows=tokens + (length if prompt_queries else 0),
        pool_size=prompts.shape[0] if pooled and prompts is not None else 0,
        pooled=pooled,
        prompt_queries=prompt_queries and length > 0,
        image_strides=(qkv.stride(0), stride_pb),
        row_strides=(stride_n, stride_p),
        aligned=all(step % 16 == 0 for step in steps),
        int64=reach >= 2**31,
        accumulator=torch.float64 if exact else torch.float32,
        precision="ieee",
        scale=scale,
        arch=architecture(qkv.device),
        dtype_bits=element * 8,
    )


def _prepare_bias(
    problem: _Problem, bias: Tensor | None, token_ids: Tensor | None, window: Sequence[int], dtype: torch.dtype
) -> _Bias:
    if bias is None:
        return _Bias()
    n = problem.tokens
    width = _round_up(n, ROW_ALIGNMENT)
    if window:
        # 16-bit kernels hold in fp16 what is fp16 already; other types could overflow it, and fp32 holds them all.
        half = dtype in (torch.float16, torch.bfloat16)
        tile_dtype = dtype if not half else torch.float16 if bias.dtype == torch.float16 else torch.float32
        if fits_tile(problem.heads, n, tile_dtype.itemsize):
            return _Bias(_expand_table(bias, token_ids, window, problem, width, tile_dtype), TILE.value)
        # One zero more, for pairs without a position.
        table = bias.new_zeros(problem.heads, bias.shape[0] + 1, dtype=problem.accumulator)
        table[:, :-1] = bias.t()
        return _Bias(table, TABLE.value, token_ids=token_ids, window=(window[0], window[1]))
    if bias.dtype == torch.float64 and dtype != torch.float64:
        bias = bias.float()
    heads, rows, columns = bias.shape
    if columns == n and _has_aligned_rows(bias, width):
        return _Bias(bias.as_strided((heads, rows, width), bias.stride()), TILE.value)
    extra = columns - n
    data = bias.new_empty(heads, rows, width + _round_up(extra, ROW_ALIGNMENT))
    data[..., :n] = bias[..., :n]
    data[..., width : width + extra] = bias[..., n:]
    return _Bias(data, TILE.value, prompt_columns=extra > 0, prompt_rows=rows > n, prompt_column=width)


def _has_aligned_rows(bias: Tensor, width: int) -> bool:
    """Whether rows can be read in place, `width` elements from 16-byte boundaries on, without leaving the buffer."""
    heads, rows, _ = bias.shape
    stride_h, stride_n, unit = bias.stride()
    end = bias.storage_offset() + (heads - 1) * stride_h + (rows - 1) * stride_n + width
    return bool(
        unit == 1
        and stride_n % ROW_ALIGNMENT == 0
        and stride_h % ROW_ALIGNMENT == 0
        and bias.data_ptr() % 16 == 0
        and end * bias.element_size() <= bias.untyped_storage().nbytes()
    )


def _expand_table(
    table: Tensor, token_ids: Tensor | None, window: Sequence[int], problem: _Problem, width: int, dtype: torch.dtype
) -> Tensor:
    tile = torch.empty(problem.heads, problem.tokens, width, dtype=dtype, device=table.device)
    block_m, block_n = (64, 64) if interpreting() else (16, 64)
    grid = (triton.cdiv(problem.tokens, block_m), triton.cdiv(width, block_n), problem.heads)
    _expand_table_kernel[grid](
        table,
        token_ids,
        tile,
        problem.tokens,
        width,
        table.stride(0),
        table.stride(1),
        HAS_IDS=token_ids is not None,
        HEIGHT=window[0],
        WIDTH=window[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return tile


def forward(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    token_ids, ranges = _packed(token_ids), _packed(ranges)
    if prompts is not None and prompts.shape[-2] == 0:
        prompts = ranges = None
    problem = _problem(qkv, prompts, ranges, num_heads, prompt_queries, max_prompt_length, scale)
    batch, heads, rows = problem.batch, num_heads, problem.rows
    out = qkv.new_empty(batch, rows, heads * problem.head_dim)
    lse = qkv.new_empty((batch, heads, rows) if with_lse else (0,), dtype=problem.accumulator)
    if batch == 0 or rows == 0:
        return out, lse
    source = _prepare_bias(problem, bias, token_ids, window, qkv.dtype)
    constants = problem.constants(source)
    config = forward_config(
        *problem.target,
        problem.tokens,
        problem.tokens + problem.prompts,
        source.bits,
        constants["QUERY_SCALE"] != 1,
        problem.pooled,
        problem.prompt_queries,
        interpreted=interpreting(),
    )
    unrolled = config.keys_resident or config.scores_resident
    row_blocks = 1 if config.keys_resident else triton.cdiv(rows, config.block_m)
    _forward_kernel[(row_blocks * batch * heads,)](
        qkv,
        prompts,
        ranges,
        source.data,
        source.token_ids,
        out,
        lse,
        problem.tokens,
        problem.prompts,
        problem.pool_size,
        source.prompt_column,
        *problem.image_strides,
        source.head_stride,
        WITH_LSE=with_lse,
        KEYS_RESIDENT=config.keys_resident,
        SCORES_RESIDENT=config.scores_resident,
        HEADS_FIRST=config.heads_first,
        **constants,
        **problem.key_parts(config.block_n, unrolled),
        **_blocks(config, problem.arch),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    token_ids, ranges = _packed(token_ids), _packed(ranges)
    used = None if prompts is None or prompts.shape[-2] == 0 else prompts
    problem = _problem(qkv, used, None if used is None else ranges, num_heads, prompt_queries, max_prompt_length, scale)
    dqkv = dprompts = dbias = None
    if problem.batch == 0 or problem.rows == 0:
        dqkv, dprompts, dbias = (_zeros(t) if needed else None for t, needed in zip((qkv, prompts, bias), needs))
        return dqkv, dprompts, dbias
    wants_prompts = needs[1] and used is not None
    if needs[0] or needs[2] or wants_prompts:
        source = _prepare_bias(problem, bias, token_ids, window, qkv.dtype)
        run = _Backward(problem, qkv, used, ranges, source, grad_out.contiguous(), grad_lse, out, lse)
        dqkv, dprompts, dbias = run(needs[0], wants_prompts, bias if needs[2] else None, token_ids, window)
    if needs[1] and used is None:
        dprompts = _zeros(prompts)
    return dqkv, dprompts, dbias


def _packed(t: Tensor | None) -> Tensor | None:
    """Ids and ranges one after the other, as kernels read them; expanded and transposed ones are copied."""
    return None if t is None else t.contiguous()


def _zeros(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device)


class _Backward:
    """One backward call: buffers of its kernels and the order in which they run."""

    def __init__(
        self,
        problem: _Problem,
        qkv: Tensor,
        prompts: Tensor | None,
        ranges: Tensor | None,
        bias: _Bias,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        self.problem, self.qkv, self.prompts, self.ranges, self.bias = problem, qkv, prompts, ranges, bias
        self.grad_out, self.out, self.lse = grad_out, out, lse
        # Kernels get a pointer they may add offsets to whether there is a gradient of lse or not.
        self.grad_lse = lse if grad_lse is None else grad_lse.contiguous()
        self.has_dlse = grad_lse is not None
        self.constants = problem.constants(bias)

    def __call__(
        self,
        wants_qkv: bool,
        wants_prompts: bool,
        bias: Tensor | None,
        token_ids: Tensor | None,
        window: Sequence[int],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of qkv, of prompts and of `bias`, which is None when it has no gradient."""
        problem = self.problem
        wants_bias = bias is not None
        # The query kernels store delta for the others. If only prompts are learned no query kernel of tokens runs, and
        # the prompts' own kernel computes delta as it goes; in the cases left delta takes a pass of its own.
        fuse_delta = wants_prompts and not wants_qkv and not wants_bias
        stored = wants_qkv and (wants_prompts or not problem.prompt_queries)
        delta = self.lse if fuse_delta and not problem.prompt_queries else torch.empty_like(self.lse)
        if not fuse_delta and not stored:
            self._delta(delta)

        width = problem.heads * problem.head_dim
        dqkv = self.qkv.new_empty(self.qkv.shape) if wants_qkv else None
        partial, images = self._prompt_partials() if wants_prompts else (None, 1)
        if dqkv is not None:
            self._queries(dqkv, delta, problem.tokens, problem.batch, 1, of_prompts=False)
        if partial is not None and problem.prompt_queries:
            self._queries(partial, delta, problem.prompts, len(partial), images, of_prompts=True)
        if dqkv is not None:
            self._keys(dqkv[..., width:], delta, problem.tokens, problem.batch, 1, of_prompts=False, fuse_delta=False)
        if partial is not None:
            section = partial[..., width:] if problem.prompt_queries else partial
            self._keys(section, delta, problem.prompts, len(partial), images, of_prompts=True, fuse_delta=fuse_delta)
        dprompts = None if partial is None else self._reduce_prompts(partial)
        dbias = None if bias is None else self._bias_grad(delta, bias, token_ids, window)
        return dqkv, dprompts, dbias

    def _delta(self, delta: Tensor) -> None:
        problem = self.problem
        block = 16 if interpreting() else 64
        _delta_kernel[(triton.cdiv(problem.rows, block) * problem.batch * problem.heads,)](
            self.out,
            self.grad_out,
            self.grad_lse,
            delta,
            problem.rows,
            HAS_DLSE=self.has_dlse,
            BLOCK_M=block,
            num_warps=4,
            **{name: self.constants[name] for name in ("H", "D", "DP", "ACC")},
        )

    def _queries(self, grad: Tensor, delta: Tensor, rows: int, chunks: int, images: int, *, of_prompts: bool) -> None:
        problem = self.problem
        config = query_grad_config(
            *problem.target, problem.tokens, prompts_attend=problem.prompt_queries, interpreted=interpreting()
        )
        _query_grad_kernel[(triton.cdiv(rows, config.block_m) * chunks * problem.heads,)](
            self.qkv,
            self.prompts,
            self.ranges,
            self.bias.data,
            self.bias.token_ids,
            self.out,
            self.grad_out,
            self.lse,
            self.grad_lse,
            delta,
            grad,
            problem.batch,
            problem.tokens,
            problem.prompts,
            problem.pool_size,
            self.bias.prompt_column,
            images,
            *problem.image_strides,
            self.bias.head_stride,
            OF_PROMPTS=of_prompts,
            HAS_DLSE=self.has_dlse,
            GRAD_SCALE=problem.scale,
            **self.constants,
            **problem.key_parts(config.block_n),
            **_blocks(config, problem.arch),
        )

    def _keys(
        self, grad: Tensor, delta: Tensor, keys: int, chunks: int, images: int, *, of_prompts: bool, fuse_delta: bool
    ) -> None:
        problem = self.problem
        gathered = self.bias.kind == TABLE.value and not of_prompts
        config = key_grad_config(*problem.target, keys, gathered=gathered, interpreted=interpreting())
        _key_grad_kernel[(triton.cdiv(keys, config.block_n) * chunks * problem.heads,)](
            self.qkv,
            self.prompts,
            self.ranges,
            self.bias.data,
            self.bias.token_ids,
            self.out,
            self.grad_out,
            self.lse,
            self.grad_lse,
            delta,
            grad,
            problem.batch,
            problem.tokens,
            problem.prompts,
            problem.pool_size,
            self.bias.prompt_column,
            images,
            grad.stride(-2),
            *problem.image_strides,
            self.bias.head_stride,
            OF_PROMPTS=of_prompts,
            HAS_DLSE=self.has_dlse,
            FUSE_DELTA=fuse_delta,
            GRAD_SCALE=problem.scale,
            **self.constants,
            **_blocks(config, problem.arch),
        )

    def _prompt_partials(self) -> tuple[Tensor, int]:
        """(chunks, P, 2*H*D or 3*H*D) sums over so many images each; one image each unless prompts are shared."""
        problem = self.problem
        assert self.prompts is not None
        images = 1
        if not problem.pooled and self.prompts.ndim == 2:
            config = key_grad_config(*problem.target, problem.prompts, interpreted=interpreting())
            blocks = triton.cdiv(problem.prompts, config.block_n)
            images = images_per_program(problem.batch, problem.heads * blocks)
        chunks = triton.cdiv(problem.batch, images)
        final = self.prompts.ndim == 3 or (chunks == 1 and not problem.pooled)
        dtype = self.prompts.dtype if final else problem.accumulator
        return self.prompts.new_empty(chunks, problem.prompts, self.prompts.shape[-1], dtype=dtype), images

    def _reduce_prompts(self, partial: Tensor) -> Tensor:
        problem = self.problem
        assert self.prompts is not None
        if self.prompts.ndim == 3:
            return partial
        if not problem.pooled:
            return partial[0] if len(partial) == 1 else partial.sum(0).to(self.prompts.dtype)
        grad = self.prompts.new_empty(self.prompts.shape)
        rows, columns = grad.shape
        _pool_grad_kernel[(triton.cdiv(rows, 16), triton.cdiv(columns, 64))](
            partial,
            self.ranges,
            grad,
            problem.batch,
            problem.prompts,
            rows,
            columns,
            ACC=self.constants["ACC"],
            BLOCK_S=16,
            BLOCK_C=64,
            num_warps=4,
        )
        return grad

    def _bias_grad(self, delta: Tensor, bias: Tensor, token_ids: Tensor | None, window: Sequence[int]) -> Tensor:
        problem = self.problem
        if not window:
            return self._dense_grad(delta, bias.shape[1], bias.shape[2], 0, problem.heads).to(bias.dtype)
        grad = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        # A few heads at a time where the dense gradient of all would be large.
        group = heads_per_table_grad(problem.heads, problem.tokens)
        for first in range(0, problem.heads, group):
            heads = min(group, problem.heads - first)
            dense = self._dense_grad(delta, problem.tokens, problem.tokens, first, heads)
            _table_grad(dense, grad, first, token_ids, window)
        return grad

    def _dense_grad(self, delta: Tensor, rows: int, columns: int, first_head: int, heads: int) -> Tensor:
        """(heads, rows, columns) in the accumulator's dtype."""
        problem = self.problem
        config = bias_grad_config(*problem.target, problem.tokens, interpreted=interpreting())
        blocks = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
        images = images_per_program(problem.batch, heads * blocks)
        chunks = triton.cdiv(problem.batch, images)
        partial = torch.empty(chunks, heads, rows, columns, dtype=problem.accumulator, device=self.qkv.device)
        names = ["H", "D", "DP", "PROMPT_QUERIES", "BIAS", "PROMPT_BIAS", "HAS_IDS", "HEIGHT", "WIDTH", "ALIGNED"]
        names += ["INDEX", "stride_n", "stride_p", "stride_tn", "QUERY_SCALE", "SCALE", "FACTOR", "ACC", "PRECISION"]
        _bias_grad_kernel[(blocks * chunks * heads,)](
            self.qkv,
            self.prompts,
            self.bias.data,
            self.bias.token_ids,
            self.grad_out,
            self.lse,
            delta,
            partial,
            problem.batch,
            problem.tokens,
            problem.prompts,
            self.bias.prompt_column,
            images,
            first_head,
            heads,
            rows,
            columns,
            *problem.image_strides,
            self.bias.head_stride,
            enable_fp_fusion=True,
            **{name: self.constants[name] for name in names},
            **_blocks(config, problem.arch),
        )
        return partial[0] if chunks == 1 else partial.sum(0)


def _table_grad(dense: Tensor, grad: Tensor, first_head: int, token_ids: Tensor | None, window: Sequence[int]) -> None:
    """Fill the columns of `grad` (R, H) from first_head on, as many as `dense` has heads."""
    heads, tokens, _ = dense.shape
    rows = grad.shape[0]
    block_m, block_n, block_r = table_grad_blocks(architecture(grad.device), interpreted=interpreting())
    _table_grad_kernel[(triton.cdiv(rows, block_r), heads)](
        dense,
        token_ids,
        grad,
        first_head,
        tokens,
        rows,
        H=grad.shape[1],
        HAS_IDS=token_ids is not None,
        HEIGHT=window[0],
        WIDTH=window[1],
        ACC=_TRITON_DTYPES[dense.dtype],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4,
    )
