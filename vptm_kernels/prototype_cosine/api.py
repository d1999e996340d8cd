"""The public function: argument checks, autocast, choice of implementation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._runtime.plans import Plans, signature
from .._runtime.private_torch import autocasting
from .._runtime.sizes import accumulator
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import choose
from .activations import ACTIVATIONS, activate
from .cosine import cosine, cosine_, task_cosine
from .folding import FoldedHead
from .ops import per_task, readout, similarity
from .plan import KEEP_BYTES, can_fold, size_to_keep

# Class offsets, widest task, implementation and eps of calls that passed the checks, by all that checks ask for. Ids of
# tasks are checked at every call, for their values.
_checked: Plans[tuple[list[int], int, str, float]] = Plans()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prototype_cosine(
    hidden: Tensor,
    token_weight: Tensor | FoldedHead,
    token_bias: Tensor | None,
    prototypes: Tensor,
    *,
    projection: Tensor | None = None,
    projection_bias: Tensor | None = None,
    activation: str = "logits",
    token_gram: Tensor | None = None,
    class_offsets: Sequence[int] | None = None,
    task_ids: Tensor | None = None,
    class_ranges: Sequence[tuple[int, int]] | None = None,
    unit_prototypes: bool = False,
    eps: float = 1e-12,
    impl: str = "auto",
) -> Tensor:
    """Cosine of the predicted visual token to class prototypes (ProtoVerb, arXiv 2203.09770; VPTM, arXiv 2303.04998).

    Args:
        hidden: (B, C), float16, bfloat16, float32 or float64. Any strides with a unit last one.
        token_weight: (V, C) head of the visual tokens, or a `FoldedHead` in place of it, `token_bias`, `projection` and
            `projection_bias`: weight (d, C), or (T, d, C) with `task_ids`; `activation` must then be "logits".
        token_bias: (V,) or None.
        prototypes: (K, d); with tasks (ΣK, d), the classes of task t in rows class_offsets[t] to class_offsets[t + 1].
        projection: (d, V), or None for prototypes in token space, d = V.
        projection_bias: (d,) or None.
        activation: what is projected: "logits", "softmax" or "log_softmax" of them over V.
        token_gram: from `vptm_kernels.token_gram(token_weight, token_bias)` for a frozen head; without a projection it
            gives the norm of the logits in C² instead of V*C products.
        class_offsets: T + 1 ascending ints from 0 to ΣK. A batch can mix tasks with different class counts.
        task_ids: (B,) int32 or int64 in 0 .. T - 1, given with class_offsets. A GPU tensor is read back at every call
            to be checked, unless a graph is being traced or captured; one on the CPU is checked there and copied.
        class_ranges: start and count of every image's rows of `prototypes`, which is then a pool (S, d) of any number
            of tasks: B pairs of ints, in place of class_offsets. `task_ids` then names heads alone. What a call costs
            does not depend on how many tasks the pools hold, but without a projection the pool is scored as a whole.
        unit_prototypes: the prototypes are unit rows, or zero, as `F.normalize` leaves them, and need no division by
            their norms: what a saved adapter gives. Refused where prototypes ask for a gradient.
        eps: lower bound of both norms, as in `torch.nn.functional.normalize`; in float16 at least 2**-14, so that a
            zero vector has finite gradients.
        impl: "auto" is "triton" for GPU tensors of float16, bfloat16 or float32 unless `token_weight` asks for a
            gradient, and "torch" otherwise. An explicit "triton" or "torch" never falls back.

    Returns:
        (B, K) in the dtype of `hidden`; with tasks (B, largest K), -inf beyond the classes of a row's task.

    Gradients reach hidden, the projection, both biases, the prototypes and (torch only) token_weight; only those asked
    for are computed, in a fixed order: equal inputs give bitwise equal gradients. Under autocast all inputs are cast.
    A second derivative exists where autograd keeps the logits itself, and is refused elsewhere. On a GPU, products
    of float32 follow `torch.get_float32_matmul_precision()` at the time of the call, as `F.linear` does: TF32 for
    "high" and "medium".

    The cheapest exact way is taken, by counting multiply-adds of forward and backward (`prototype_cosine/plan.py`):
    fold projection @ token_weight once per call (logits only; Triton always, PyTorch a full training step from B = 105
    at C = 768, V = 8192, d = 128), stream over V and compute the logits again in backward, or on the PyTorch path keep
    them when they fit 16 MB. Function and gradients are the same. For inference
    fold beforehand, with `fold_head`. Triton never stores a (B, V) tensor. At B = 128 and K = 1000 the cosines are half
    a megabyte: what is saved is the V axis, not the K axis.

    Equal to::

        tokens = F.linear(hidden, token_weight, token_bias)            # or its softmax or log_softmax over V
        embedding = F.linear(tokens, projection, projection_bias)      # or tokens
        F.linear(F.normalize(embedding, dim=-1, eps=eps), F.normalize(prototypes, dim=-1, eps=eps))

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.

    >>> import torch
    >>> from vptm_kernels import prototype_cosine
    >>> hidden, head = torch.randn(2, 24), torch.nn.Linear(24, 64).requires_grad_(False)
    >>> projection, prototypes = torch.randn(8, 64, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    >>> scores = prototype_cosine(hidden, head.weight, head.bias, prototypes, projection=projection)
    >>> scores.shape
    torch.Size([2, 5])
    >>> (scores / 0.1).softmax(-1)[:, 0].sum().backward()
    >>> projection.grad.shape
    torch.Size([8, 64])
    """
    alone = class_offsets is None and task_ids is None and class_ranges is None
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor (B, C), got {type(hidden).__name__}")
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device) if hidden.dtype != torch.float64 else torch.float64
        with torch.autocast(device, enabled=False):
            return prototype_cosine(
                *(_cast(t, dtype) for t in (hidden, token_weight, token_bias, prototypes)),
                projection=_cast(projection, dtype),
                projection_bias=_cast(projection_bias, dtype),
                activation=activation,
                token_gram=token_gram,
                class_offsets=class_offsets,
                task_ids=task_ids,
                class_ranges=class_ranges,
                unit_prototypes=unit_prototypes,
                eps=eps,
                impl=impl,
            )
    folded = isinstance(token_weight, FoldedHead)
    weight: Tensor
    head_bias: Tensor | None
    weight, head_bias = token_weight if isinstance(token_weight, FoldedHead) else (token_weight, token_bias)
    learned_head = not folded and torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad
    key = None
    if alone:
        tensors = (hidden, weight, head_bias, prototypes, projection, projection_bias, token_gram)
        given = (folded, token_bias is not None, learned_head, activation, unit_prototypes, eps, impl)
        key = _signature(tensors, given)
    known = None if key is None else _checked.get(key)
    if known is None:
        if folded:
            _check_folded(token_bias, projection, projection_bias, token_gram, activation)
            names = ("token_weight.weight", weight, "token_weight.bias", head_bias)
            dim = _check_head(hidden, *names, task_ids is not None)
        else:
            dim = _check_head(hidden, "token_weight", weight, "token_bias", head_bias, False)
            dim = _check_projection(hidden, dim, projection, projection_bias)
            _check_gram(hidden, weight, projection, activation, token_gram)
        _check("prototypes", prototypes, hidden, (None, dim), "(K, d)")
        if prototypes.shape[0] < 1:
            raise ValueError(f"prototypes must have at least one row, got {tuple(prototypes.shape)}")
        if unit_prototypes and torch.is_grad_enabled() and prototypes.requires_grad:
            raise ValueError(
                "unit_prototypes must be False where prototypes ask for a gradient, which is that of their norm too"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if isinstance(eps, bool) or not isinstance(eps, (int, float)):
            raise TypeError(f"eps must be a number > 0, got {eps!r}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps!r}")
        offsets, widest = [0, prototypes.shape[0]], prototypes.shape[0]
        if class_ranges is not None:
            _check_ranges(hidden, prototypes.shape[0], class_ranges, class_offsets)
            if folded and weight.ndim == 3 and task_ids is None:
                raise ValueError(f"task_ids must be given with (T, d, C) heads, got None with {tuple(weight.shape)}")
            if task_ids is not None:
                _check_ids(hidden, task_ids, weight.shape[0] if folded and weight.ndim == 3 else 1)
        elif not alone:
            heads = weight.shape[0] if folded and weight.ndim == 3 else None
            offsets, widest = _check_tasks(hidden, prototypes.shape[0], class_offsets, task_ids, heads)
        elif weight.ndim == 3:
            raise ValueError(f"task_ids must be given with (T, d, C) heads, got None with {tuple(weight.shape)}")
        learns = "a frozen token_weight, got one with requires_grad=True" if learned_head else None
        impl = choose(impl, hidden, lacking=learns)
        eps = max(float(eps), torch.finfo(hidden.dtype).tiny)
        if key is not None:
            _checked.keep(key, (offsets, widest, impl, eps))
    else:
        offsets, widest, impl, eps = known

    if task_ids is not None and task_ids.device != hidden.device:
        task_ids = task_ids.to(hidden.device, non_blocking=True)
    class_ids = task_ids
    if class_ranges is not None:
        class_ids, offsets, widest = _tasks_of_ranges(class_ranges, hidden.device)
    if not folded and projection is None:
        scores = _token_space(hidden, weight, head_bias, prototypes, token_gram, activation, eps, impl)
        return scores if class_ids is None else _own_classes(scores, class_ids, offsets, widest)

    back = None
    if class_ids is not None and impl == "torch" and class_ids.is_cpu and nothing_traces(hidden, task_ids, class_ids):
        ids = (class_ids if task_ids is None else task_ids).tolist()
        if ids != sorted(ids):
            # rows of a task side by side: gathered once, and not for each task and product
            order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
            hidden, class_ids, back = hidden[order], class_ids[order], torch.argsort(order)
            task_ids = None if task_ids is None else task_ids[order]

    if folded and weight.ndim == 3:
        assert task_ids is not None and head_bias is not None
        embedding = per_task(hidden, weight, head_bias, task_ids, impl)
    elif folded:
        embedding = F.linear(hidden, weight, head_bias)
        embedding = embedding.to(accumulator(hidden.dtype))
    else:
        assert projection is not None
        embedding = _readout(hidden, weight, head_bias, projection, None, activation, False, impl)[0]
        if projection_bias is not None:
            embedding = embedding + projection_bias
    if impl == "torch" and class_ids is None:
        scores = _cosine(embedding, prototypes, unit_prototypes, eps)
    elif (
        class_ids is not None and unit_prototypes and impl == "torch" and _unrecorded(embedding, prototypes, class_ids)
    ):
        scores = task_cosine(embedding, prototypes, class_ids, offsets, widest, eps, unit_prototypes)
    else:
        scores = similarity(embedding, prototypes, class_ids, offsets, widest, eps, impl)
    return (scores if back is None else scores[back]).to(hidden.dtype)


def _unrecorded(*tensors: Tensor) -> bool:
    """Whether nothing traces a call and nothing in it is learned."""
    return nothing_traces(*tensors) and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def _signature(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Hashable:
    """What equal calls have in common; None where a call must be looked at, as nothing is checked yet."""
    *_, prototypes, _projection, _projection_bias, _gram = tensors
    *_, activation, unit_prototypes, eps, impl = options
    if type(activation) is not str or type(unit_prototypes) is not bool or type(eps) is not float:
        return None
    if not nothing_traces(*tensors) or autocasting() or type(impl) is not str or prototypes is None:
        return None
    asked = unit_prototypes and torch.is_grad_enabled() and prototypes.requires_grad
    return (*map(signature, tensors), options, asked)


def _cosine(embedding: Tensor, prototypes: Tensor, unit_prototypes: bool, eps: float) -> Tensor:
    """Rows against rows; overwrites the embedding where nothing is learned."""
    learned = torch.is_grad_enabled() and (embedding.requires_grad or prototypes.requires_grad)
    # cosine_ compares the batch with d, which would tie a graph to batches on one side of it.
    pure = learned or torch.compiler.is_compiling()
    return (cosine if pure else cosine_)(embedding, prototypes, eps, unit_prototypes)


def _readout(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    asked = torch.is_grad_enabled()
    needs = [asked and t is not None and t.requires_grad for t in (hidden, weight, bias, reader)]
    tokens, keeping = weight.shape[0], impl == "torch"
    if torch.compiler.is_compiling():
        # One graph serves all batch sizes: enough is kept for whichever plan the op takes when it runs.
        kept_size: int | torch.SymInt = 0
        if any(needs):
            if keeping:
                kept_size = _smaller(hidden.shape[0] * tokens, KEEP_BYTES // hidden.element_size())
            if can_fold(activation, squares, gram is not None, needs):
                kept_size = _larger(kept_size, reader.shape[0] * hidden.shape[1])
    else:
        shape = (hidden.shape[0], hidden.shape[1], tokens, reader.shape[0])
        kept_size = size_to_keep(*shape, activation, squares, gram is not None, needs, hidden.element_size(), keeping)
    if any(needs) and impl == "torch" and _autograd_keeps(hidden, tokens, kept_size):
        return _by_autograd(hidden, weight, bias, reader, activation, squares)
    out = readout(hidden, weight, bias, reader, gram, activation, squares, needs, kept_size, impl)
    return out[0], out[1]


# Torch 2.11 does not trace torch.sym_min and sym_max of ints; min and max of the symbols of an export would tie it to
# batches on one side of the bound.
def _smaller(a: int | torch.SymInt, b: int | torch.SymInt) -> int | torch.SymInt:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_min(a, b)


def _larger(a: int | torch.SymInt, b: int | torch.SymInt) -> int | torch.SymInt:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else torch.sym_max(a, b)


def _autograd_keeps(hidden: Tensor, tokens: int, kept_size: int | torch.SymInt) -> bool:
    """Whether the logits are kept, in a dtype that sums need not leave, by a call that nothing traces."""
    if not nothing_traces(hidden) or hidden.dtype != accumulator(hidden.dtype):
        return False
    return bool(kept_size == hidden.shape[0] * tokens)


def _by_autograd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reader: Tensor, activation: str, squares: bool
) -> tuple[Tensor, Tensor]:
    """The "keep" plan as autograd runs it: for one image, whose gradients take 1.6 ms on a CPU, an op of our own would
    spend 0.2 ms in Python."""
    a = activate(F.linear(hidden, weight, bias), activation)
    return a @ reader.mT, a.square().sum(1) if squares else a


def _token_space(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prototypes: Tensor,
    gram: Tensor | None,
    activation: str,
    eps: float,
    impl: str,
) -> Tensor:
    norms = torch.linalg.vector_norm(prototypes, dim=1, keepdim=True, dtype=accumulator(hidden.dtype)).clamp_min(eps)
    unit = (prototypes / norms).to(hidden.dtype)
    products, squared = _readout(hidden, weight, bias, unit, gram, activation, True, impl)
    # sqrt after the clamp, so that a zero row has gradient 0 through its norm and not 0 * inf.
    least = max(eps * eps, torch.finfo(squared.dtype).tiny)  # the square of a tiny eps is no number of this dtype
    lengths = squared.clamp_min(least).sqrt()
    return (products / lengths[:, None]).to(hidden.dtype)


def _own_classes(scores: Tensor, task_ids: Tensor, offsets: Sequence[int], widest: int) -> Tensor:
    """Columns of a row's own task from cosines to the classes of all tasks."""
    bounds = torch.tensor(offsets, device=scores.device)
    start, end = bounds[task_ids.long(), None], bounds[task_ids.long() + 1, None]
    columns = start + torch.arange(widest, device=scores.device)
    own = scores.gather(1, columns.clamp_max(scores.shape[1] - 1))
    return own.masked_fill(columns >= end, float("-inf"))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, FoldedHead):
        return FoldedHead(_cast(value.weight, dtype), _cast(value.bias, dtype))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _check(name: str, t: object, hidden: Tensor, shape: tuple[int | None, ...], words: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor {words}, got {type(t).__name__}")
    if t.dtype != hidden.dtype:
        raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {t.dtype}")
    if t.device != hidden.device:
        raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {t.device}")
    if t.ndim != len(shape) or any(want is not None and have != want for have, want in zip(t.shape, shape)):
        known = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be {words} = ({known}{',' * (len(shape) == 1)}), got {tuple(t.shape)}")
    if t.stride(-1) != 1 and t.shape[-1] > 1:
        raise ValueError(f"{name} must have a unit last stride, got strides {tuple(t.stride())}")


def _check_head(hidden: Tensor, weight_name: str, weight: object, bias_name: str, bias: object, per_task: bool) -> int:
    """Rows of the head, V or d."""
    if hidden.dtype not in _DTYPES:
        raise ValueError(f"hidden must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if hidden.ndim != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must be (B, C) with C >= 1, got {tuple(hidden.shape)}")
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(f"hidden must have a unit last stride, got strides {tuple(hidden.stride())}")
    width = hidden.shape[1]
    if per_task and isinstance(weight, Tensor) and weight.ndim == 3:
        _check(weight_name, weight, hidden, (None, None, width), "(T, d, C)")
        _check(bias_name, bias, hidden, tuple(weight.shape[:2]), "(T, d)")
        return int(weight.shape[1])
    _check(weight_name, weight, hidden, (None, width), "(rows, C)")
    assert isinstance(weight, Tensor)
    if bias is not None:
        _check(bias_name, bias, hidden, (weight.shape[0],), "(rows,)")
    if weight.shape[0] < 1:
        raise ValueError(f"{weight_name} must have at least one row, got {tuple(weight.shape)}")
    return int(weight.shape[0])


def _check_folded(
    token_bias: object, projection: object, projection_bias: object, token_gram: object, activation: str
) -> None:
    for name, value in (
        ("token_bias", token_bias),
        ("projection", projection),
        ("projection_bias", projection_bias),
        ("token_gram", token_gram),
    ):
        if value is not None:
            raise ValueError(f"{name} must be None with a FoldedHead, which contains it, got {type(value).__name__}")
    if activation != "logits":
        raise ValueError(
            f"activation must be 'logits' with a FoldedHead, which has no token logits, got {activation!r}"
        )


def _check_projection(hidden: Tensor, tokens: int, projection: Tensor | None, bias: Tensor | None) -> int:
    if projection is None:
        if bias is not None:
            raise ValueError("projection_bias must be None without a projection, got a tensor")
        return tokens
    _check("projection", projection, hidden, (None, tokens), "(d, V)")
    if projection.shape[0] < 1:
        raise ValueError(f"projection must have at least one row, got {tuple(projection.shape)}")
    if bias is not None:
        _check("projection_bias", bias, hidden, (projection.shape[0],), "(d,)")
    return int(projection.shape[0])


def _check_gram(
    hidden: Tensor, weight: Tensor, projection: Tensor | None, activation: str, gram: Tensor | None
) -> None:
    if gram is None:
        return
    if projection is not None or activation != "logits":
        raise ValueError(
            "token_gram must be None with a projection or an activation other than 'logits', "
            f"got it with activation={activation!r}"
        )
    columns = hidden.shape[1] + 1
    wanted = (min(weight.shape[0], columns), columns)
    if not isinstance(gram, Tensor) or tuple(gram.shape) != wanted or gram.dtype != accumulator(hidden.dtype):
        found = f"{tuple(gram.shape)} {gram.dtype}" if isinstance(gram, Tensor) else type(gram).__name__
        raise ValueError(
            f"token_gram must be (min(V, C + 1), C + 1) = {wanted} {accumulator(hidden.dtype)}, got {found}"
        )


def _check_tasks(
    hidden: Tensor, classes: int, class_offsets: Sequence[int] | None, task_ids: Tensor | None, heads: int | None
) -> tuple[list[int], int]:
    """The offsets as a list and the largest class count."""
    if class_offsets is None or task_ids is None:
        missing = "class_offsets" if class_offsets is None else "task_ids"
        raise ValueError(f"{missing} must be given when {'task_ids' if class_offsets is None else 'class_offsets'} is")
    if not isinstance(class_offsets, Sequence) or not all(isinstance(offset, int) for offset in class_offsets):
        raise TypeError(f"class_offsets must be a sequence of ints, got {type(class_offsets).__name__}")
    offsets = list(class_offsets)
    counts = [end - start for start, end in pairwise(offsets)]
    if not counts or offsets[0] != 0 or offsets[-1] != classes or min(counts) < 1:
        raise ValueError(f"class_offsets must ascend from 0 to the {classes} rows of prototypes, got {offsets}")
    if heads is not None and heads != len(counts):
        raise ValueError(f"class_offsets must have T + 1 = {heads + 1} entries for {heads} heads, got {len(offsets)}")
    _check_ids(hidden, task_ids, len(counts))
    return offsets, max(counts)


def _check_ids(hidden: Tensor, task_ids: Tensor, tasks: int) -> None:
    if not isinstance(task_ids, Tensor) or task_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"task_ids must be an int32 or int64 tensor (B,), got {getattr(task_ids, 'dtype', task_ids)}")
    if task_ids.ndim != 1 or task_ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"task_ids must be (B,) = ({hidden.shape[0]},), got {tuple(task_ids.shape)}")
    if task_ids.device != hidden.device and not task_ids.is_cpu:
        raise ValueError(
            f"task_ids must be on the CPU or on the device of hidden, {hidden.device}, got {task_ids.device}"
        )
    # Values cannot be read while a graph is traced or captured; kernels stay inside the prototypes whatever they are.
    if torch.compiler.is_compiling() or task_ids.is_meta or type(task_ids) is not Tensor:
        return
    if task_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if task_ids.is_cpu and min(ids := task_ids.tolist(), default=0) >= 0 and max(ids, default=0) < tasks:
        return  # a list is looked at in less time than three tensors are made
    wrong = ((task_ids < 0) | (task_ids >= tasks)).nonzero()
    if wrong.numel():
        image = int(wrong[0])
        raise ValueError(f"task_ids must lie in 0 .. {tasks - 1}, got {int(task_ids[image])} for image {image}")


