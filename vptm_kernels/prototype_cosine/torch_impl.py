"""The same algebra with PyTorch ops: the CPU path, and the folded path of every device.

The reader is the (D, V) matrix applied to the token activations `a`: the projection, or the prototypes when these live
in token space, where the squared norm of `a` is wanted too. Matrix products take the inputs' dtype, sums are float32 or
better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .folding import accumulator
from .plan import choose_plan

# A tile of logits is at most so large: 1 MB of float32, inside the cache of one core.
_ROWS, _TOKENS = 512, 512


def plan_of(
    hidden: Tensor,
    token_weight: Tensor,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    room: int,
    keeping: bool,
) -> str:
    shape = (hidden.shape[0], hidden.shape[1], token_weight.shape[0], reader.shape[0])
    return choose_plan(*shape, activation, squares, gram is not None, needs, room, keeping)


def forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out = a @ reader.T (B, D), the row sums of a² (B,) if wanted, softmax statistics (2, B), what backward keeps."""
    exact = accumulator(hidden.dtype)
    out = hidden.new_empty(hidden.shape[0], reader.shape[0], dtype=exact)
    squared = hidden.new_empty(hidden.shape[0] if squares else 0, dtype=exact)
    statistics = hidden.new_zeros(2, hidden.shape[0], dtype=exact)
    kept = hidden.new_empty(room)
    plan = plan_of(hidden, token_weight, reader, gram, activation, squares, needs, room, True)
    if plan == "fold":
        fold_forward(hidden, token_weight, token_bias, reader, gram, out, squared, kept)
    elif plan == "keep":
        _keep_forward(hidden, token_weight, token_bias, reader, activation, out, squared, statistics, kept)
    else:
        for rows in _slices(hidden.shape[0], _ROWS):
            parts = (out[rows], squared[rows], statistics[:, rows])
            _stream_forward(hidden[rows], token_weight, token_bias, reader, activation, *parts)
    return out, squared, statistics, kept


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
    folded = kept[:size] if kept.numel() >= size else hidden.new_empty(size)
    folded = torch.mm(reader, token_weight, out=folded.view(reader.shape[0], -1))
    out.copy_(hidden @ folded.mT)
    if token_bias is not None:
        out += torch.mv(reader.to(out.dtype), token_bias.to(out.dtype))
    if squared.numel():
        assert gram is not None
        torch.sum(_gram_rows(hidden, gram).square_(), 1, out=squared)


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
        dreader = moment @ token_weight.mT if needs[3] else None
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
    plan = plan_of(hidden, token_weight, reader, gram, activation, squares, needs, kept.numel(), True)
    if plan == "fold":
        inputs = (hidden, token_weight, token_bias, reader, gram)
        return fold_backward(grad_out, grad_squared, *inputs, kept, needs)

    tokens = token_weight.shape[0]
    if plan == "keep":
        row_slices, token_slices = [slice(None)], [slice(0, tokens)]
    else:
        row_slices, token_slices = list(_slices(hidden.shape[0], _ROWS)), list(_slices(tokens, _TOKENS))
    once = len(row_slices) == 1
    exact = grad_out.dtype

    def accumulate(whole: Tensor | None, part: Tensor) -> Tensor:
        return part if whole is None else whole.add_(part)

    dhidden = hidden.new_empty(hidden.shape) if needs[0] else None
    gradients: list[Tensor | None] = [None, None, None]
    for position, source in enumerate((token_weight, token_bias, reader)):
        if needs[position + 1] and source is not None:
            gradients[position] = torch.zeros(source.shape, dtype=source.dtype if once else exact, device=source.device)
    dweight, dbias, dreader = gradients
    reader_sums = reader.sum(1, dtype=exact) if activation == "log_softmax" else None

    for rows in row_slices:
        h, grad, grad_low = hidden[rows], grad_out[rows], grad_out[rows].to(hidden.dtype)
        twice = None if grad_squared is None else 2 * grad_squared[rows, None]
        logits = kept[: hidden.shape[0] * tokens].view(-1, tokens) if plan == "keep" else None
        # What softmax subtracts in every row, from the outputs alone: sum_v a da, or sum_v da for log-softmax.
        subtract = None
        if activation == "softmax":
            subtract = (grad * out[rows]).sum(1, keepdim=True)
            if twice is not None:
                subtract += twice * squared[rows, None]
        elif reader_sums is not None:
            subtract = (grad @ reader_sums)[:, None]
            if twice is not None:
                subtract += twice * statistics[1, rows, None]
        dh: Tensor | None = None
        for v in token_slices:
            a = logits
            if a is None and (needs[3] or activation != "logits" or twice is not None):
                a = _logits(h, token_weight[v], None if token_bias is None else token_bias[v])
                if activation != "logits":
                    a = a.to(exact).sub_(statistics[0, rows, None])
                    a = (a.exp_() if activation == "softmax" else a).to(hidden.dtype)
            if dreader is not None and a is not None:
                if once:
                    torch.mm(grad_low.mT, a, out=dreader[:, v])
                else:
                    dreader[:, v] += grad_low.mT @ a
            if not (needs[0] or needs[1] or needs[2]):
                continue
            da = grad_low @ reader[:, v]
            if a is not None:
                da = _through_activation(da, a, activation, subtract, twice)
            if needs[0]:
                dh = accumulate(dh, (da @ token_weight[v]).to(hidden.dtype if len(token_slices) == 1 else exact))
            if dweight is not None:
                dweight[v] += da.mT @ h
            if dbias is not None:
                dbias[v] += da.sum(0, dtype=exact)
        if dhidden is not None and dh is not None:
            if once:
                dhidden = dh.to(hidden.dtype)
            else:
                dhidden[rows] = dh
    sources = (token_weight, token_bias, reader)
    return dhidden, *(
        None if grad is None or source is None else grad.to(source.dtype)
        for grad, source in zip((dweight, dbias, dreader), sources)
    )


