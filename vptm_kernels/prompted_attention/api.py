"""The public function: argument checks, autocast, choice of implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .._runtime.arguments import check_prompt_columns, shape_of, tensor
from .._runtime.plans import Plans, place, signature
from .._runtime.private_torch import autocasting
from .._runtime.ranges import check_ranges
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import choose, float32_precision
from .bias import RelativePositionBias, table_rows
from .ops import direct_attention, planned_attention, prompted_attention_op, run_attention, run_plan
from .rotary import Rotary, check_rotary
from .torch_impl import products_are_faster

if TYPE_CHECKING:
    from .triton_impl import Plan

Bias = Tensor | RelativePositionBias | None

# Of calls that passed the checks, by all that checks ask for; ranges are checked at every call, for their values.
_checked: Plans[Plan] = Plans()


@overload
def prompted_attention(
    qkv: Tensor,
    prompt_kv: Tensor | None = ...,
    *,
    prompt_qkv: Tensor | None = ...,
    num_heads: int,
    bias: Bias = ...,
    rotary: Rotary | None = ...,
    prompt_column_bias: Tensor | None = ...,
    prompt_ranges: Tensor | None = ...,
    max_prompt_length: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def prompted_attention(
    qkv: Tensor,
    prompt_kv: Tensor | None = ...,
    *,
    prompt_qkv: Tensor | None = ...,
    num_heads: int,
    bias: Bias = ...,
    rotary: Rotary | None = ...,
    prompt_column_bias: Tensor | None = ...,
    prompt_ranges: Tensor | None = ...,
    max_prompt_length: int | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def prompted_attention(
    qkv: Tensor,
    prompt_kv: Tensor | None = None,
    *,
    prompt_qkv: Tensor | None = None,
    num_heads: int,
    bias: Bias = None,
    rotary: Rotary | None = None,
    prompt_column_bias: Tensor | None = None,
    prompt_ranges: Tensor | None = None,
    max_prompt_length: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of image tokens to a prompt prefix and to themselves, plus a bias (VPT, arXiv 2203.12119).

    Args:
        qkv: (B, N, 3*H*D), queries, keys and values of the image tokens as `F.linear` gives them, each heads then
            channels; float16, bfloat16, float32 or float64. Any strides with a unit last one.
        prompt_kv: keys and values of the prompts, which are attended to and do not attend: (P, 2*H*D) shared by the
            batch, (B, P, 2*H*D) per image, or with `prompt_ranges` a pool (S, 2*H*D).
        prompt_qkv: (P, 3*H*D) shared by the batch, or (B, P, 3*H*D) per image: prompts that attend as well; `out` then
            has N+P rows, prompts last. Rows of one tensor may be given in two parts, which are views:
            `qkv[:, :N]` and `qkv[:, N:]`; the last P keys can then have a `prompt_column_bias`.
        num_heads: H.
        bias: added to the scaled scores, shared by the batch. Dense: (H, N, N) for pairs of tokens, prompts get zero;
            (H, N, N+P) with prompt columns last; with `prompt_qkv` also (H, N+P, N+P). A leading dimension of 1 is
            accepted. Or a `RelativePositionBias`. A dense bias on rows of a multiple of 16 elements, as
            `RelativePositionBias.dense` makes it, is read in place; others are copied once per call.
        rotary: (cos, sin), each (N, D/2), or (H, N, D/2) where heads differ: queries and keys of token n are turned by
            these angles, channel i of a head with channel i + D/2 (RoPE in halves, arXiv 2104.09864). A row that has no
            position has cos 1 and sin 0; prompts are not turned. Constants: they get no gradient. For tables of
            neighbouring channels 2i and 2i + 1 permute the rows of the query and key weights: scores do not change.
            Triton kernels of 16 bits turn what they load; in float32, beside a bias and where prompts attend a pass
            before them does.
        prompt_column_bias: (H, P), or (H, S) for a pool of S rows, floating point: added to the scaled scores of every
            query with that prompt, beside `bias`. A gate of prompts: a value of -4 leaves a prompt exp(-4) of its
            weight, -inf none.
        prompt_ranges: (B, 2) int32, start and length of every image's rows of the pool. Ranges may overlap. On the
            device of qkv, read back to be checked when it is first seen; or on the CPU, checked there and copied.
        max_prompt_length: an upper bound of the lengths in `prompt_ranges`.
        scale: factor of the scores, default `D ** -0.5`. The bias is not scaled.
        return_lse: also return the natural logarithm of the softmax denominator, float32 (float64 for float64 inputs),
            which merges attention over disjoint keys: `out = sum_i exp(lse_i - logsumexp_i(lse_i)) * out_i`.
        impl: "auto" is "triton" for GPU tensors of float16, bfloat16 or float32 with 16 <= D <= 128, else "torch". An
            explicit "triton" or "torch" never falls back.

    Returns:
        out (B, N, H*D), or (B, N+P, H*D) with `prompt_qkv`, in the dtype of `qkv`; and lse (B, H, rows) if asked.
        A row whose scores are all -inf gives zeros and lse = -inf; Triton kernels take scores below -1e29 for -inf.

    Gradients, of out and of lse, reach qkv, the prompts (summed over the images that use a row), the bias (dense or
    table) and `prompt_column_bias`. Only those asked for are computed, in a fixed order: equal inputs give bitwise
    equal gradients. There is no second derivative. Under autocast qkv and prompts are cast, biases are not. On a GPU,
    products of float32 follow `torch.get_float32_matmul_precision()` at the time of the call, as `F.linear` does: TF32
    for "high" and "medium".

    Equal to, for shared prompts::

        q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
        pk, pv = prompt_kv.view(P, 2, H, D).permute(1, 2, 0, 3).expand(B, ...)
        scores = q @ cat([k, pk], 2).mT * scale + cat([bias, zeros(H, N, P)], 2)
        scores += cat([zeros(H, 1, N), prompt_column_bias[:, None]], 2)
        out = (scores.softmax(-1) @ cat([v, pv], 2)).transpose(1, 2).flatten(2)

    With `rotary`, first::

        def turned(x):  # (B, H, N, D)
            a, b = x.chunk(2, -1)
            return cat([a * cos - b * sin, b * cos + a * sin], -1)
        q, k = turned(q), turned(k)

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.

    >>> import torch
    >>> from vptm_kernels import RelativePositionBias, prompted_attention
    >>> qkv = torch.randn(2, 26, 3 * 4 * 16)
    >>> prompts = torch.randn(10, 2 * 4 * 16, requires_grad=True)
    >>> bias = RelativePositionBias(torch.randn(9 * 9 + 3, 4), (5, 5))
    >>> out = prompted_attention(qkv, prompts, num_heads=4, bias=bias)
    >>> out.shape
    torch.Size([2, 26, 64])
    >>> out.sum().backward()
    >>> prompts.grad.shape
    torch.Size([10, 128])
    """
    if isinstance(prompt_ranges, Tensor) and isinstance(qkv, Tensor) and prompt_ranges.device != qkv.device:
        prompt_ranges = _check_ranges(qkv, prompt_kv, prompt_ranges, max_prompt_length)
    columns = prompt_column_bias
    key = _signature(
        *(qkv, prompt_kv, prompt_qkv, bias, rotary, columns, prompt_ranges),
        *(num_heads, max_prompt_length, scale, impl),
    )
    plan = None if key is None else _checked.get(key)
    if plan is not None:
        prompts = prompt_kv if prompt_qkv is None else prompt_qkv
        if prompt_ranges is not None:
            _check_ranges(qkv, prompts, prompt_ranges, max_prompt_length)
        table, _, token_ids = _parts(bias)
        cos, sin = (None, None) if rotary is None else rotary
        if torch.is_grad_enabled() and _learned(qkv, prompts, table, columns):
            out, lse = planned_attention(qkv, prompts, table, columns, token_ids, prompt_ranges, cos, sin, plan, True)
        else:
            out, lse = run_plan(qkv, prompts, table, columns, token_ids, prompt_ranges, cos, sin, plan, return_lse)
        return (out, lse) if return_lse else out

    if not tensor("qkv", qkv).is_meta and torch.is_autocast_enabled(qkv.device.type):
        dtype = torch.get_autocast_dtype(qkv.device.type)
        qkv = _autocast(qkv, dtype)
        prompt_kv = None if prompt_kv is None else _autocast(prompt_kv, dtype)
        prompt_qkv = None if prompt_qkv is None else _autocast(prompt_qkv, dtype)
    head_dim = _check_qkv(qkv, num_heads)
    cos, sin = (None, None) if rotary is None else check_rotary(rotary, qkv, num_heads)
    prompts = _check_prompts(qkv, prompt_kv, prompt_qkv, num_heads, head_dim, prompt_ranges, max_prompt_length)
    per_image_length = 0 if prompts is None else prompts.shape[-2]
    if prompt_ranges is not None:
        _check_ranges(qkv, prompts, prompt_ranges, max_prompt_length)
    if isinstance(bias, RelativePositionBias):
        _check_table(qkv, bias, num_heads)
    elif bias is not None:
        pooled = prompt_ranges is not None
        bias = _check_dense(qkv, bias, num_heads, None if pooled else per_image_length, prompt_qkv is not None)
    if columns is not None:
        beside = "prompt_kv or prompt_qkv, got neither"
        check_prompt_columns(columns, prompts, num_heads, qkv, called="qkv", beside=beside)
    if scale is None:
        scale = head_dim**-0.5
    elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    impl = choose(impl, qkv, head_dim)

    if qkv.shape[1] == 0 and prompt_qkv is not None:
        # Without tokens the prompts are the tokens, the same for every image.
        qkv = prompt_qkv.expand(qkv.shape[0], -1, -1)
        prompts = prompt_qkv = cos = sin = None
        if isinstance(bias, RelativePositionBias) or (bias is not None and bias.shape[-2] != qkv.shape[1]):
            bias = None
        if columns is not None:
            rows = columns[:, None].expand(-1, qkv.shape[1], -1)
            bias, columns = rows if bias is None else bias + rows, None
        key = None

    table, window, token_ids = _parts(bias)
    tensors = (qkv, prompts, table, columns, token_ids, prompt_ranges, cos, sin)
    options = (list(window), num_heads, prompt_qkv is not None, max_prompt_length or 0, float(scale))
    if key is not None and impl == "triton":
        from .triton_impl import plan_of

        _checked.keep(key, plan_of(*tensors, *options))
    learned = torch.is_grad_enabled() and _learned(qkv, prompts, table, columns)
    plain = nothing_traces(*tensors)
    # what is traced must not depend on the processor
    kept = impl == "triton" or (qkv.device.type == "cpu" and not (plain and products_are_faster(qkv)))
    with_lse = return_lse or (learned and kept)
    run: Callable[..., tuple[Tensor, Tensor]] = prompted_attention_op
    if plain:
        run = direct_attention if learned else run_attention
    out, lse = run(*tensors, *options, with_lse, impl)
    return (out, lse) if return_lse else out


