"""Labels of a data set, and whether they are in range."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset


def check_labels(
    labels: Tensor | np.ndarray, classes: int, *, name: str = "labels", of: str = "image", first: int = 0
) -> None:
    """Refuse labels outside 0..classes-1.

    Args:
        labels: (N,) integers.
        classes: K.
        name, of, first: for the message: what they are, of what, and the number of the first one.

    Raises:
        ValueError: naming the first label that is outside, and its number.

    Example:
        >>> check_labels(torch.tensor([0, 3]), 3, first=8)
        Traceback (most recent call last):
        ValueError: labels must be in 0..2, got 3 for image 9
    """
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(outside.nonzero()[0][0])
        raise ValueError(f"{name} must be in 0..{classes - 1}, got {int(labels[index])} for {of} {first + index}")


def check_several(
    labels: Tensor | np.ndarray, classes: int, *, name: str = "labels", of: str = "image", first: int = 0
) -> None:
    """Refuse labels of several classes an image that are not (N, classes) of 0 and 1, of any type.

    Args:
        labels: (N, K).
        classes: K.
        name, of, first: for the message, as of `check_labels`.

    Raises:
        ValueError: naming the first label that is neither 0 nor 1, and its number.

    Example:
        >>> check_several(torch.tensor([[0, 1], [2, 0]]), 2)
        Traceback (most recent call last):
        ValueError: labels must be 0 or 1 for each of 2 classes, got 2 for image 1
    """
    if labels.ndim != 2 or labels.shape[1] != classes:
        raise ValueError(
            f"{name} must be (N, {classes}) of 0 and 1 for a multi-label model, got {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        row, column = (int(index) for index in next(iter(zip(*np.nonzero(np.asarray(wrong.tolist()))))))
        raise ValueError(
            f"{name} must be 0 or 1 for each of {classes} classes, got {labels[row, column].item():g} for {of} "
            f"{first + row}"
        )


_ROUNDED = 0.05  # of shares in 16 bits


def check_shares(labels: Tensor | np.ndarray, *, name: str = "labels", of: str = "image") -> None:
    """Refuse shares (N, K) of classes that are below 0 or do not add up to 1.

    Args:
        labels: (N, K) of a floating type.
        name, of: for the message, as of `check_labels`.

    Raises:
        ValueError: naming the first row that is wrong.

    Example:
        >>> check_shares(torch.tensor([[0.5, 0.5], [1.5, -0.5]]))
        Traceback (most recent call last):
        ValueError: labels must be shares >= 0 that add up to 1, got -0.5 for image 1
    """
    shares = torch.as_tensor(labels).double()
    totals, least = shares.sum(1), shares.amin(1)
    wrong = ~((totals - 1).abs() <= _ROUNDED) | ~(least >= 0)  # NaN too
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0, 0])
    if not least[row] >= 0:
        raise ValueError(f"{name} must be shares >= 0 that add up to 1, got {least[row].item():g} for {of} {row}")
    raise ValueError(
        f"{name} must be shares that add up to 1, got {totals[row].item():g} for {of} {row}: several labels of an "
        "image need a model with multi_label=True"
    )


def dataset_labels(dataset: Any, ndim: int = 1) -> np.ndarray | None:
    """Labels (N,) of a data set that has them as `labels`, `targets` or tensors, as its items give them; with `ndim`
    2 those (N, K) of several classes, or shares of them.

    Looked for below `Subset` too, and sent through `target_transform`. None where only the items can tell: no such
    attribute, one that is not N integers, or a subclass of `Subset` or transforms of image and label together, which
    may give others.
    """
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset, ndim) if type(dataset) is Subset else None
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if not hasattr(getattr(dataset, "transforms", None) or SimpleNamespace(target_transform=None), "target_transform"):
        return None
    tensors = getattr(dataset, "tensors", None) or ()
    for stored in (*(getattr(dataset, name, None) for name in ("labels", "targets")), *tensors[1:2]):
        labels = np.asarray(()) if stored is None else np.asarray(stored)
        kinds = "iu" if ndim == 1 else "iufb"
        if labels.ndim == ndim and labels.dtype.kind in kinds and len(labels) == len(dataset):
            transform = getattr(dataset, "target_transform", None)
            if ndim > 1:
                return labels if transform is None else None
            return labels if transform is None else np.array([int(transform(int(label))) for label in labels])
    return None


def class_labels(names: Sequence[str] | None, classes: int) -> list[str]:
    """What classes are called: their names, or their numbers where nobody named them.

    Example:
        >>> class_labels(None, 2)
        ['0', '1']
    """
    return list(names) if names else [str(k) for k in range(classes)]