def _check_ranges(
    hidden: Tensor, rows: int, class_ranges: Sequence[tuple[int, int]], class_offsets: Sequence[int] | None
) -> None:
    if class_offsets is not None:
        raise ValueError("class_offsets must be None with class_ranges, which stand in its place")
    batch = hidden.shape[0]
    if not isinstance(class_ranges, Sequence) or len(class_ranges) != batch:
        found = len(class_ranges) if isinstance(class_ranges, Sequence) else type(class_ranges).__name__
        raise ValueError(f"class_ranges must be B = {batch} pairs of ints, got {found}")
    for image, pair in enumerate(class_ranges):
        if len(pair) != 2 or not all(isinstance(value, int) for value in pair):
            raise TypeError(f"class_ranges must be pairs of ints, got {pair!r} for image {image}")
        start, count = pair
        if start < 0 or count < 1 or start + count > rows:
            raise ValueError(
                f"class_ranges must lie inside the pool of {rows} prototypes and hold at least one, "
                f"got start {start}, count {count} for image {image}"
            )


def _tasks_of_ranges(class_ranges: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, list[int], int]:
    """Ids, offsets and largest count that name the same rows: task 2i is the i-th of the ranges, odd ones are gaps."""
    places = {pair: 2 * place for place, pair in enumerate(dict.fromkeys(map(tuple, class_ranges)))}
    ids = torch.tensor([places[tuple(pair)] for pair in class_ranges], dtype=torch.int64).to(device, non_blocking=True)
    offsets = [bound for start, count in places for bound in (start, start + count)]
    return ids, offsets or [0, 0], max((count for _, count in places), default=0)
