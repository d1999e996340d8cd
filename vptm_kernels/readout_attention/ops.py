"""The registered op: softmax over un-projected tokens, its shapes, autograd, and the branch between Triton and PyTorch.

`absorbed` (B, H, C) is the scaled query multiplied by the key weights, `prompt_scores` (B, H, P) that by their keys.
Outputs: mixed (B, H, C), the weighted sum of normalised tokens; the weights of the prompts (B, H, P); the sum of the
tokens' weights (B, H); and with `keep` what the backward pass needs of the softmax, weights (B, H, N+P) in PyTorch and
log-sum-exp (B, H) in Triton, which needs mean and 1/sqrt(variance + eps) of every token too (2, B, N). Outputs not
asked for are empty tensors, because an op cannot return None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._runtime.direct import direct, refuse_second_derivative
from .._runtime.sizes import accumulator
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import device_of
from . import torch_impl


@torch.library.custom_op("vptm::readout_attention", mutates_args=())
def readout_attention_op(
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mixed, prompt weights, mass, and what backward needs of the softmax and of the tokens."""
    return run_readout(x, absorbed, prompt_scores, bias, eps, keep, impl)


def run_readout(
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "torch":
        mixed, prompt_weights, mass, weights = torch_impl.forward(x, absorbed, prompt_scores, bias, eps)
        kept = weights if keep else absorbed.new_empty(0)
        # A copy, as two outputs of an op must not share memory.
        prompt_weights = prompt_weights.clone(memory_format=torch.contiguous_format)
        return mixed, prompt_weights, mass, kept, absorbed.new_empty(0)
    from . import triton_impl

    with device_of(x):
        return triton_impl.forward(x, absorbed, prompt_scores, bias, eps, keep)


@readout_attention_op.register_fake
def _(
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, _ = absorbed.shape
    tokens, prompts = x.shape[1], 0 if prompt_scores is None else prompt_scores.shape[2]
    exact = accumulator(absorbed.dtype)
    kept, moments = absorbed.new_empty(0), absorbed.new_empty(0)
    if keep and impl == "torch":
        kept = absorbed.new_empty(batch, heads, tokens + prompts)
    elif keep:
        kept, moments = absorbed.new_empty(batch, heads, dtype=exact), absorbed.new_empty(2, batch, tokens, dtype=exact)
    return (
        absorbed.new_empty(absorbed.shape),
        absorbed.new_empty(batch, heads, prompts),
        absorbed.new_empty(batch, heads),
        kept,
        moments,
    )


@torch.library.custom_op("vptm::readout_attention_backward", mutates_args=())
def readout_attention_backward_op(
    grad_mixed: Tensor,
    grad_prompt_weights: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    mixed: Tensor | None,
    kept: Tensor,
    moments: Tensor,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (grad_mixed, grad_prompt_weights, grad_mass)
    found = _run_backward(*grads, x, absorbed, prompt_scores, bias, mixed, kept, moments, eps, needs, impl)
    dx, dabsorbed, dprompt_scores, dbias = (x.new_empty(0) if grad is None else grad for grad in found)
    return dx, dabsorbed, dprompt_scores, dbias


def _run_backward(
    grad_mixed: Tensor,
    grad_prompt_weights: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    mixed: Tensor | None,
    kept: Tensor,
    moments: Tensor,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    grads = (grad_mixed, grad_prompt_weights, grad_mass)
    if impl == "torch":
        return torch_impl.backward(*grads, x, absorbed, bias, kept, eps, needs)
    from . import triton_impl

    with device_of(x):
        return triton_impl.backward(*grads, x, absorbed, prompt_scores, bias, mixed, kept, moments, needs)


@readout_attention_backward_op.register_fake
def _(
    grad_mixed: Tensor,
    grad_prompt_weights: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    mixed: Tensor | None,
    kept: Tensor,
    moments: Tensor,
    eps: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        t.new_empty(t.shape) if needed and t is not None else x.new_empty(0)
        for t, needed in zip((x, absorbed, grad_prompt_weights, bias), needs)
    )
    return first, second, third, fourth


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, absorbed, prompt_scores, bias, ctx.eps, _keep, ctx.impl = inputs
    mixed, _prompt_weights, _mass, kept, moments = output
    ctx.mark_non_differentiable(kept, moments)
    # PyTorch's path has all it needs in the weights.
    saved = (prompt_scores, mixed) if ctx.impl == "triton" else (None, None)
    ctx.save_for_backward(x, absorbed, bias, kept, moments, *saved)


def _backward(ctx: Any, grad_mixed: Tensor, grad_prompt_weights: Tensor, grad_mass: Tensor, *_: Any) -> tuple[Any, ...]:
    x, absorbed, bias, kept, moments, prompt_scores, mixed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    grads = (grad_mixed, grad_prompt_weights, grad_mass)
    known = (x, absorbed, prompt_scores, bias, mixed, kept, moments)
    # With create_graph the registered op is needed: it refuses to be differentiated.
    plain = not torch.is_grad_enabled() and nothing_traces(*grads, *known)
    run = _run_backward if plain else readout_attention_backward_op
    found = run(*grads, *known, ctx.eps, needs, ctx.impl)
    return (*(grad if needed else None for grad, needed in zip(found, needs)), None, None, None)


readout_attention_op.register_autograd(_backward, setup_context=_setup_context)
refuse_second_derivative("readout_attention", readout_attention_backward_op)

direct_readout = direct(run_readout, _setup_context, _backward)
"""`readout_attention_op` for calls that nothing traces."""


@register_flop_formula(torch.ops.vptm.readout_attention)
def _forward_flops(x: Sequence[int], absorbed: Sequence[int], *_: Any, **__: Any) -> int:
    """Scores and weighted sum: two products of (H, C) with (C, N) per image."""
    return 4 * absorbed[0] * absorbed[1] * x[1] * x[2]


@register_flop_formula(torch.ops.vptm.readout_attention_backward)
def _backward_flops(
    grad_mixed: Sequence[int],
    grad_prompt_weights: Sequence[int],
    grad_mass: Sequence[int],
    x: Sequence[int],
    absorbed: Sequence[int],
    *rest: Any,
    **__: Any,
) -> int:
    """Per product of (H, C) with (C, N): Triton computes the scores again; two products for x, one for absorbed."""
    *_, needs, impl = rest
    products = 1 + (impl == "triton") + 2 * needs[0] + needs[1]
    return 2 * products * absorbed[0] * absorbed[1] * x[1] * x[2]
