"""Calls of the Triton kernels, planned once a signature: block sizes, constants, launches and what buffers they need.

Besides outputs and lse: the tile of a table (or its copy by heads), a copy of a dense bias on odd rows; in backward
delta (as lse), the prompts' partial sums over chunks of the batch, and the dense gradient of a bias by chunks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._runtime.launch import Launch
from .._runtime.plans import Plans, place, signature
from .._runtime.sizes import accumulator, needs_int64, next_power_of_2
from .._runtime.triton_support import architecture, dot_precision, float32_precision, interpreting
from .bias import ROW_ALIGNMENT
from .configs import (
    Config,
    ForwardConfig,
    asynchronous_tensor_cores,
    bias_grad_config,
    compiler_options,
    fits_tile,
    forward_config,
    heads_per_table_grad,
    images_per_program,
    key_grad_config,
    loops_over_tail,
    query_grad_config,
    rotary_config,
    table_grad_blocks,
    tails,
)
from .kernels_bwd import (
    prompted_attention_bias_grad_kernel,
    prompted_attention_delta_kernel,
    prompted_attention_key_grad_kernel,
    prompted_attention_pool_grad_kernel,
    prompted_attention_query_grad_kernel,
    prompted_attention_table_grad_kernel,
)
from .kernels_common import LOG2E, TABLE, TILE, Arithmetic, Bias, KeyBlocks, Layout, Window
from .kernels_fwd import prompted_attention_expand_table_kernel, prompted_attention_forward_kernel
from .kernels_rotary import prompted_attention_rotate_kernel

_TRITON_DTYPES = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Inputs = tuple[
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


def forward(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    tensors = (qkv, prompts, bias, columns, token_ids, ranges, cos, sin)
    plan = plan_of(*tensors, window, num_heads, prompt_queries, max_prompt_length, scale)
    out, lse = plan.forward(*tensors, with_lse)
    return out, qkv.new_empty(0, dtype=plan.accumulator) if lse is None else lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    needs: Sequence[bool],
) -> Grads:
    tensors = (qkv, prompts, bias, columns, token_ids, ranges, cos, sin)
    # planned by what is given here: hooks on saved tensors may give others back than forward had
    plan = plan_of(*tensors, window, num_heads, prompt_queries, max_prompt_length, scale)
    return plan.backward(grad_out, grad_lse, *tensors, out, lse, needs)


_plans: Plans[Plan] = Plans()
# Shapes of which some batch had the prompts' gradient summed over chunks.
_summed: Plans[bool] = Plans()


def plan_of(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
) -> Plan:
    """The plan of these arguments, which are not checked."""
    options = (*window, num_heads, prompt_queries, max_prompt_length, scale)
    others = (signature(t) for t in (columns, token_ids, ranges, cos, sin))
    key = (signature(qkv), signature(prompts), place(bias), *others, options, float32_precision(qkv.dtype))
    plan = _plans.get(key)
    if plan is None:
        tensors = (qkv, prompts, bias, columns, token_ids, ranges, cos, sin)
        plan = _plans.keep(key, Plan(*tensors, window, num_heads, prompt_queries, max_prompt_length, scale))
    return plan


class _BiasForm(NamedTuple):
    """The bias as kernels read it, and how the one that is given becomes it.

    A tile (H, rows, columns) on aligned rows, token columns first, prompt columns from a multiple of 16 on; or a table
    (H, R + 1) of relative positions.
    """

    kind: int = 0
    origin: str = ""  # "in place", "copied", "expanded" or "transposed"
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    head_stride: int = 0
    row_stride: int = 0
    prompt_columns: bool = False
    prompt_rows: bool = False
    prompt_column: int = 0
    window: tuple[int, int] = (0, 0)


def _fresh(kind: int, origin: str, shape: tuple[int, ...], dtype: torch.dtype, **more: Any) -> _BiasForm:
    """A bias in memory of its own."""
    rows = math.prod(shape[2:]) if kind == TILE.value else 0
    return _BiasForm(kind, origin, shape, dtype, math.prod(shape[1:]), rows, **more)


def _bias_form(bias: Tensor | None, window: Sequence[int], qkv: Tensor, heads: int) -> _BiasForm:
    if bias is None:
        return _BiasForm()
    tokens, dtype = qkv.shape[1], qkv.dtype
    width = _round_up(tokens, ROW_ALIGNMENT)
    if window:
        # 16-bit kernels hold in fp16 what is fp16 already; other types could overflow it, and fp32 holds them all.
        half = dtype in (torch.float16, torch.bfloat16)
        tile_dtype = dtype if not half else torch.float16 if bias.dtype == torch.float16 else torch.float32
        if fits_tile(heads, tokens, tile_dtype.itemsize):
            return _fresh(TILE.value, "expanded", (heads, tokens, width), tile_dtype)
        # One zero more, for pairs without a position.
        shape = (heads, bias.shape[0] + 1)
        return _fresh(TABLE.value, "transposed", shape, accumulator(dtype), window=(window[0], window[1]))
    narrowed = bias.dtype == torch.float64 and dtype != torch.float64
    heads, rows, columns = bias.shape
    extra = columns - tokens
    if extra == 0 and not narrowed and _has_aligned_rows(bias, width):
        strides = bias.stride()
        return _BiasForm(TILE.value, "in place", (heads, rows, width), bias.dtype, strides[0], strides[1])
    return _fresh(
        TILE.value,
        "copied",
        (heads, rows, width + _round_up(extra, ROW_ALIGNMENT)),
        torch.float32 if narrowed else bias.dtype,
        prompt_columns=extra > 0,
        prompt_rows=rows > tokens,
        prompt_column=width,
    )


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


def _only_shifts_exponents(scale: float) -> bool:
    """Whether 16-bit queries times `scale` keep all their bits: a power of two, near enough to 1 for fp16."""
    return 2**-4 <= scale <= 1 and math.frexp(scale)[0] == 0.5


def _arithmetic(scale: float, biased: bool, accumulator: torch.dtype, precision: str) -> Arithmetic:
    grad_scale, query_scale, factor, column_scale = scale, 1.0, LOG2E.value, 1.0
    if biased and _only_shifts_exponents(scale):
        # Queries take the scale, and the product of queries and keys starts from the bias.
        query_scale, scale = scale, 1.0
    elif not biased and scale > 0:
        # The scale joins the factor of the exponent. A negative one would turn the maximum into a minimum, and zero
        # would make NaN of masked scores.
        scale, factor, column_scale = 1.0, factor * scale, 1 / scale
    return Arithmetic(query_scale, scale, factor, column_scale, grad_scale, _TRITON_DTYPES[accumulator], precision)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _packed(t: Tensor | None) -> Tensor | None:
    """Small tensors one element after the other, as kernels read them; expanded and transposed ones are copied."""
    return None if t is None else t.contiguous()


def _angle_form(cos: Tensor | None, sin: Tensor | None, dtype: torch.dtype) -> tuple[torch.dtype | None, int, int]:
    """How kernels read cosines and sines: copied to which type (None: in place), and how far it is then from one head's
    rows to the next, 0 where heads share them, and from one row to the next."""
    if cos is None or sin is None:
        return None, 0, 0
    wide = torch.float64 in (cos.dtype, sin.dtype)
    in_place = cos.stride() == sin.stride() and cos.stride(-1) == 1 and (not wide or dtype == torch.float64)
    if in_place:
        return None, 0 if cos.ndim == 2 else cos.stride(0), cos.stride(-2)
    rows, half = cos.shape[-2:]
    return accumulator(dtype), 0 if cos.ndim == sin.ndim == 2 else rows * half, half


def _zeros(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device)


def _blocks(config: Config | ForwardConfig, arch: str) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
        **compiler_options(arch),
        "enable_fp_fusion": True,
    }


class Plan:
    """What calls of one signature share: sizes, constants, shapes of results and launches. It holds no tensor."""

    def __init__(
        self,
        qkv: Tensor,
        prompts: Tensor | None,
        bias: Tensor | None,
        columns: Tensor | None,
        token_ids: Tensor | None,
        ranges: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        window: Sequence[int],
        num_heads: int,
        prompt_queries: bool,
        max_prompt_length: int,
        scale: float,
    ) -> None:
        self.options = (list(window), num_heads, prompt_queries, max_prompt_length, scale)
        self.has_prompts = prompts is not None and prompts.shape[-2] > 0
        if not self.has_prompts:
            prompts = ranges = columns = None
        self.batch, self.tokens, width = qkv.shape
        self.heads, self.head_dim = num_heads, width // (3 * num_heads)
        self.width = width // 3
        self.pooled = ranges is not None
        # the bound of the lengths for pooled prompts
        self.prompts = 0 if prompts is None else max_prompt_length if self.pooled else prompts.shape[-2]
        self.pool_size = prompts.shape[0] if self.pooled and prompts is not None else 0
        self.per_image = prompts is not None and prompts.ndim == 3
        self.prompt_queries = prompt_queries and self.prompts > 0
        self.rows = self.tokens + (self.prompts if prompt_queries else 0)  # query rows of one image
        self.accumulator = accumulator(qkv.dtype)
        self.scale = scale
        self.arch = architecture(qkv.device)
        self.target = (self.arch, 8 * qkv.element_size(), self.head_dim)
        self.interpreted = interpreting()

        self.bias = _bias_form(bias, window, qkv, num_heads)
        self.angle_dtype, table_h, table_n = _angle_form(cos, sin, qkv.dtype)
        bias_bits = 8 * self.bias.dtype.itemsize if self.bias.kind else 0
        stride_b, stride_n, address = qkv.stride(0), qkv.stride(1), qkv.data_ptr()
        turns, self._turns = False, None
        if cos is not None and qkv.numel() > 0:
            turns, block = rotary_config(*self.target[1:], bias_bits, self.prompt_queries, interpreted=self.interpreted)
            if not turns:
                self._turns = self._turn_launches(qkv, table_h, table_n, block)
                stride_b, stride_n, address = self.tokens * width, width, 0
        # The stride of a dimension of one element may be anything: take the one it would have.
        stride_n = stride_n if self.tokens > 1 else width
        stride_pb = stride_p = 0
        if prompts is not None:
            stride_pb = prompts.stride(0) if self.per_image else 0
            stride_p = prompts.stride(-2) if prompts.shape[-2] > 1 else prompts.shape[-1]
        element = qkv.element_size()
        steps = [address, stride_n * element, stride_b * element, self.head_dim * element]
        if prompts is not None:
            steps += [prompts.data_ptr(), stride_pb * element, stride_p * element]
        self.image_strides = (stride_b, stride_pb)

        self.column_bias = columns is not None
        self.window = (window[0], window[1]) if window else (0, 0)
        gathered = self.bias.kind == TABLE.value
        reach = max(self.tokens * stride_n, (0 if prompts is None else prompts.shape[-2]) * stride_p)
        reach = max(reach, self.tokens * table_n)
        far = needs_int64(max(reach, self.rows * self.bias.row_stride))
        self.layout = Layout(
            H=self.heads,
            D=self.head_dim,
            DP=next_power_of_2(self.head_dim),
            STRIDE_N=stride_n,
            STRIDE_P=stride_p,
            ALIGNED=all(step % 16 == 0 for step in steps),
            INDEX=triton.language.int64 if far else triton.language.int32,
            HAS_PROMPTS=self.prompts > 0,
            POOL=self.pooled,
            PROMPT_QUERIES=self.prompt_queries,
            ROTARY=turns,
            TABLE_H=table_h,
            TABLE_N=table_n,
            KEYS_IN_REGISTERS=turns and not asynchronous_tensor_cores(self.arch),
        )
        self.constants: dict[str, Any] = {
            "LAYOUT": self.layout,
            "BIAS": Bias(
                KIND=self.bias.kind,
                PROMPT_COLUMNS=self.bias.prompt_columns,
                COLUMN_BIAS=self.column_bias,
                PARTIAL=self.bias.kind > 0 and self.prompt_queries and not self.bias.prompt_rows,
                STRIDE=self.bias.row_stride,
            ),
            "WINDOW": Window(*self.bias.window, gathered and token_ids is not None),
            "MATH": _arithmetic(scale, self.bias.kind > 0, self.accumulator, dot_precision(qkv.dtype, self.arch)),
        }
        self.empty = self.batch == 0 or self.rows == 0
        self._forwards = None if self.empty else self._forward_launches()
        self._expand = self._expand_launch(bias, token_ids) if self.bias.origin == "expanded" else None
        self._backwards: dict[Hashable, _Backward] = {}

    def key_blocks(self, block_n: int, unrolled: bool = False, gradient: bool = False) -> KeyBlocks:
        tail_1, tail_2 = tails(self.tokens, self.prompts, block_n, pooled=self.pooled)
        loop = tail_1 > 0 and not unrolled and loops_over_tail(self.target[1], gradient and self.layout.ROTARY)
        if loop:
            tail_1, tail_2 = 16, 0
        blocks = self.tokens // block_n, self.prompts // block_n
        token_blocks, prompt_blocks = blocks if unrolled else (min(1, n) for n in blocks)
        return KeyBlocks(block_n, tail_1, tail_2, token_blocks, prompt_blocks, loop)

    def _turn_launches(self, qkv: Tensor, table_h: int, table_n: int, block: int) -> tuple[Launch, Launch]:
        """Of queries and keys into rows of their own, and of gradients back in place."""
        half = self.head_dim // 2
        rows = self.batch * self.tokens
        constants = {
            "H": self.heads,
            "HALF": half,
            "HALF_P": next_power_of_2(half),
            "BLOCK_R": block,
            "ACC": _TRITON_DTYPES[self.accumulator],
            "num_warps": 4,
        }
        grid = (triton.cdiv(rows, block), self.heads)
        tables = (table_h, table_n)
        there = (rows, self.tokens, qkv.stride(0), qkv.stride(1), *tables)
        back = (rows, self.tokens, self.tokens * 3 * self.width, 3 * self.width, *tables)
        return (
            Launch(prompted_attention_rotate_kernel, grid, there, {**constants, "SECTIONS": 3, "BACK": False}),
            Launch(prompted_attention_rotate_kernel, grid, back, {**constants, "SECTIONS": 2, "BACK": True}),
        )

    def _forward_launches(self) -> tuple[Launch, Launch]:
        """Without lse and with it."""
        config = forward_config(
            *self.target,
            self.tokens,
            self.tokens + self.prompts,
            8 * self.bias.dtype.itemsize if self.bias.kind else 0,
            self.constants["MATH"].QUERY_SCALE != 1,
            self.pooled,
            self.prompt_queries,
            gathered=self.bias.kind == TABLE.value,
            column_bias=self.column_bias,
            rotary=self.layout.ROTARY,
            interpreted=self.interpreted,
        )
        row_blocks = 1 if config.keys_resident else triton.cdiv(self.rows, config.block_m)
        grid = (row_blocks * self.batch * self.heads,)
        sizes = (self.tokens, self.prompts, self.pool_size, self.bias.prompt_column)
        scalars = (*sizes, *self.image_strides, self.bias.head_stride)
        constants = {
            "KEYS_RESIDENT": config.keys_resident,
            "SCORES_RESIDENT": config.scores_resident,
            "HEADS_FIRST": config.heads_first,
            "KEYS": self.key_blocks(config.block_n, config.keys_resident or config.scores_resident),
            **self.constants,
            **_blocks(config, self.arch),
        }
        without, with_lse = (
            Launch(prompted_attention_forward_kernel, grid, scalars, {**constants, "WITH_LSE": x})
            for x in (False, True)
        )
        return without, with_lse

    def _expand_launch(self, table: Tensor | None, token_ids: Tensor | None) -> Launch:
        assert table is not None
        heads, tokens, columns = self.bias.shape
        block_m, block_n = (64, 64) if self.interpreted else (16, 64)
        return Launch(
            prompted_attention_expand_table_kernel,
            (triton.cdiv(tokens, block_m), triton.cdiv(columns, block_n), heads),
            (tokens, columns, *table.stride()),
            {
                "WINDOW": Window(*self.window, token_ids is not None),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "num_warps": 4,
            },
        )

    def forward(
        self,
        qkv: Tensor,
        prompts: Tensor | None,
        bias: Tensor | None,
        columns: Tensor | None,
        token_ids: Tensor | None,
        ranges: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        out = qkv.new_empty((self.batch, self.rows, self.width))
        lse = qkv.new_empty((self.batch, self.heads, self.rows), dtype=self.accumulator) if with_lse else None
        if self._forwards is not None:
            self._forwards[with_lse](*self.inputs(qkv, prompts, bias, columns, token_ids, ranges, cos, sin), out, lse)
        return out, lse

    def inputs(
        self,
        qkv: Tensor,
        prompts: Tensor | None,
        bias: Tensor | None,
        columns: Tensor | None,
        token_ids: Tensor | None,
        ranges: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Inputs:
        """qkv, prompts, ranges, bias, values of prompt columns, token ids, cosines and sines as kernels read them."""
        if not self.has_prompts:
            prompts = ranges = columns = None
        columns = _packed(columns)
        if self.angle_dtype is not None and cos is not None and sin is not None:
            cos, sin = (t.to(self.angle_dtype).contiguous() for t in torch.broadcast_tensors(cos, sin))
        if self._turns is not None:
            given, qkv = qkv, qkv.new_empty(qkv.shape)
            self._turns[0](given, cos, sin, qkv)
        if bias is None:
            return qkv, prompts, _packed(ranges), None, columns, None, cos, sin
        token_ids = _packed(token_ids)
        form = self.bias
        if form.origin == "in place":
            # the interpreter's bounds are those of a tensor, not of its storage
            data = bias.as_strided(form.shape, bias.stride()) if self.interpreted else bias
        else:
            data = bias.new_empty(form.shape, dtype=form.dtype)
            if self._expand is not None:
                self._expand(bias, token_ids, data)
            elif form.origin == "transposed":
                data[:, :-1] = bias.t()
                data[:, -1] = 0
            else:
                n, extra = self.tokens, bias.shape[2] - self.tokens
                data[..., :n] = bias[..., :n]
                data[..., form.prompt_column : form.prompt_column + extra] = bias[..., n:]
        ids = token_ids if form.kind == TABLE.value else None
        return qkv, prompts, _packed(ranges), data, columns, ids, cos, sin

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        qkv: Tensor,
        prompts: Tensor | None,
        bias: Tensor | None,
        columns: Tensor | None,
        token_ids: Tensor | None,
        ranges: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        lse: Tensor,
        needs: Sequence[bool],
    ) -> Grads:
        wants_qkv, wants_prompts, wants_bias, wants_columns = needs
        if self.empty:
            learned = zip((qkv, prompts, bias, columns), needs)
            dqkv, dprompts, dbias, dcolumns = (_zeros(t) if needed else None for t, needed in learned)
            return dqkv, dprompts, dbias, dcolumns
        dqkv = dprompts = dbias = dcolumns = None
        # that of their columns is a by-product of the prompts' gradient
        of_columns = wants_columns and self.has_prompts
        of_prompts = (wants_prompts and self.has_prompts) or of_columns
        if wants_qkv or of_prompts or wants_bias:
            grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
            # Kernels get a pointer they may add offsets to whether there is a gradient of lse or not.
            given = (out, grad_out, lse, lse if grad_lse is None else grad_lse.contiguous())
            asked = (wants_qkv, of_prompts, of_columns, wants_bias, grad_lse is None)
            key = (*asked, *(t.data_ptr() % 16 for t in given))
            run = self._backwards.get(key)
            if run is None:
                learned_bias = bias if wants_bias else None
                run = _Backward(self, wants_qkv, of_prompts, of_columns, learned_bias, token_ids, grad_lse is not None)
                self._backwards[key] = run
            inputs = self.inputs(qkv, prompts, bias, columns, token_ids, ranges, cos, sin)
            dqkv, dprompts, dbias, dcolumns = run(inputs, given, bias, columns, token_ids)
            if self._turns is not None and dqkv is not None:
                self._turns[1](dqkv, *inputs[-2:], dqkv)
        if not self.has_prompts:
            dprompts, dcolumns = _zeros(prompts), _zeros(columns)
        return dqkv, dprompts if wants_prompts else None, dbias, dcolumns if wants_columns else None


_BiasLaunches = tuple[tuple[int, ...], Launch, Launch | None]


class _Backward:
    """One backward call of a plan: which kernels run, in which order, into which buffers."""

    def __init__(
        self,
        plan: Plan,
        wants_qkv: bool,
        wants_prompts: bool,
        wants_columns: bool,
        bias: Tensor | None,
        token_ids: Tensor | None,
        has_dlse: bool,
    ) -> None:
        """bias: None when it has no gradient."""
        self.plan, self.wants_qkv, self.wants_prompts = plan, wants_qkv, wants_prompts
        self.wants_columns = wants_columns
        # The query kernels store delta for the others. If only prompts are learned no query kernel of tokens runs, and
        # the prompts' own kernel computes delta as it goes; in the cases left delta takes a pass of its own.
        self.fuse_delta = wants_prompts and not wants_qkv and bias is None
        self.needs_delta = not self.fuse_delta or plan.prompt_queries
        stored = wants_qkv and (wants_prompts or not plan.prompt_queries)
        self._delta = None if self.fuse_delta or stored else self._delta_launch(has_dlse)
        self._of_qkv: tuple[Launch, Launch] | None = None
        self._of_prompts: tuple[Launch | None, Launch] | None = None
        if wants_qkv:
            launch = (plan.tokens, plan.batch, 1, has_dlse)
            queries = self._queries(*launch, of_prompts=False)
            self._of_qkv = (queries, self._keys(*launch, row=3 * plan.width, of_prompts=False))
        if wants_prompts:
            images = self._images_per_sum()
            self.chunks = triton.cdiv(plan.batch, images)
            # One chunk needs no sum, unless larger batches have compiled the kernel for one: none is compiled for the
            # last image of an epoch. The bits are the same.
            shape = (*plan.target, plan.tokens, plan.prompts, plan.heads, plan.prompt_queries)
            self.sums = plan.pooled or self.chunks > 1 or _summed.get(shape) is not None
            if self.chunks > 1:
                _summed.keep(shape, True)
            launch = (plan.prompts, self.chunks, images, has_dlse)
            row = (3 if plan.prompt_queries else 2) * plan.width
            self._of_prompts = (
                self._queries(*launch, of_prompts=True) if plan.prompt_queries else None,
                self._keys(*launch, row=row, of_prompts=True),
            )
            self._pool = self._pool_launch(row) if plan.pooled else None
            self._pool_columns = self._pool_launch(plan.heads) if plan.pooled and wants_columns else None
        self._of_bias = [] if bias is None else self._bias_launches(bias, token_ids)

    def __call__(
        self,
        inputs: Inputs,
        given: tuple[Tensor, Tensor, Tensor, Tensor],
        bias: Tensor | None,
        columns: Tensor | None,
        token_ids: Tensor | None,
    ) -> Grads:
        """inputs: `Plan.inputs`; given: out, its gradient, lse and its gradient (or lse again)."""
        (qkv, prompts, ranges, data, values, ids, cos, sin), (out, grad_out, lse, grad_lse) = inputs, given
        width = self.plan.width
        delta = torch.empty_like(lse) if self.needs_delta else lse
        if self._delta is not None:
            self._delta(out, grad_out, grad_lse, delta)
        common = (*inputs, *given, delta)
        dqkv = partial = dprompts = dcolumns = None
        if self._of_qkv is not None:
            dqkv = qkv.new_empty(qkv.shape)
            self._of_qkv[0](*common, dqkv)
        if self._of_prompts is not None:
            assert prompts is not None
            partial = self._partial_sums(prompts)
            if self._of_prompts[0] is not None:
                self._of_prompts[0](*common, partial)
        if self._of_qkv is not None and dqkv is not None:
            self._of_qkv[1](*common, dqkv.narrow(2, width, 2 * width), None)  # indexing takes twice as long
        if self._of_prompts is not None and partial is not None and prompts is not None:
            of_columns = self._partial_columns(prompts) if self.wants_columns else None
            self._of_prompts[1](*common, partial[..., width:] if self.plan.prompt_queries else partial, of_columns)
            dprompts = self._sum_prompts(partial, prompts, ranges)
            if of_columns is not None and columns is not None:
                dcolumns = self._sum_columns(of_columns, columns, ranges)
        dbias = self._bias_grad((qkv, prompts, data, values, ids, cos, sin, grad_out, lse, delta), bias, token_ids)
        return dqkv, dprompts, dbias, dcolumns

    def _delta_launch(self, has_dlse: bool) -> Launch:
        plan, block = self.plan, 16 if self.plan.interpreted else 64
        acc = plan.constants["MATH"].ACC
        constants = {"LAYOUT": plan.layout, "BLOCK_M": block, "HAS_DLSE": has_dlse, "ACC": acc, "num_warps": 4}
        grid = (triton.cdiv(plan.rows, block) * plan.batch * plan.heads,)
        return Launch(prompted_attention_delta_kernel, grid, (plan.rows,), constants)

    def _scalars(self, images: int, *row: int) -> tuple[int, ...]:
        plan = self.plan
        sizes = (plan.batch, plan.tokens, plan.prompts, plan.pool_size, plan.bias.prompt_column)
        return (*sizes, images, *row, *plan.image_strides, plan.bias.head_stride)

    def _queries(self, rows: int, chunks: int, images: int, has_dlse: bool, *, of_prompts: bool) -> Launch:
        plan = self.plan
        config = query_grad_config(
            *plan.target,
            plan.tokens,
            prompts_attend=plan.prompt_queries,
            prompt_columns=plan.bias.prompt_columns,
            column_bias=plan.column_bias,
            bias_bits=8 * plan.bias.dtype.itemsize if plan.bias.kind else 0,
            rotary=plan.layout.ROTARY,
            interpreted=plan.interpreted,
        )
        constants = {
            "OF_PROMPTS": of_prompts,
            "HAS_DLSE": has_dlse,
            "KEYS": plan.key_blocks(config.block_n, gradient=True),
            **plan.constants,
            **_blocks(config, plan.arch),
        }
        grid = (triton.cdiv(rows, config.block_m) * chunks * plan.heads,)
        return Launch(prompted_attention_query_grad_kernel, grid, self._scalars(images), constants)

    def _keys(self, keys: int, chunks: int, images: int, has_dlse: bool, *, row: int, of_prompts: bool) -> Launch:
        """row: elements from one row of the gradient to the next."""
        plan = self.plan
        gathered = plan.bias.kind == TABLE.value and not of_prompts
        config = key_grad_config(
            *plan.target,
            keys,
            of_prompts=of_prompts,
            prompts_attend=plan.prompt_queries,
            column_grad=of_prompts and self.wants_columns,
            gathered=gathered,
            rotary=plan.layout.ROTARY,
            interpreted=plan.interpreted,
        )
        constants = {
            "OF_PROMPTS": of_prompts,
            "HAS_DLSE": has_dlse,
            "FUSE_DELTA": of_prompts and self.fuse_delta,
            "COLUMN_GRAD": of_prompts and self.wants_columns,
            "BLOCK_N": config.block_n,
            **plan.constants,
            **_blocks(config, plan.arch),
        }
        grid = (triton.cdiv(keys, config.block_n) * chunks * plan.heads,)
        return Launch(prompted_attention_key_grad_kernel, grid, self._scalars(images, row), constants)

    def _images_per_sum(self) -> int:
        """How many images one program of the prompts' gradient sums over; one unless prompts are shared."""
        plan = self.plan
        if plan.pooled or plan.per_image:
            return 1
        config = key_grad_config(*plan.target, plan.prompts, interpreted=plan.interpreted)
        return images_per_program(plan.batch, plan.heads * triton.cdiv(plan.prompts, config.block_n))

    def _partial_sums(self, prompts: Tensor) -> Tensor:
        """(chunks, P, 2*H*D or 3*H*D): one image each where prompts are not shared."""
        plan = self.plan
        dtype = plan.accumulator if self.sums and not plan.per_image else prompts.dtype
        return prompts.new_empty((self.chunks, plan.prompts, prompts.shape[-1]), dtype=dtype)

    def _pool_launch(self, columns: int) -> Launch:
        plan = self.plan
        grid = (triton.cdiv(plan.pool_size, 16), triton.cdiv(columns, 64))
        sizes = (plan.batch, plan.prompts, plan.pool_size, columns)
        constants = {"ACC": plan.constants["MATH"].ACC, "BLOCK_S": 16, "BLOCK_C": 64, "num_warps": 4}
        return Launch(prompted_attention_pool_grad_kernel, grid, sizes, constants)

    def _sum_prompts(self, partial: Tensor, prompts: Tensor, ranges: Tensor | None) -> Tensor:
        if self.plan.per_image:
            return partial
        if self._pool is None:
            summed = partial.squeeze(0) if self.chunks == 1 else partial.sum(0)
            return summed if summed.dtype == prompts.dtype else summed.to(prompts.dtype)
        grad = prompts.new_empty(prompts.shape)
        self._pool(partial, ranges, grad)
        return grad

    def _partial_columns(self, prompts: Tensor) -> Tensor:
        """(chunks, P, H), as the prompts' partial sums lie."""
        shape = (self.chunks, self.plan.prompts, self.plan.heads)
        return prompts.new_empty(shape, dtype=self.plan.accumulator)

    def _sum_columns(self, partial: Tensor, columns: Tensor, ranges: Tensor | None) -> Tensor:
        """(H, P), or (H, S) for a pool of S rows."""
        if self._pool_columns is None:
            return partial.sum(0).T.contiguous().to(columns.dtype)
        grad = columns.new_empty(columns.shape[::-1])
        self._pool_columns(partial, ranges, grad)
        return grad.T.contiguous()

    def _bias_launches(self, bias: Tensor, token_ids: Tensor | None) -> list[_BiasLaunches]:
        """Shape of the partial sums, launch and, of a table, the launch that fills its columns: by groups of heads."""
        plan = self.plan
        if not plan.options[0]:
            shape, launch = self._dense_launch(bias.shape[1], bias.shape[2], 0, plan.heads)
            return [(shape, launch, None)]
        # A few heads at a time where the dense gradient of all would be large.
        group = heads_per_table_grad(plan.heads, plan.tokens)
        launches: list[_BiasLaunches] = []
        for first in range(0, plan.heads, group):
            heads = min(group, plan.heads - first)
            shape, launch = self._dense_launch(plan.tokens, plan.tokens, first, heads)
            launches.append((shape, launch, self._table_launch(bias.shape[0], first, heads, token_ids is not None)))
        return launches

    def _dense_launch(self, rows: int, columns: int, first_head: int, heads: int) -> tuple[tuple[int, ...], Launch]:
        """(chunks, heads, rows, columns) partial sums in the accumulator's dtype."""
        plan = self.plan
        config = bias_grad_config(*plan.target, plan.tokens, interpreted=plan.interpreted)
        blocks = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
        images = images_per_program(plan.batch, heads * blocks)
        chunks = triton.cdiv(plan.batch, images)
        scalars = (
            *(plan.batch, plan.tokens, plan.prompts, plan.bias.prompt_column, images, first_head, heads, rows, columns),
            *(*plan.image_strides, plan.bias.head_stride),
        )
        constants = plan.constants | {"BLOCK_N": config.block_n} | _blocks(config, plan.arch)
        # rows without a bias are not among those of its gradient
        constants["BIAS"] = constants["BIAS"]._replace(PARTIAL=False)
        return (chunks, heads, rows, columns), Launch(
            prompted_attention_bias_grad_kernel, (blocks * chunks * heads,), scalars, constants
        )

    def _table_launch(self, rows: int, first_head: int, heads: int, has_ids: bool) -> Launch:
        """Fills so many columns of a table's gradient (rows, H), from first_head on."""
        plan = self.plan
        block_m, block_n, block_r = table_grad_blocks(plan.arch, interpreted=plan.interpreted)
        constants = {
            "H": plan.heads,
            "WINDOW": Window(*plan.window, has_ids),
            "ACC": plan.constants["MATH"].ACC,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_R": block_r,
            "num_warps": 4,
        }
        grid = (triton.cdiv(rows, block_r), heads)
        return Launch(prompted_attention_table_grad_kernel, grid, (first_head, plan.tokens, rows), constants)

    def _bias_grad(
        self, inputs: tuple[Tensor | None, ...], bias: Tensor | None, token_ids: Tensor | None
    ) -> Tensor | None:
        grad = None
        for shape, of_scores, of_table in self._of_bias:
            assert bias is not None
            partial = bias.new_empty(shape, dtype=self.plan.accumulator)
            of_scores(*inputs, partial)
            dense = partial[0] if shape[0] == 1 else partial.sum(0)
            if of_table is None:
                return dense.to(bias.dtype)
            grad = bias.new_empty(bias.shape) if grad is None else grad
            of_table(dense, _packed(token_ids), grad)
        return grad
