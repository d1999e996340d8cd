"""The read-out rows of a support set, as prototypes start from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vptm.data.labels import check_labels
from vptm.frozen.rows import PromptedRows


@torch.no_grad()
def support_rows(
    model: PromptedRows, loader: Iterable[tuple[Tensor, Tensor]], classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read-out rows (B, C) of each batch of a support set and their labels (B,), where the model computes; it has to be
    in eval mode meanwhile.

    Raises:
        ValueError: labels that are not (B,) integers, a label outside 0 .. classes - 1, a row that is not finite, or,
            after the last batch, a class without an image.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(classes, dtype=torch.int64)
    for images, labels in loader:
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor (B,) of integers, got {type(labels).__name__}")
        if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"labels must be ({len(images)},) integers, one for each image, "
                f"got {tuple(labels.shape)} {labels.dtype}"
            )
        seen = int(counts.sum())
        check_labels(labels, classes, first=seen)
        hidden = model.forward_hidden(images.to(device))
        broken = (~hidden.isfinite().all(dim=1)).nonzero()
        if broken.numel():
            raise ValueError(f"read-out rows must be finite, got NaN or inf for image {seen + int(broken[0])}")
        counts += torch.bincount(labels.cpu(), minlength=classes)
        yield hidden, labels.to(device).long()
    if not counts.all():
        empty = int((counts == 0).nonzero()[0])
        raise ValueError(f"every class must have an image in the support set, got none for class {empty}")
