"""The same algebra with PyTorch ops: the CPU path, and the folded path of every device.

The reader is the (D, V) matrix applied to the token activations `a`: the projection, or the prototypes when these live
in token space, where the squared norm of `a` is wanted too. Matrix products take the inputs' dtype, sums are float32 or
better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._runtime.frozen_linear import frozen_linear
from .._runtime.private_torch import activation_gradients
from .._runtime.sizes import accumulator
from .activations import activate, through_activation
from .plan import choose_plan

# Logits alone are streamed in tiles of 1 MB of float32, inside the cache of one core. Activations need whole rows, and
# few slices of rows, since every slice reads the token head again: 16 MB of float32.
_TILE, _ACTIVATIONS = 512, 1 << 22
# Below so many rows the loop over tiles costs more than the logits are worth.
FEW_ROWS = 16


def plan_of(
    hidden: Tensor,
    token_weight: Tensor,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    kept_size: int,
    keeping: bool,
) -> str:
    shape = (hidden.shape[0], hidden.shape[1], token_weight.shape[0], reader.shape[0])
    return choose_plan(*shape, activation, squares, gram is not None, needs, kept_size, keeping)


def forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out = a @ reader.T (B, D), row sums of a² (B,) if wanted, nothing that Triton would save, what backward keeps."""
    exact, tokens = accumulator(hidden.dtype), token_weight.shape[0]
    out = hidden.new_empty(hidden.shape[0], reader.shape[0], dtype=exact)
    squared = hidden.new_empty(hidden.shape[0] if squares else 0, dtype=exact)
    kept = hidden.new_empty(kept_size)
    plan = plan_of(hidden, token_weight, reader, gram, activation, squares, needs, kept_size, True)
    if plan == "fold":
        fold_forward(hidden, token_weight, token_bias, reader, gram, out, squared, kept)
    elif plan == "stream" and activation == "logits" and hidden.shape[0] >= FEW_ROWS:
        _stream_logits(hidden, token_weight, token_bias, reader, out, squared)
    else:
        logits = kept[: hidden.shape[0] * tokens].view(-1, tokens) if plan == "keep" else None
        for rows in _row_slices(hidden.shape[0], tokens, plan):
            a = activations(hidden[rows], token_weight, token_bias, activation, logits)
            if a.dtype == exact:
                torch.mm(a, reader.mT, out=out[rows])
            else:
                out[rows] = a @ reader.mT
            if squares:
                torch.linalg.vector_norm(a, dim=1, dtype=exact, out=squared[rows])
        squared.square_()
    return out, squared, hidden.new_empty(0, dtype=exact), kept


def fold_forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    out: Tensor,
    squared: Tensor,
    kept: Tensor,
) -> None:
    size = reader.shape[0] * hidden.shape[1]
    folded = frozen_linear(reader, token_weight.mT)
    if kept.numel() >= size:
        kept[:size].view_as(folded).copy_(folded)
    out.copy_(hidden @ folded.mT)
    if token_bias is not None:
        out += _through_reader(token_bias.to(out.dtype), reader)
    if squared.numel():
        assert gram is not None
        torch.sum(_gram_rows(hidden, gram).square_(), 1, out=squared)


