"""The read-out rows of a support set, as prototypes start from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vptm.data.labels import check_labels
from vptm.frozen.modes import eval_mode
from vptm.frozen.rows import PromptedRows


@torch.no_grad()
def support_rows(model: PromptedRows, loader: Iterable[tuple[Tensor, Tensor]], classes: int) -> tuple[Tensor, Tensor]:
    """Read-out rows (N, C) of a whole support set and its labels (N,), by `model` in eval mode.

    Raises:
        ValueError: labels that are not (B,) integers, a label outside 0 .. classes - 1, a row that is not finite, or a
            class without an image.
    """
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    found: list[Tensor] = []
    seen = 0
    with eval_mode(model):
        for images, labels in loader:
            if not isinstance(labels, Tensor):
                raise ValueError(f"labels must be a tensor (B,) of integers, got {type(labels).__name__}")
            if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(
                    f"labels must be ({len(images)},) integers, one for each image, "
                    f"got {tuple(labels.shape)} {labels.dtype}"
                )
            check_labels(labels, classes, first=seen)
            hidden = model.forward_hidden(images.to(device))
            broken = (~hidden.isfinite().all(dim=1)).nonzero()
            if broken.numel():
                raise ValueError(f"read-out rows must be finite, got NaN or inf for image {seen + int(broken[0])}")
            rows.append(hidden)
            found.append(labels.to(device).long())
            seen += len(labels)
    counts = torch.bincount(torch.cat(found), minlength=classes) if found else torch.zeros(classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every class must have an image in the support set, got none for class {empty[0]}")
    return torch.cat(rows), torch.cat(found)
