"""Losses beside the cross-entropy of the class scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from vptm.data.labels import check_labels
from vptm.messages import number


def instance_contrast(embeddings: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """ProtoVerb's instance contrast (arXiv:2203.09770): embeddings of one class closer to each other than to the rest.

    With s_ij the cosine of embeddings i and j over the temperature, the sum over all ordered pairs (i, j) of one class,
    i = j included, divided by N²::

        -log( exp(s_ij) / (exp(s_ij) + sum_{t of other classes} exp(s_tj)) )

    For a support set with equally many images of every class this is what OpenPrompt's ProtoVerb trains; other sets
    weigh a class by the square of its size. It holds (N, N) cosines.

    Args:
        embeddings: (N, d) floating point, of any length.
        labels: (N,) integers.
        temperature: divides the cosines, > 0; ProtoVerb has 1.

    Returns:
        A 0-d tensor; 0 where all labels are equal.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
        >>> round(instance_contrast(embeddings, torch.tensor([0, 0, 1])).item(), 4)
        0.083
    """
    _check(embeddings, labels, temperature)
    unit = F.normalize(embeddings, dim=-1)
    scores = unit @ unit.mT / temperature
    same = labels[:, None] == labels
    others = scores.masked_fill(same, -math.inf).logsumexp(0)
    return ((torch.logaddexp(scores, others) - scores) * same).sum() / len(labels) ** 2


def prototype_contrast(embeddings: Tensor, prototypes: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """ProtoVerb's prototype contrast (arXiv:2203.09770): each embedding closest to the prototype of its class.

    `F.cross_entropy(cosines / temperature, labels) / K`: the division by K is OpenPrompt's.

    Args:
        embeddings: (N, d) floating point, of any length.
        prototypes: (K, d), of any length.
        labels: (N,) integers in 0 .. K - 1.
        temperature: divides the cosines, > 0; ProtoVerb has 1.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> embeddings, prototypes = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(prototype_contrast(embeddings, prototypes, torch.tensor([0])).item(), 4)  # log(1 + e⁻¹) / 2
        0.1566
    """
    _check(embeddings, labels, temperature)
    if prototypes.ndim != 2 or prototypes.shape[1] != embeddings.shape[1] or len(prototypes) < 1:
        raise ValueError(f"prototypes must be (K, {embeddings.shape[1]}) with K >= 1, got {tuple(prototypes.shape)}")
    check_labels(labels, len(prototypes))
    cosines = F.linear(F.normalize(embeddings, dim=-1), F.normalize(prototypes, dim=-1))
    return F.cross_entropy(cosines / temperature, labels.long()) / len(prototypes)


def protoverb_loss(embeddings: Tensor, prototypes: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """`instance_contrast` + `prototype_contrast`, the loss ProtoVerb trains its projection and prototypes by.

    Example:
        >>> embeddings, prototypes = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(protoverb_loss(embeddings, prototypes, torch.tensor([0])).item(), 4)
        0.1566
    """
    loss = prototype_contrast(embeddings, prototypes, labels, temperature=temperature)
    return loss + instance_contrast(embeddings, labels, temperature=temperature)


def _check(embeddings: Tensor, labels: Tensor, temperature: float) -> None:
    if embeddings.ndim != 2 or len(embeddings) < 1 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be (N, d) floating point with N >= 1, got {tuple(embeddings.shape)} {embeddings.dtype}"
        )
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be ({len(embeddings)},) integers, one for each embedding, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    if not 0 < number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature!r}")


def feature_reformation(prompted: Tensor, frozen: Tensor, *, temperature: float = 1.0) -> Tensor:
    """ProVP-Ref's contrast (arXiv:2304.08386): the prompted feature of an image closest to its own frozen feature.

    With unit vectors f_i and g_i, the mean over the batch of `-log softmax_j(f_i . g_j / temperature)[i]`. One
    direction; images of one class are negatives of each other; no gradient reaches `frozen`. Where torch.distributed
    runs, `frozen` is gathered from all ranks and the loss is scaled so that gradients averaged over ranks, as DDP
    does, are those of one process with the whole batch: f_i enters its own term alone and the g_j are constants, so
    nothing else has to cross ranks.

    Args:
        prompted: (B, D) floating point, of any length.
        frozen: (B, D), features of the same images without prompts.
        temperature: divides the cosines, > 0; the published code has none, that is 1.

    Returns:
        A 0-d tensor.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> round(feature_reformation(torch.eye(32), torch.eye(32)).item(), 3)  # log(1 + 31 / e)
        2.518
    """
    if prompted.ndim != 2 or len(prompted) < 1 or not prompted.is_floating_point() or prompted.shape != frozen.shape:
        raise ValueError(
            "prompted and frozen must be (B, D) floating point with B >= 1, "
            f"got {tuple(prompted.shape)} {prompted.dtype} and {tuple(frozen.shape)}"
        )
    if not 0 < number("temperature", temperature) < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature!r}")
    anchors, first = F.normalize(frozen.detach(), dim=-1), 0
    scale = 1.0
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sizes = [torch.zeros((), dtype=torch.long, device=anchors.device) for _ in range(distributed.get_world_size())]
        distributed.all_gather(sizes, torch.tensor(len(anchors), device=anchors.device))
        counts = [int(size) for size in sizes]
        # ranks may hold batches of unequal size, collectives only equal ones
        padded = F.pad(anchors, (0, 0, 0, max(counts) - len(anchors))).contiguous()
        gathered = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(gathered, padded)
        first = sum(counts[: distributed.get_rank()])
        scale = len(anchors) * len(counts) / sum(counts)
        anchors = torch.cat([part[:count] for part, count in zip(gathered, counts)])
    scores = F.normalize(prompted, dim=-1) @ anchors.mT / temperature
    return scale * F.cross_entropy(scores, torch.arange(first, first + len(prompted), device=scores.device))
