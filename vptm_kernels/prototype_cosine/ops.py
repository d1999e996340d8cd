"""The registered ops: schemas, shapes, autograd, and the branch between Triton and PyTorch.

`token_readout` is the long one, from hidden states to reader @ activation(token logits); `task_linear` applies folded
heads task by task; `prototype_similarity` turns embeddings into cosines. Outputs that were not asked for are empty
tensors, because an op cannot return None. No output is differentiable twice.

Where nothing is traced, `readout`, `similarity` and `per_task` go past the dispatcher: its schema and alias checks take
0.4 ms of the 2 ms that a training step on one image takes on a CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._runtime.direct import direct, refuse_second_derivative
from .._runtime.sizes import accumulator
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import device_of
from . import cosine, torch_impl
from .plan import choose_plan, multiply_adds


def _triton() -> Any:
    return importlib.import_module(".triton_impl", __package__)


@torch.library.custom_op("vptm::token_readout", mutates_args=())
def token_readout_op(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    kept_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a @ reader.T (B, D), sum of a² (B,), Triton's softmax statistics (2, B), `kept_size` elements for backward."""
    return _run_readout(hidden, token_weight, token_bias, reader, gram, activation, squares, needs, kept_size, impl)


def _run_readout(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if args[-1] == "torch":
        return torch_impl.forward(*args[:-1])
    with device_of(args[0]):
        return _triton().forward(*args[:-1])


@token_readout_op.register_fake
def _(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    kept_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact, batch = accumulator(hidden.dtype), hidden.shape[0]
    return (
        hidden.new_empty(batch, reader.shape[0], dtype=exact),
        hidden.new_empty(batch if squares else 0, dtype=exact),
        hidden.new_empty((2, batch) if impl == "triton" and activation != "logits" else (0,), dtype=exact),
        hidden.new_empty(kept_size),
    )


@torch.library.custom_op("vptm::token_readout_backward", mutates_args=())
def token_readout_backward_op(
    grad_out: Tensor,
    grad_squared: Tensor | None,
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    out: Tensor,
    squared: Tensor,
    statistics: Tensor,
    kept: Tensor,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (hidden, token_weight, token_bias, reader, gram)
    args = (grad_out, grad_squared, *inputs, out, squared, statistics, kept, activation, squares, needs, impl)
    dhidden, dweight, dbias, dreader = (hidden.new_empty(0) if g is None else g for g in _run_readout_backward(*args))
    return dhidden, dweight, dbias, dreader


def _run_readout_backward(*args: Any) -> tuple[Tensor | None, ...]:
    if args[-1] == "torch":
        return torch_impl.backward(*args[:-1])
    with device_of(args[0]):
        return _triton().backward(*args[:-1])


@token_readout_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_squared: Tensor | None,
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    out: Tensor,
    squared: Tensor,
    statistics: Tensor,
    kept: Tensor,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (
        hidden.new_empty(t.shape if needed and t is not None else (0,))
        for t, needed in zip((hidden, token_weight, token_bias, reader), needs)
    )
    return first, second, third, fourth


def _readout_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.squares, ctx.needs, _kept_size, ctx.impl = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _readout_backward(ctx: Any, grad_out: Tensor | None, grad_squared: Tensor | None, *_: Any) -> tuple[Any, ...]:
    hidden, token_weight, token_bias, reader, gram, out, squared, statistics, kept = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 4
    if grad_out is None and grad_squared is not None:
        grad_out = torch.zeros_like(out)
    if grad_out is not None:
        # With create_graph the registered op is needed: it refuses to be differentiated.
        tensors = (hidden, token_weight, token_bias, reader, gram, out, squared, statistics, kept)
        plain = not torch.is_grad_enabled() and nothing_traces(grad_out, grad_squared, *tensors)
        # The plan was made for ctx.needs; what autograd asks for now can only be less.
        found = (_run_readout_backward if plain else token_readout_backward_op)(
            grad_out,
            grad_squared if ctx.squares else None,
            *tensors,
            ctx.activation,
            ctx.squares,
            ctx.needs,
            ctx.impl,
        )
        asked = (*ctx.needs_input_grad[:4],)
        grads = [grad if needed and ask else None for grad, needed, ask in zip(found, ctx.needs, asked)]
    return (*grads, *[None] * 6)


_direct_readout = direct(_run_readout, _readout_context, _readout_backward)


def readout(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_readout` by the shortest way; arguments as there."""
    if not nothing_traces(*args[:5]):
        return token_readout_op(*args)
    needs = args[-3]
    found: tuple[Tensor, Tensor, Tensor, Tensor] = (_direct_readout if any(needs) else _run_readout)(*args)
    return found


@torch.library.custom_op("vptm::task_linear", mutates_args=())
def task_linear_op(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, impl: str) -> Tensor:
    """The head of every row's task, (B, d)."""
    return _run_task_linear(hidden, weight, bias, task_ids, impl)


def _run_task_linear(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, impl: str) -> Tensor:
    out = hidden.new_empty(hidden.shape[0], weight.shape[1], dtype=accumulator(hidden.dtype))
    if impl == "torch":
        cosine.task_linear(hidden, weight, bias, task_ids, out)
        return out
    with device_of(hidden):
        _triton().task_linear(hidden, weight, bias, task_ids, out)
    return out


@task_linear_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, impl: str) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[1], dtype=accumulator(hidden.dtype))


@torch.library.custom_op("vptm::task_linear_backward", mutates_args=())
def task_linear_backward_op(
    grad: Tensor, hidden: Tensor, weight: Tensor, task_ids: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grads = cosine.task_linear_backward(grad, hidden, weight, task_ids, needs)
    dhidden, dweight, dbias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return dhidden, dweight, dbias


@task_linear_backward_op.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, task_ids: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[:2] if needs[2] else (0,)),
    )


def _task_linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, _bias, task_ids, _impl = inputs
    ctx.save_for_backward(hidden, weight, task_ids)


def _task_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    saved = ctx.saved_tensors
    plain = not torch.is_grad_enabled() and nothing_traces(grad, *saved)
    run: Callable[..., Any] = cosine.task_linear_backward if plain else task_linear_backward_op
    found = run(grad, *saved, needs)
    return (*(g if needed else None for g, needed in zip(found, needs)), None, None)


_direct_task_linear = direct(_run_task_linear, _task_linear_context, _task_linear_backward)


def per_task(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, impl: str) -> Tensor:
    """`task_linear` by the shortest way; arguments as there."""
    tensors = (hidden, weight, bias, task_ids)
    out: Tensor = _shortest(_run_task_linear, _direct_task_linear, task_linear_op, tensors)(*tensors, impl)
    return out


@torch.library.custom_op("vptm::prototype_similarity", mutates_args=())
def prototype_similarity_op(
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    widest: int,
    eps: float,
    impl: str,
) -> Tensor:
    """Cosines (B, widest) in the dtype of the embedding, -inf beyond the classes of a row's task."""
    return _run_similarity(embedding, prototypes, task_ids, offsets, widest, eps, impl)


def _run_similarity(
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    widest: int,
    eps: float,
    impl: str,
) -> Tensor:
    if impl == "torch":
        if task_ids is None:
            return cosine.cosine(embedding, prototypes, eps)
        return cosine.task_cosine(embedding, prototypes, task_ids, offsets, widest, eps)
    with device_of(embedding):
        return _triton().similarity(embedding, prototypes, task_ids, offsets, widest, eps)


@prototype_similarity_op.register_fake
def _(
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    widest: int,
    eps: float,
    impl: str,
) -> Tensor:
    return embedding.new_empty(embedding.shape[0], widest)


@torch.library.custom_op("vptm::prototype_similarity_backward", mutates_args=())
def prototype_similarity_backward_op(
    grad: Tensor,
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    dembedding, dprototypes = _run_similarity_backward(grad, embedding, prototypes, task_ids, offsets, eps, needs)
    return (
        embedding.new_empty(0) if dembedding is None else dembedding,
        prototypes.new_empty(0) if dprototypes is None else dprototypes,
    )


def _run_similarity_backward(
    grad: Tensor,
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    if task_ids is None:
        dembedding, dprototypes = cosine.cosine_backward(grad, embedding, prototypes, eps, needs)
    else:
        arguments = (grad, embedding, prototypes, task_ids, offsets, eps, needs)
        dembedding, dprototypes = cosine.task_cosine_backward(*arguments)
    return dembedding, None if dprototypes is None else dprototypes.to(prototypes.dtype)


@prototype_similarity_backward_op.register_fake
def _(
    grad: Tensor,
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor | None,
    offsets: Sequence[int],
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return (
        embedding.new_empty(embedding.shape if needs[0] else (0,)),
        prototypes.new_empty(prototypes.shape if needs[1] else (0,)),
    )


def _similarity_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    embedding, prototypes, task_ids, ctx.offsets, _widest, ctx.eps, _impl = inputs
    ctx.save_for_backward(embedding, prototypes, task_ids)


def _similarity_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    saved = ctx.saved_tensors
    plain = not torch.is_grad_enabled() and nothing_traces(grad, *saved)
    run: Callable[..., Any] = _run_similarity_backward if plain else prototype_similarity_backward_op
    found = run(grad, *saved, ctx.offsets, ctx.eps, needs)
    return (*(g if needed else None for g, needed in zip(found, needs)), *[None] * 5)


_direct_similarity = direct(_run_similarity, _similarity_context, _similarity_backward)


def similarity(embedding: Tensor, prototypes: Tensor, task_ids: Tensor | None, *options: Any) -> Tensor:
    """`prototype_similarity` by the shortest way; arguments as there."""
    tensors = (embedding, prototypes, task_ids)
    out: Tensor = _shortest(_run_similarity, _direct_similarity, prototype_similarity_op, tensors)(*tensors, *options)
    return out


def _shortest(
    run: Callable[..., Any], recorded: Callable[..., Any], op: Callable[..., Any], tensors: tuple[Tensor | None, ...]
) -> Callable[..., Any]:
    if not nothing_traces(*tensors):
        return op
    learned = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recorded if learned else run


token_readout_op.register_autograd(_readout_backward, setup_context=_readout_context)
task_linear_op.register_autograd(_task_linear_backward, setup_context=_task_linear_context)
prototype_similarity_op.register_autograd(_similarity_backward, setup_context=_similarity_context)
refuse_second_derivative(
    "prototype_cosine", token_readout_backward_op, task_linear_backward_op, prototype_similarity_backward_op
)

Shape = tuple[int, ...]


def _readout_flops(
    part: int,
    hidden: Shape,
    token_weight: Shape,
    reader: Shape,
    gram: Shape | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    kept_size: int,
    impl: str,
) -> int:
    """FLOPs of the plan these arguments run by: part 0 forward, 1 backward."""
    shape = (hidden[0], hidden[1], token_weight[0], reader[0])
    plan = choose_plan(*shape, activation, squares, gram is not None, needs, kept_size, impl == "torch")
    return 2 * multiply_adds(plan, *shape, activation, squares, needs)[part]


@register_flop_formula(torch.ops.vptm.token_readout)
def _token_readout_flops(
    hidden: Shape, token_weight: Shape, token_bias: Shape | None, reader: Shape, *args: Any, **_: Any
) -> int:
    return _readout_flops(0, hidden, token_weight, reader, *args)


@register_flop_formula(torch.ops.vptm.token_readout_backward)
def _token_readout_backward_flops(
    grad_out: Shape,
    grad_squared: Shape | None,
    hidden: Shape,
    token_weight: Shape,
    token_bias: Shape | None,
    reader: Shape,
    gram: Shape | None,
    out: Shape,
    squared: Shape,
    statistics: Shape,
    kept: Shape,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    impl: str,
    **_: Any,
) -> int:
    return _readout_flops(1, hidden, token_weight, reader, gram, activation, squares, needs, kept[0], impl)


@register_flop_formula(torch.ops.vptm.task_linear)
def _task_linear_flops(hidden: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.vptm.task_linear_backward)
def _task_linear_backward_flops(
    grad: Shape, hidden: Shape, weight: Shape, task_ids: Shape, needs: Sequence[bool], **_: Any
) -> int:
    return 2 * (needs[0] + needs[1]) * hidden[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.vptm.prototype_similarity)
def _similarity_flops(
    embedding: Shape, prototypes: Shape, task_ids: Shape | None, offsets: Sequence[int], widest: int, *_: Any, **__: Any
) -> int:
    return 2 * embedding[0] * widest * embedding[1]


@register_flop_formula(torch.ops.vptm.prototype_similarity_backward)
def _similarity_backward_flops(
    grad: Shape,
    embedding: Shape,
    prototypes: Shape,
    task_ids: Shape | None,
    offsets: Sequence[int],
    eps: float,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    return 2 * (needs[0] + needs[1]) * grad[0] * grad[1] * embedding[1]
