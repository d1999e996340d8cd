"""The registered ops: schemas, shapes, autograd, and the branch between Triton and PyTorch.

`bias` is a dense (H, rows, columns) tensor when `window` is empty and a (R, H) table otherwise. `prompts` is prompt_kv,
or prompt_qkv when `prompt_queries`. Outputs not asked for are empty tensors, because an op cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._runtime.triton_support import device_of
from . import torch_impl


@torch.library.custom_op("vptm::prompted_attention", mutates_args=())
def prompted_attention_op(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    inputs = (qkv, prompts, bias, token_ids, ranges)
    if impl == "torch":
        return torch_impl.forward(*inputs, window, num_heads, prompt_queries, max_prompt_length, scale, with_lse)
    from . import triton_impl

    with device_of(qkv):
        return triton_impl.forward(*inputs, window, num_heads, prompt_queries, max_prompt_length, scale, with_lse)


@prompted_attention_op.register_fake
def _(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = qkv.shape
    rows = tokens + (prompts.shape[0] if prompt_queries and prompts is not None else 0)
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    known = (qkv, prompts, bias, token_ids, ranges, out, lse)
    if impl == "torch":
        grads = torch_impl.backward(
            grad_out, grad_lse, *known, window, num_heads, prompt_queries, max_prompt_length, scale, needs
        )
    else:
        from . import triton_impl

        with device_of(qkv):
            grads = triton_impl.backward(
                grad_out, grad_lse, *known, window, num_heads, prompt_queries, max_prompt_length, scale, needs
            )
    dqkv, dprompts, dbias = (qkv.new_empty(0) if grad is None else grad for grad in grads)
    return dqkv, dprompts, dbias


@prompted_attention_backward_op.register_fake
def _(
    grad_out: Tensor | None,
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(t: Tensor | None, needed: bool) -> Tensor:
        return t.new_empty(t.shape) if needed and t is not None else qkv.new_empty(0)

    return empty(qkv, needs[0]), empty(prompts, needs[1]), empty(bias, needs[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, prompts, bias, token_ids, ranges, *options, _with_lse, impl = inputs
    ctx.options, ctx.impl = options, impl
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, prompts, bias, token_ids, ranges, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, prompts, bias, token_ids, ranges, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    grads: list[Tensor | None] = [None, None, None]
    if any(needs) and (grad_out is not None or grad_lse is not None):
        inputs = (qkv, prompts, bias, token_ids, ranges, out, lse)
        found = prompted_attention_backward_op(grad_out, grad_lse, *inputs, *ctx.options, needs, ctx.impl)
        grads = [grad if needed else None for grad, needed in zip(found, needs)]
    return (*grads, *[None] * 9)


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("prompted_attention is not differentiable twice: do not pass create_graph=True through it")


prompted_attention_op.register_autograd(_backward, setup_context=_setup_context)
prompted_attention_backward_op.register_autograd(_refuse_double_backward)