def _through_reader(bias: Tensor, reader: Tensor) -> Tensor:
    """reader @ bias by pairwise sums, in slices of rows.

    What a matrix-vector product loses in 8192 sums is the same for every image, so that gradients of a batch, in which
    other errors cancel, add it up.
    """
    out = bias.new_empty(reader.shape[0])
    for rows in _slices(reader.shape[0], (1 << 17) // max(1, reader.shape[1])):
        torch.sum(reader[rows] * bias, 1, out=out[rows])
    return out


def fold_backward(
    grad_out: Tensor,
    grad_squared: Tensor | None,
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    kept: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    grad, total = grad_out.to(hidden.dtype), grad_out.sum(0)
    dhidden = dweight = dbias = dreader = None
    if needs[0]:
        folded = kept[: reader.shape[0] * hidden.shape[1]].view(reader.shape[0], -1)
        dhidden = grad @ folded
        if grad_squared is not None and gram is not None:
            through_norm = (_gram_rows(hidden, gram) @ gram[:, :-1]) * (2 * grad_squared)[:, None]
            dhidden = (dhidden + through_norm).to(hidden.dtype)
    if needs[1] or needs[3]:
        moment = grad.mT @ hidden
        dweight = reader.mT @ moment if needs[1] else None
        dreader = frozen_linear(moment, token_weight) if needs[3] else None
        if dreader is not None and token_bias is not None:
            dreader.addr_(total.to(dreader.dtype), token_bias)
    if needs[2] and token_bias is not None:
        dbias = torch.mv(reader.mT.to(total.dtype), total).to(token_bias.dtype)
    return dhidden, dweight, dbias, dreader


def backward(
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
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, token_weight, token_bias and reader, None where not needed."""
    tokens = token_weight.shape[0]
    plan = plan_of(hidden, token_weight, reader, gram, activation, squares, needs, kept.numel(), True)
    if plan == "fold":
        inputs = (hidden, token_weight, token_bias, reader, gram)
        return fold_backward(grad_out, grad_squared, *inputs, kept, needs)

    logits = kept[: hidden.shape[0] * tokens].view(-1, tokens) if plan == "keep" else None
    dhidden = hidden.new_empty(hidden.shape) if needs[0] else None
    dweight = dbias = dreader = None
    # eager's own fused gradients, where they lose no digits to 16 bits and no norm joins in
    fused = activation_gradients.get(activation) if grad_squared is None and hidden.dtype == grad_out.dtype else None
    reader_sums = reader.sum(1, dtype=grad_out.dtype) if activation == "log_softmax" and fused is None else None
    for rows in _row_slices(hidden.shape[0], tokens, plan):
        h, grad = hidden[rows], grad_out[rows]
        low, twice = grad.to(hidden.dtype), None if grad_squared is None else 2 * grad_squared[rows, None]
        a = logits
        if a is None and (needs[3] or activation != "logits" or twice is not None):
            a = activations(h, token_weight, token_bias, activation, None)
        if needs[3] and a is not None:
            dreader = _add(dreader, low.mT @ a)
        if not (needs[0] or needs[1] or needs[2]):
            continue
        da = low @ reader
        if fused is not None and a is not None:
            da = fused(da, a, -1, a.dtype)
        elif a is not None and (activation != "logits" or twice is not None):
            # What softmax subtracts in every row, from the outputs alone: sum_v a da, or sum_v da for log-softmax.
            subtract = (grad * out[rows]).sum(1, keepdim=True)
            if reader_sums is not None:
                subtract = (grad @ reader_sums)[:, None]
            if twice is not None:
                total = a.sum(1, keepdim=True, dtype=grad.dtype) if reader_sums is not None else squared[rows, None]
                subtract += twice * total
            da = through_activation(da, a, activation, subtract, twice)
        if dhidden is not None:
            torch.mm(da, token_weight, out=dhidden[rows])
        if needs[1]:
            dweight = _add(dweight, da.mT @ h)
        if needs[2]:
            dbias = _add(dbias, da.sum(0, dtype=grad.dtype))
    dbias = None if dbias is None else dbias.to(hidden.dtype)
    return dhidden, dweight, dbias, dreader


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def activations(
    hidden: Tensor, token_weight: Tensor, token_bias: Tensor | None, activation: str, out: Tensor | None
) -> Tensor:
    """(B, V), into `out` if given."""
    if out is None:
        out = frozen_linear(hidden, token_weight, token_bias)
    elif token_bias is None:
        torch.mm(hidden, token_weight.mT, out=out)
    else:
        torch.addmm(token_bias, hidden, token_weight.mT, out=out)
    return activate(out, activation, out=out)


def _stream_logits(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    out: Tensor,
    squared: Tensor,
) -> None:
    out.zero_()
    squared.zero_()
    # One tile for all: what a loop variable still holds while the next one is made would be two.
    tile = hidden.new_empty(min(_TILE, hidden.shape[0]) * min(_TILE, token_weight.shape[0]))
    for v in _slices(token_weight.shape[0], _TILE):
        bias = None if token_bias is None else token_bias[v]
        for rows in _slices(hidden.shape[0], _TILE):
            shape = (rows.stop - rows.start, v.stop - v.start)
            t = activations(hidden[rows], token_weight[v], bias, "logits", tile[: shape[0] * shape[1]].view(shape))
            if t.dtype == out.dtype:
                out[rows].addmm_(t, reader[:, v].mT)
            else:
                out[rows] += t @ reader[:, v].mT
            if squared.numel():
                squared[rows] += torch.linalg.vector_norm(t, dim=1, dtype=out.dtype).square_()


def _gram_rows(hidden: Tensor, gram: Tensor) -> Tensor:
    return torch.addmm(gram[:, -1], hidden.to(gram.dtype), gram[:, :-1].mT)


def _row_slices(batch: int, tokens: int, plan: str) -> Iterator[slice]:
    # At least one, so that the gradients of an empty batch are zeros.
    yield from _slices(batch, batch if plan == "keep" else _ACTIVATIONS // tokens) if batch else [slice(0, 0)]


def _slices(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
