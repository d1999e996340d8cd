"""The registered ops: schemas, shapes, autograd, and the branch between Triton and PyTorch.

`bias` is a dense (H, rows, columns) tensor when `window` is empty and a (R, H) table otherwise. `prompts` is prompt_kv,
or prompt_qkv when `prompt_queries`; `columns` is prompt_column_bias; `cos` and `sin` are rotary. Outputs not asked for
are empty tensors, because an op cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._runtime.direct import direct, refuse_second_derivative
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import device_of
from . import torch_impl

if TYPE_CHECKING:
    from .triton_impl import Plan


@torch.library.custom_op("vptm::prompted_attention", mutates_args=())
def prompted_attention_op(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The output, and lse where it is asked for."""
    return run_attention(
        *(qkv, prompts, bias, columns, token_ids, ranges, cos, sin, window),
        *(num_heads, prompt_queries, max_prompt_length, scale, with_lse, impl),
    )


def run_attention(*args: Any) -> tuple[Tensor, Tensor]:
    if args[-1] == "torch":
        return torch_impl.forward(*args[:-1])
    from . import triton_impl

    with device_of(args[0]):
        return triton_impl.forward(*args[:-1])


@prompted_attention_op.register_fake
def _(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    rows = tokens + (prompts.shape[-2] if prompt_queries and prompts is not None else 0)
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (
        qkv.new_empty(batch, rows, width // 3),
        qkv.new_empty((batch, num_heads, rows) if with_lse else (0,), dtype=lse_dtype),
    )


@torch.library.custom_op("vptm::prompted_attention_backward", mutates_args=())
def prompted_attention_backward_op(
    grad_out: Tensor | None,
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, prompts, bias and values of prompt columns."""
    found = _run_backward(
        *(grad_out, grad_lse, qkv, prompts, bias, columns, token_ids, ranges, cos, sin, out, lse, window),
        *(num_heads, prompt_queries, max_prompt_length, scale, needs, impl),
    )
    dqkv, dprompts, dbias, dcolumns = (qkv.new_empty(0) if grad is None else grad for grad in found)
    return dqkv, dprompts, dbias, dcolumns


def _run_backward(grad_out: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        grad_out = torch.zeros_like(args[9])  # out
    if args[-1] == "torch":
        return torch_impl.backward(grad_out, *args[:-1])
    from . import triton_impl

    with device_of(grad_out):
        return triton_impl.backward(grad_out, *args[:-1])


@prompted_attention_backward_op.register_fake
def _(
    grad_out: Tensor | None,
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else qkv.new_empty(0)

    return empty(qkv, needs[0]), empty(prompts, needs[1]), empty(bias, needs[2]), empty(columns, needs[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, prompts, bias, columns, token_ids, ranges, cos, sin, *options, _with_lse, impl = inputs
    ctx.options, ctx.impl = options, impl
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, prompts, bias, columns, token_ids, ranges, cos, sin, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, prompts, bias, columns, token_ids, ranges, cos, sin, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads: list[Tensor | None] = [None, None, None, None]
    if any(needs) and (grad_out is not None or grad_lse is not None):
        inputs = (grad_out, grad_lse, qkv, prompts, bias, columns, token_ids, ranges, cos, sin, out, lse)
        # With create_graph the registered op is needed: it refuses to be differentiated.
        plain = not torch.is_grad_enabled() and nothing_traces(*inputs)
        run = _run_backward if plain else prompted_attention_backward_op
        found = run(*inputs, *ctx.options, needs, ctx.impl)
        grads = [grad if needed else None for grad, needed in zip(found, needs)]
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 4))


prompted_attention_op.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative("prompted_attention", prompted_attention_backward_op)

direct_attention = direct(run_attention, _setup_context, _backward)
"""`prompted_attention_op` for calls that nothing traces."""


def run_plan(
    qkv: Tensor,
    prompts: Tensor | None,
    bias: Tensor | None,
    columns: Tensor | None,
    token_ids: Tensor | None,
    ranges: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    plan: Plan,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`run_attention` by Triton, for a call whose plan is known."""
    with device_of(qkv):
        return plan.forward(qkv, prompts, bias, columns, token_ids, ranges, cos, sin, with_lse)


def _setup_plan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, plan, with_lse = inputs
    _setup_context(ctx, (*tensors, *plan.options, with_lse, "triton"), output)


planned_attention = direct(run_plan, _setup_plan_context, _backward)
"""`direct_attention` for a call whose plan is known: a plan holds what it was made for."""

Shape = tuple[int, ...]


def _counts(qkv: Shape, prompts: Shape | None, ranges: Shape | None, prompt_queries: bool, longest: int) -> Shape:
    """Batch, query rows, keys, prompts and width H*D; a pool counts as if every image had the longest range."""
    batch, tokens, width = qkv
    length = 0 if prompts is None else longest if ranges is not None else prompts[-2]
    return batch, tokens + (length if prompt_queries else 0), tokens + length, length, width // 3


@register_flop_formula(torch.ops.vptm.prompted_attention)
def _forward_flops(
    qkv: Shape,
    prompts: Shape | None,
    bias: Shape | None,
    columns: Shape | None,
    token_ids: Shape | None,
    ranges: Shape | None,
    cos: Shape | None,
    sin: Shape | None,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    *_: Any,
    **__: Any,
) -> int:
    """q k^T and weights v, two FLOPs a multiply-add."""
    batch, rows, keys, _length, width = _counts(qkv, prompts, ranges, prompt_queries, max_prompt_length)
    return 4 * batch * rows * keys * width


@register_flop_formula(torch.ops.vptm.prompted_attention_backward)
def _backward_flops(
    grad_out: Shape,
    grad_lse: Shape | None,
    qkv: Shape,
    prompts: Shape | None,
    bias: Shape | None,
    columns: Shape | None,
    token_ids: Shape | None,
    ranges: Shape | None,
    cos: Shape | None,
    sin: Shape | None,
    out: Shape,
    lse: Shape,
    window: Sequence[int],
    num_heads: int,
    prompt_queries: bool,
    max_prompt_length: int,
    scale: float,
    needs: Sequence[bool],
    impl: str,
    **_: Any,
) -> int:
    """Scores again, and the gradients of weights, values, keys and queries: five products. Where prompts alone are
    asked for the kernels leave out what concerns image tokens, PyTorch does not."""
    batch, rows, keys, length, width = _counts(qkv, prompts, ranges, prompt_queries, max_prompt_length)
    if needs[0] or needs[2] or impl == "torch":
        return 10 * batch * rows * keys * width
    return 8 * batch * rows * length * width + (6 * batch * length * keys * width if prompt_queries else 0)
