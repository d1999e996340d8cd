"""The registered op: shapes, autograd, and the branch between Triton and PyTorch.

Outputs: x_new, normed, and with `keep` mean and 1/std of every row (2, rows). Outputs not asked for are empty tensors,
because an op cannot return None; in the backward pass so is the update unless gamma is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._runtime.direct import refuse_second_derivative
from .._runtime.sizes import accumulator
from .._runtime.triton_support import device_of
from . import torch_impl


@torch.library.custom_op("vptm::residual_norm", mutates_args=())
def residual_norm_op(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (x, update, gamma, row_scale, norm_weight, norm_bias)
    if impl == "torch":
        x_new, normed, moments = torch_impl.forward(*inputs, eps)
        return x_new, normed, moments if keep else moments.new_empty(0)
    from . import triton_impl

    with device_of(x):
        return triton_impl.forward(*inputs, eps, keep)


@residual_norm_op.register_fake
def _(
    x: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (2, x.numel() // x.shape[-1]) if keep else (0,)
    moments = x.new_empty(shape, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape), update.new_empty(x.shape), moments


@torch.library.custom_op("vptm::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    x_new: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    moments: Tensor,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (grad_new, grad_normed, x_new, update, gamma, row_scale, norm_weight, moments, needs)
    if impl == "torch":
        grads = torch_impl.backward(*arguments)
    else:
        from . import triton_impl

        with device_of(x_new):
            grads = triton_impl.backward(*arguments)
    exact = accumulator(x_new.dtype)
    dtypes = (x_new.dtype, update.dtype, exact, exact, exact)
    dx, dupdate, dgamma, dweight, dbias = (
        grad.to(dtype).contiguous() if grad is not None and needed else x_new.new_empty(0, dtype=dtype)
        for grad, dtype, needed in zip(grads, dtypes, needs)
    )
    return dx, dupdate, dgamma, dweight, dbias


@residual_norm_backward_op.register_fake
def _(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    x_new: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    norm_weight: Tensor | None,
    moments: Tensor,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = accumulator(x_new.dtype)
    width = x_new.shape[-1:]
    shapes = (x_new.shape, x_new.shape, width, width, width)
    dtypes = (x_new.dtype, update.dtype, exact, exact, exact)
    dx, dupdate, dgamma, dweight, dbias = (
        x_new.new_empty(shape if needed else (0,), dtype=dtype) for shape, dtype, needed in zip(shapes, dtypes, needs)
    )
    return dx, dupdate, dgamma, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, update, gamma, row_scale, norm_weight, norm_bias, _eps, _keep, ctx.impl = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, update, gamma, norm_weight, norm_bias)]
    # Without factors, and with one dtype, x and update have the same gradient.
    ctx.same = gamma is None and row_scale is None and x.dtype == update.dtype
    # The update is read for the gradient of gamma alone; elsewhere its type is enough.
    kept = update if gamma is not None and gamma.requires_grad else update.new_empty(0)
    ctx.save_for_backward(output[0], output[2], gamma, row_scale, norm_weight, kept)


def _backward(ctx: Any, grad_new: Tensor | None, grad_normed: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    x_new, moments, gamma, row_scale, norm_weight, update = ctx.saved_tensors
    asked = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    if grad_new is None and grad_normed is None:
        return (None,) * 9
    needs = [asked[0] or asked[1], False, *asked[2:]] if ctx.same else asked
    found = residual_norm_backward_op(
        grad_new, grad_normed, x_new, update, gamma, row_scale, norm_weight, moments, needs, ctx.impl
    )
    dx, dupdate, dgamma, dweight, dbias = (
        grad.to(dtype) if needed else None for grad, dtype, needed in zip(found, ctx.dtypes, needs)
    )
    if ctx.same:
        dx, dupdate = (dx if needed else None for needed in asked[:2])
    return dx, dupdate, dgamma, None, dweight, dbias, None, None, None


residual_norm_op.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative("residual_norm", residual_norm_backward_op)


@register_flop_formula([torch.ops.vptm.residual_norm, torch.ops.vptm.residual_norm_backward])
def _flops(*_: Any, **__: Any) -> int:
    """No matrix product, and PyTorch's counter counts nothing else."""
    return 0