def _through_activation(
    da: Tensor, a: Tensor, activation: str, subtract: Tensor | None, twice: Tensor | None
) -> Tensor:
    """Gradient of the logits from that of the activations, sums in float32 or better. Overwrites da."""
    if activation == "logits" and twice is None:
        return da
    dtype = da.dtype
    exact = accumulator(dtype)
    da, a = da.to(exact), a.to(exact)
    if twice is not None:
        da.addcmul_(a, twice.expand_as(a))
    if activation == "softmax":
        assert subtract is not None
        da.sub_(subtract).mul_(a)
    elif activation == "log_softmax":
        assert subtract is not None
        da.addcmul_(a.exp(), subtract.expand_as(a), value=-1)
    return da.to(dtype)


def _keep_forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    activation: str,
    out: Tensor,
    squared: Tensor,
    statistics: Tensor,
    kept: Tensor,
) -> None:
    a = kept[: hidden.shape[0] * token_weight.shape[0]].view(-1, token_weight.shape[0])
    if token_bias is None:
        torch.mm(hidden, token_weight.mT, out=a)
    else:
        torch.addmm(token_bias, hidden, token_weight.mT, out=a)
    if activation == "softmax":
        torch.softmax(a, -1, out=a)
    elif activation == "log_softmax":
        torch.log_softmax(a, -1, out=a)
    out.copy_(a @ reader.mT)
    if squared.numel():
        torch.linalg.vector_norm(a, dim=1, dtype=out.dtype, out=squared).square_()
        torch.sum(a, 1, dtype=out.dtype, out=statistics[1])


def _stream_forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    activation: str,
    out: Tensor,
    squared: Tensor,
    statistics: Tensor,
) -> None:
    """Walk over the tokens with the running maximum m of every row; activations are relative to it until the end."""
    exact, squares = out.dtype, bool(squared.numel())
    out.zero_()
    if squares:
        squared.zero_()
    m: Tensor | None = None
    total = out.new_zeros(hidden.shape[0], 1)
    first, seen = out.new_zeros(hidden.shape[0]), out.new_zeros(reader.shape[0])
    for v in _slices(token_weight.shape[0], _TOKENS):
        t = _logits(hidden, token_weight[v], None if token_bias is None else token_bias[v])
        if activation == "logits":
            out += t @ reader[:, v].mT
            if squares:
                squared += t.to(exact).square_().sum(1)
            continue

        t = t.to(exact)
        new = t.amax(1, keepdim=True)
        new = new if m is None else torch.maximum(m, new)
        shift = None if m is None else m - new
        m, t = new, t.sub_(new)
        if activation == "softmax":
            p = t.exp_()
            if shift is not None:
                scale = shift.exp_()
                out *= scale
                total *= scale
                if squares:
                    squared *= scale[:, 0] ** 2
            total += p.sum(1, keepdim=True)
            out += p.to(hidden.dtype) @ reader[:, v].mT
            if squares:
                squared += p.square_().sum(1)
            continue

        # All of t - m, m - new and the sums stay <= 0, so that nothing cancels however large the logits are.
        count = float(v.start)
        if shift is not None:
            out.addcmul_(shift, seen[None])
            if squares:
                squared += 2 * shift[:, 0] * first + count * shift[:, 0] ** 2
            first += count * shift[:, 0]
            total *= shift.exp()
        seen += reader[:, v].sum(1, dtype=exact)
        out += t.to(hidden.dtype) @ reader[:, v].mT
        if squares:
            squared += t.square().sum(1)
        first += t.sum(1)
        total += t.exp_().sum(1, keepdim=True)

    if activation == "logits":
        return
    assert m is not None
    log_total = total.log()
    statistics[0] = (m + log_total)[:, 0]
    if activation == "softmax":
        out /= total
        if squares:
            squared /= total[:, 0] ** 2
    else:
        out.addcmul_(log_total, seen[None], value=-1)
        log_total, count = log_total[:, 0], float(token_weight.shape[0])
        if squares:
            squared += count * log_total**2 - 2 * log_total * first
        statistics[1] = first - count * log_total


def _logits(hidden: Tensor, token_weight: Tensor, token_bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, token_weight, token_bias)


def _gram_rows(hidden: Tensor, gram: Tensor) -> Tensor:
    return torch.addmm(gram[:, -1], hidden.to(gram.dtype), gram[:, :-1].mT)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
