"""A projection in whose space classes are round: Fisher's discriminants of a support set, as a start of prototypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


class Moments:
    """Counts, means and the spread within classes of rows (B, C) that come in batches; memory is that of (C, C).

    Args:
        classes: K.
        origin: (C,) anywhere among the rows: sums are those of differences from it, so that they lose nothing where
            rows are far from zero and close to each other.

    Example:
        >>> moments = Moments(2, torch.tensor([2.0]))
        >>> moments.add(torch.tensor([[1.0], [3.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1]))
        >>> moments.means().flatten().tolist(), moments.within().item()
        ([2.0, 11.0], 1.0)
    """

    def __init__(self, classes: int, origin: Tensor) -> None:
        self._origin = origin.double()
        width = len(origin)
        self.counts = self._origin.new_zeros(classes)
        self._sums = self._origin.new_zeros(classes, width)
        self._squares = self._origin.new_zeros(width, width)

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """One more batch of rows (B, C) with labels (B,)."""
        rows = rows.double() - self._origin
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self._sums.index_add_(0, labels, rows)
        self._squares.addmm_(rows.mT, rows)

    def means(self) -> Tensor:
        """(K, C), NaN for a class without rows."""
        return self._origin + self._sums / self.counts[:, None]

    def within(self) -> Tensor:
        """Covariance (C, C) of rows around the mean of their class, divided by how many there are; zeros where that is
        rounding beside the spread of all, as of one image a class."""
        means = self._sums / self.counts[:, None]
        within = self._squares - (means * self.counts[:, None]).mT @ means
        if within.trace() <= 1e-12 * self._squares.trace():
            return torch.zeros_like(within)
        return within / self.counts.sum()


def shrunk(covariance: Tensor, count: float) -> Tensor:
    """The covariance (p, p) of `count` rows, drawn to a multiple of the identity as far as so few rows leave it
    uncertain: oracle approximating shrinkage (Chen et al., IEEE Trans. Signal Processing 58(10), 2010), as
    scikit-learn's `oas` computes it.

    `(1 - r) S + r (tr S / p) I` with `r = min(1, (tr S^2 + (tr S)^2) / ((n + 1) (tr S^2 - (tr S)^2 / p)))`; n counts
    rows, also where they are around several means. Without any spread, as of one image a class, it is the identity.

    Example:
        >>> shrunk(torch.diag(torch.tensor([3.0, 1.0])), 25)  # r = 26 / (26 * 2)
        tensor([[2.5000, 0.0000],
                [0.0000, 1.5000]])
    """
    width = len(covariance)
    size = covariance.diagonal().mean()
    identity = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    if size <= 0:
        return identity
    alpha = covariance.square().mean()
    uneven = (count + 1) * (alpha - size.square() / width)
    share = 1.0 if uneven <= 0 else min(1.0, float((alpha + size.square()) / uneven))
    return (1 - share) * covariance + share * size * identity


def discriminants(means: Tensor, covariance: Tensor, dim: int) -> Tensor:
    """Projection (min(dim, p), p) that whitens `covariance` (p, p), those directions first in which the `means` (K, p)
    lie apart: Fisher's linear discriminants, and behind these the others from the widest on.

    Cosines of `projection @ (x - means.mean(0))` to the projected class means then weigh every direction by how far
    classes lie apart in it, measured by their own width.
    """
    widths, axes = torch.linalg.eigh(covariance)
    widths = widths.clamp(min=torch.finfo(widths.dtype).eps * float(widths[-1]))  # rounding can leave one below zero
    whitening = (axes / widths.sqrt()).mT.flip(0)
    apart = (means - means.mean(0)) @ whitening.mT
    first = torch.linalg.svd(apart, full_matrices=False).Vh[: min(dim, len(means) - 1)]
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    turned = torch.linalg.qr(torch.cat([first.mT, identity], 1)).Q
    return turned[:, :dim].mT @ whitening


def whitened_start(
    support: Iterable[tuple[Tensor, Tensor]], classes: int, dim: int, head: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (dim, V), bias (dim,) and class means (K, dim) of a projection that whitens what is read of rows.

    Args:
        support: batches of rows (B, C) and their labels (B,).
        classes: K.
        dim: of the projection; what it has more than the smaller of V and C is zero, and learns nothing.
        head: weight (V, C) and bias (V,) of the map from rows to what is read; None reads the rows themselves.
    """
    moments: Moments | None = None
    for rows, labels in support:
        if moments is None:
            moments = Moments(classes, rows.double().mean(0))
        moments.add(rows, labels)
    assert moments is not None
    means, within = moments.means(), moments.within()
    basis = offset = None
    if head is not None:
        # what is read lies in a space of C dimensions, whose orthonormal basis keeps lengths as they are read
        basis, inside = torch.linalg.qr(head[0].double())
        means, within = means @ inside.mT, inside @ within @ inside.mT
        offset = None if head[1] is None else head[1].double() @ basis
    projection = discriminants(means, shrunk(within, float(moments.counts.sum())), dim)
    centre = means.mean(0)
    bias = -projection @ (centre if offset is None else centre + offset)
    weight = projection if basis is None else projection @ basis.mT
    more = dim - len(projection)
    return F.pad(weight, (0, 0, 0, more)), F.pad(bias, (0, more)), F.pad((means - centre) @ projection.mT, (0, more))
