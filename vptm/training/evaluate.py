"""How good a model is on a loader."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vptm.frozen.modes import eval_mode
from vptm.models.prompted_model import PromptedModel
from vptm.training.checks import check_batch_labels
from vptm.weights.adapters import unwrapped


@torch.no_grad()
def evaluate(
    model: PromptedModel, loader: DataLoader[Any], *, device: str | torch.device | None = None, confusion: bool = False
) -> dict[str, Any]:
    """Accuracy and mean cross-entropy of `model` on `loader`, in eval mode; the model's mode is put back.

    Args:
        model: gives (B, K) scores.
        loader: yields (images, labels); labels in 0..K-1.
        device: where to run; None stays on the model's device.
        confusion: also return the counts (K, K), row = label, column = prediction.

    Returns:
        `accuracy` (share in 0..1), `loss`, `n`, `per_class` (K shares, None for a class without images) and, when
        asked for, `confusion` as nested lists.

    Raises:
        ValueError: no images, or a label outside 0..K-1.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch DataLoader, got {type(loader).__name__}")
    if device is not None:
        model.to(device)
    forward, model = model, unwrapped(model)
    place = next(model.parameters()).device
    classes = model.num_classes
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    total = torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        # what was compiled runs compiled
        seals = isinstance(model, PromptedModel) and "_orig_mod" not in forward._modules
        runs = model.sealed_twin() if seals else forward
        for images, labels in loader:
            check_batch_labels(labels, classes)
            scores = runs(images.to(place)).float().cpu()
            if scores.shape[1] != classes:
                raise ValueError(f"model must give a score for each of its {classes} classes, got {scores.shape[1]}")
            labels = labels.cpu().long()
            total += F.cross_entropy(scores, labels, reduction="sum").double()
            counts += torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)
    n = int(counts.sum())
    if n == 0:
        raise ValueError("loader must yield at least one image, it is empty")
    per_class = [int(row[k]) / int(row.sum()) if int(row.sum()) else None for k, row in enumerate(counts)]
    result = {"accuracy": int(counts.trace()) / n, "loss": float(total) / n, "n": n, "per_class": per_class}
    if confusion:
        result["confusion"] = counts.tolist()
    return result
