"""What lets classes of unequal size count alike: weights of the loss, or the draw of training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from vptm.settings import parse_weights


def class_weights(given: str | Sequence[float], labels: np.ndarray | None, classes: int) -> Tensor:
    """The weight of each class, (K,) float64.

    Args:
        given: "balanced" is `N / (K * count)` of each class, as `sklearn.utils.class_weight.compute_class_weight` has
            it; or K numbers > 0, in a sequence or as text with commas between them.
        labels: (N,) integers of the training images, or shares (N, K) of the classes; None of a stream.
        classes: K.

    Raises:
        ValueError: another number of weights than classes, or "balanced" of a stream, of shares, or of a class without
            an image.

    Example:
        >>> class_weights("balanced", np.array([0, 0, 0, 1]), 2)
        tensor([0.6667, 2.0000], dtype=torch.float64)
    """
    from sklearn.utils.class_weight import compute_class_weight

    found = parse_weights(given)
    if not isinstance(found, str):
        if len(found) != classes:
            raise ValueError(f"class_weights must be balanced or {classes} numbers, one for a class, got {len(found)}")
        return torch.tensor(found, dtype=torch.float64)
    if labels is None:
        raise ValueError("class_weights must be numbers for a stream, whose labels nobody has counted, got balanced")
    if labels.ndim > 1:
        raise ValueError("class_weights must be numbers for images that are shares of classes, got balanced")
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        raise ValueError(
            f"class_weights balanced needs a training image of each of {classes} classes, got none of class "
            f"{int(counts.argmin())}"
        )
    return torch.from_numpy(compute_class_weight("balanced", classes=np.arange(classes), y=labels))


def balanced_sampler(labels: np.ndarray) -> WeightedRandomSampler:
    """Draws N of N images, with replacement, so that every class that has images is as likely as any other.

    It draws from torch's global generator, which `vptm.fit` seeds for every epoch, and draws the same in each of
    several processes.

    Args:
        labels: (N,) integers.

    Raises:
        ValueError: other labels, such as shares of classes.

    Example:
        >>> labels = np.repeat([0, 1], [990, 10])
        >>> len(set(balanced_sampler(labels))) < 700  # the 10 are drawn again and again
        True
    """
    from sklearn.utils.class_weight import compute_sample_weight

    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be (N,) integers, got {labels.shape} of {labels.dtype}")
    return WeightedRandomSampler(compute_sample_weight("balanced", labels).tolist(), len(labels))
