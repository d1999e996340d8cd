"""The loss of class scores that a run trains by."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from vptm.data.balance import class_weights
from vptm.settings import TrainSettings


class CrossEntropy:
    """`F.cross_entropy` of a batch, and what its mean divides by, so that parts of a batch add up to it.

    Args:
        weights: (K,) of the classes, None for all alike.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(self, weights: Tensor | None = None, smoothing: float = 0.0) -> None:
        self.weights, self.smoothing = weights, smoothing

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean loss, 0-d, of scores (B, K) for labels (B,), or shares (B, K) of the classes."""
        if labels.is_floating_point():
            labels = labels.to(scores.dtype)
        weights = None if self.weights is None else self.weights.to(scores)
        return F.cross_entropy(scores, labels, weights, label_smoothing=self.smoothing)

    def mass(self, labels: Tensor) -> Any:
        """What the mean over `labels` divides by: their number, or the sum of the weights of their classes."""
        if self.weights is None or labels.is_floating_point():
            return len(labels)
        return self.weights.to(labels.device)[labels].sum()


def make_objective(settings: TrainSettings, labels: np.ndarray | None, classes: int) -> CrossEntropy:
    """The loss that `settings` describe, for training images of these labels (N,); None of a stream.

    Raises:
        ValueError: weights that do not fit the classes.
    """
    given = settings.class_weights
    weights = None if given is None else class_weights(given, labels, classes)
    return CrossEntropy(weights, settings.label_smoothing)
