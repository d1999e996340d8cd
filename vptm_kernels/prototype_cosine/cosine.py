"""From embeddings to cosines with PyTorch ops: one set of prototypes for all rows, or every row its task's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(embedding: Tensor, prototypes: Tensor, eps: float, unit_prototypes: bool = False) -> Tensor:
    """Rows of (B, d) against rows of (K, d), in the dtype of the embedding; differentiable through plain ops."""
    prototypes = prototypes.to(embedding.dtype)
    embedding = embedding / torch.linalg.vector_norm(embedding, dim=1, keepdim=True).clamp_min(eps)
    if unit_prototypes:
        return F.linear(embedding, prototypes)
    return F.linear(embedding, prototypes / torch.linalg.vector_norm(prototypes, dim=1, keepdim=True).clamp_min(eps))


def cosine_(embedding: Tensor, prototypes: Tensor, eps: float, unit_prototypes: bool = False) -> Tensor:
    """`cosine` without gradients. Overwrites the embedding, divides the smaller of (K, d) and (B, K) by the norms."""
    if prototypes.dtype is not embedding.dtype:  # a `to` that does nothing takes a tenth of the time of one image
        prototypes = prototypes.to(embedding.dtype)
    # First the embedding, which is still in the cache. A product by the reciprocal takes half the time of a division.
    embedding /= torch.linalg.vector_norm(embedding, 2, 1, True).clamp_min_(eps)
    if unit_prototypes:
        return F.linear(embedding, prototypes)
    if embedding.shape[0] > embedding.shape[1]:
        norms = torch.linalg.vector_norm(prototypes, dim=1, keepdim=True).clamp_min_(eps)
        return F.linear(embedding, prototypes * norms.reciprocal_())
    norms = torch.linalg.vector_norm(prototypes, dim=1).clamp_min_(eps)
    return F.linear(embedding, prototypes).mul_(norms.reciprocal_())


def cosine_backward(
    grad: Tensor, embedding: Tensor, prototypes: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `cosine` for its two inputs, in the dtype of the embedding."""
    prototypes, grad = prototypes.to(embedding.dtype), grad.to(embedding.dtype)
    dembedding = dprototypes = None
    unit_rows, rows, free_rows = _unit(embedding, eps)
    unit_classes, classes, free_classes = _unit(prototypes, eps)
    if needs[0]:
        d = grad @ unit_classes
        dembedding = (d - unit_rows * (d * unit_rows).sum(1, keepdim=True) * free_rows) / rows
    if needs[1]:
        d = grad.mT @ unit_rows
        dprototypes = (d - unit_classes * (d * unit_classes).sum(1, keepdim=True) * free_classes) / classes
    return dembedding, dprototypes


def _unit(t: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, their norms clamped at eps, and where the norm is free to change."""
    norms = torch.linalg.vector_norm(t, dim=1, keepdim=True)
    clamped = norms.clamp_min(eps)
    return t / clamped, clamped, norms >= eps


def task_cosine(
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor,
    offsets: Sequence[int],
    widest: int,
    eps: float,
    unit_prototypes: bool = False,
) -> Tensor:
    """Cosines (B, widest) of every row to its own task's prototypes, -inf beyond them."""
    unit = embedding / torch.linalg.vector_norm(embedding, dim=1, keepdim=True).clamp_min_(eps)
    out = embedding.new_full((embedding.shape[0], widest), float("-inf"))
    tasks, sizes = _runs(task_ids)
    if len(tasks) == len(set(tasks)) and unit_prototypes:
        columns = prototypes.mT
        for task, rows, place in zip(tasks, unit.split(sizes), out.split(sizes)):
            first, count = offsets[task], offsets[task + 1] - offsets[task]
            own = columns.narrow(1, first, count).to(embedding.dtype)
            torch.mm(rows, own, out=place if count == widest else place.narrow(1, 0, count))
        return out
    for task, chosen in _groups(tasks, sizes):
        own = prototypes[offsets[task] : offsets[task + 1]].to(embedding.dtype)
        scores = F.linear(unit[chosen], own)
        if not unit_prototypes:
            scores /= torch.linalg.vector_norm(own, dim=1).clamp_min_(eps)
        out[chosen, : own.shape[0]] = scores
    return out


def task_cosine_backward(
    grad: Tensor,
    embedding: Tensor,
    prototypes: Tensor,
    task_ids: Tensor,
    offsets: Sequence[int],
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    dembedding = embedding.new_zeros(embedding.shape) if needs[0] else None
    dprototypes = embedding.new_zeros(prototypes.shape) if needs[1] else None
    for task, rows in _groups(*_runs(task_ids)):
        own = slice(offsets[task], offsets[task + 1])
        part = cosine_backward(grad[rows, : own.stop - own.start], embedding[rows], prototypes[own], eps, needs)
        if dembedding is not None and part[0] is not None:
            dembedding[rows] = part[0]
        if dprototypes is not None and part[1] is not None:
            dprototypes[own] = part[1]
    return dembedding, dprototypes


def task_linear(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, out: Tensor) -> None:
    """out[i] = weight[task_ids[i]] @ hidden[i] + bias[task_ids[i]]."""
    products = out if out.dtype == hidden.dtype else torch.empty_like(out, dtype=hidden.dtype)
    tasks, sizes = _runs(task_ids)
    if len(tasks) == len(set(tasks)):
        columns = weight.mT
        # a product in its place takes two thirds of the time of one that is copied there
        for task, rows, place in zip(tasks, hidden.split(sizes), products.split(sizes)):
            torch.mm(rows, columns[task], out=place)
    else:
        for task, chosen in _groups(tasks, sizes):
            products[chosen] = hidden[chosen] @ weight[task].mT
    torch.add(products, bias[task_ids.long()], out=out)


def task_linear_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, task_ids: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dhidden = hidden.new_zeros(hidden.shape) if needs[0] else None
    dweight = weight.new_zeros(weight.shape) if needs[1] else None
    dbias = weight.new_zeros(weight.shape[:2]) if needs[2] else None
    for task, rows in _groups(*_runs(task_ids)):
        part = grad[rows].to(hidden.dtype)
        if dhidden is not None:
            dhidden[rows] = part @ weight[task]
        if dweight is not None:
            dweight[task] = part.mT @ hidden[rows]
        if dbias is not None:
            dbias[task] = grad[rows].sum(0)
    return dhidden, dweight, dbias


def _runs(task_ids: Tensor) -> tuple[list[int], list[int]]:
    """Tasks of rows that follow each other, and how many rows each run has."""
    runs = [(task, len(list(rows))) for task, rows in groupby(task_ids.tolist())]
    return [task for task, _ in runs], [size for _, size in runs]


def _groups(tasks: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, slice | list[int]]]:
    """The rows of every task that occurs, in order, from `_runs`; a slice where they follow each other, which then
    copies nothing."""
    members: dict[int, list[int]] = {}
    first = 0
    for task, size in zip(tasks, sizes):
        members.setdefault(task, []).extend(range(first, first + size))
        first += size
    for task, rows in sorted(members.items()):
        first, last = rows[0], rows[-1]
        yield task, slice(first, last + 1) if last - first + 1 == len(rows) else rows