def _parts(bias: Bias) -> tuple[Tensor | None, tuple[int, ...], Tensor | None]:
    """Dense bias or table, window of a table, and token ids."""
    if bias is None or isinstance(bias, RelativePositionBias):
        return bias or (None, (), None)
    return bias[0] if bias.ndim == 4 and bias.shape[0] == 1 else bias, (), None


def _learned(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _signature(
    qkv: Tensor,
    prompt_kv: Tensor | None,
    prompt_qkv: Tensor | None,
    bias: Bias,
    rotary: Rotary | None,
    columns: Tensor | None,
    ranges: Tensor | None,
    num_heads: int,
    max_prompt_length: int | None,
    scale: float | None,
    impl: str,
) -> Hashable:
    """What equal Triton calls have in common, and None where a call must be looked at: nothing is checked yet."""
    table, window, ids = bias if isinstance(bias, RelativePositionBias) else (bias, None, None)
    if rotary is not None and (type(rotary) is not tuple or len(rotary) != 2):
        return None
    cos, sin = (None, None) if rotary is None else rotary
    if (
        not nothing_traces(qkv, prompt_kv, prompt_qkv, table, columns, ids, ranges, cos, sin)
        or (rotary is not None and (cos is None or sin is None or cos.requires_grad or sin.requires_grad))
        or autocasting()
        or not (impl == "triton" or (impl == "auto" and qkv.is_cuda))
        or not (prompt_kv is None or prompt_qkv is None)
        or type(num_heads) is not int
        or type(scale) not in _NUMBER
        or type(max_prompt_length) not in _COUNT
        or type(window) not in _WINDOW
    ):
        return None
    return (
        signature(qkv),
        signature(prompt_kv if prompt_qkv is None else prompt_qkv),
        prompt_qkv is None,
        place(table),
        window,
        signature(columns),
        signature(ids),
        signature(ranges),
        signature(cos),
        signature(sin),
        num_heads,
        max_prompt_length,
        scale,
        float32_precision(qkv.dtype),
    )


# Types of options that tell calls apart by value; 2 and 2.0 would not.
_NUMBER, _COUNT, _WINDOW = (float, int, type(None)), (int, type(None)), (tuple, type(None))


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def _check_qkv(qkv: Tensor, num_heads: int) -> int:
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads must be a positive int, got {num_heads!r}")
    if qkv.ndim != 3 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(f"qkv must be (B, N, 3*H*D) with H = num_heads = {num_heads}, got {shape_of(qkv)}")
    if qkv.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"qkv must be float16, bfloat16, float32 or float64, got {qkv.dtype}")
    if qkv.stride(-1) != 1:
        raise ValueError(f"qkv must have a unit last stride, got strides {tuple(qkv.stride())}")
    return int(qkv.shape[-1] // (3 * num_heads))


def _check_like_qkv(name: str, t: Tensor, qkv: Tensor) -> None:
    if t.device != qkv.device:
        raise ValueError(f"{name} must be on the device of qkv, {qkv.device}, got {t.device}")
    if t.dtype != qkv.dtype:
        raise ValueError(f"{name} must have the dtype of qkv, {qkv.dtype}, got {t.dtype}")
    if t.stride(-1) != 1:
        raise ValueError(f"{name} must have a unit last stride, got strides {tuple(t.stride())}")


def _check_prompts(
    qkv: Tensor,
    prompt_kv: Tensor | None,
    prompt_qkv: Tensor | None,
    num_heads: int,
    head_dim: int,
    ranges: Tensor | None,
    max_prompt_length: int | None,
) -> Tensor | None:
    batch, width = qkv.shape[0], num_heads * head_dim
    if prompt_kv is not None and prompt_qkv is not None:
        raise ValueError("prompt_kv and prompt_qkv must not both be given: prompts attend themselves or they do not")
    if ranges is None and max_prompt_length is not None:
        raise ValueError(f"max_prompt_length must be None without prompt_ranges, got {max_prompt_length}")
    if ranges is not None and prompt_kv is None:
        raise ValueError("prompt_ranges must come with prompt_kv, the pool (S, 2*H*D), got prompt_kv = None")
    if prompt_qkv is not None:
        shape = shape_of(tensor("prompt_qkv", prompt_qkv))
        if shape[:-2] not in ((), (batch,)) or len(shape) < 2 or shape[-1] != 3 * width:
            raise ValueError(
                f"prompt_qkv must be (P, 3*H*D) or (B, P, 3*H*D) with B = {batch}, 3*H*D = {3 * width}, got {shape}"
            )
        _check_like_qkv("prompt_qkv", prompt_qkv, qkv)
        return prompt_qkv
    if prompt_kv is None:
        return None
    shapes = {"(P, 2*H*D)": prompt_kv.ndim == 2} if isinstance(prompt_kv, Tensor) else {}
    tensor("prompt_kv", prompt_kv)
    if ranges is None:
        shapes["(B, P, 2*H*D)"] = prompt_kv.ndim == 3 and prompt_kv.shape[0] == batch
    if not any(shapes.values()) or prompt_kv.shape[-1] != 2 * width:
        wanted = " or ".join(shapes)
        raise ValueError(f"prompt_kv must be {wanted} with B = {batch}, 2*H*D = {2 * width}, got {shape_of(prompt_kv)}")
    _check_like_qkv("prompt_kv", prompt_kv, qkv)
    return prompt_kv


def _check_ranges(qkv: Tensor, pool: Tensor | None, ranges: Tensor, max_prompt_length: int | None) -> Tensor:
    if qkv.ndim != 3:
        raise ValueError(f"qkv must be (B, N, 3*H*D), got {shape_of(qkv)}")
    rows = pool.shape[0] if isinstance(pool, Tensor) and pool.ndim else 0
    return check_ranges(ranges, qkv.shape[0], rows, max_prompt_length, qkv.device, "qkv")


def _check_table(qkv: Tensor, bias: RelativePositionBias, num_heads: int) -> None:
    table, window, token_ids = bias
    tokens = qkv.shape[1]
    if len(window) != 2 or not all(isinstance(side, int) and side > 0 for side in window):
        raise ValueError(f"bias.window must be two positive ints (Hp, Wp), got {window!r}")
    wanted = (table_rows(window), num_heads)
    if shape_of(tensor("bias.table", table)) != wanted or not table.is_floating_point():
        raise ValueError(
            f"bias.table must be a floating point (R, H) = {wanted} for window {tuple(window)}, "
            f"got {shape_of(table)} {table.dtype}"
        )
    if token_ids is None:
        if window[0] * window[1] + 1 != tokens:
            raise ValueError(
                f"bias.token_ids must be given unless N = Hp*Wp + 1 = {window[0] * window[1] + 1}, "
                f"got None with N = {tokens}"
            )
    elif shape_of(tensor("bias.token_ids", token_ids)) != (tokens,) or token_ids.dtype != torch.int32:
        raise ValueError(
            f"bias.token_ids must be (N,) = ({tokens},) int32, got {shape_of(token_ids)} {token_ids.dtype}"
        )
    for name, t in (("bias.table", table), ("bias.token_ids", token_ids)):
        if t is not None and t.device != qkv.device:
            raise ValueError(f"{name} must be on the device of qkv, {qkv.device}, got {t.device}")


def _check_dense(qkv: Tensor, bias: Tensor, num_heads: int, prompts: int | None, prompt_queries: bool) -> Tensor:
    tokens = qkv.shape[1]
    allowed = [(num_heads, tokens, tokens)]
    if prompts:
        allowed.append((num_heads, tokens, tokens + prompts))
        if prompt_queries:
            allowed.append((num_heads, tokens + prompts, tokens + prompts))
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or a RelativePositionBias, got {type(bias).__name__}")
    dense = bias[0] if bias.ndim == 4 and bias.shape[0] == 1 else bias
    if shape_of(dense) not in allowed or not bias.is_floating_point():
        wanted = " or ".join(map(str, allowed))
        raise ValueError(
            f"bias must be a floating point {wanted} (H, queries, keys), got {shape_of(bias)} {bias.dtype}"
        )
    if bias.device != qkv.device:
        raise ValueError(f"bias must be on the device of qkv, {qkv.device}, got {bias.device}")
    return dense
