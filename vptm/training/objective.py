"""The loss of class scores that a run trains by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vptm.data.balance import class_weights
from vptm.models.prompted_model import PromptedModel
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

    def hits(self, scores: Tensor, labels: Tensor) -> Tensor | None:
        """Whether the largest score of an image is that of its label, or largest share, (B,) bool."""
        return scores.argmax(1) == (labels.argmax(1) if labels.is_floating_point() else labels)

    def mass(self, labels: Tensor) -> Any:
        """What the mean over `labels` divides by: their number, or the sum of the weights of their classes."""
        if self.weights is None or labels.is_floating_point():
            return len(labels)
        return self.weights.to(labels.device)[labels].sum()


class BinaryCrossEntropy(CrossEntropy):
    """`F.binary_cross_entropy_with_logits` of labels (B, K) of 0 and 1, the mean over images and classes."""

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        exact = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        return F.binary_cross_entropy_with_logits(exact, labels.to(exact))

    def hits(self, scores: Tensor, labels: Tensor) -> Tensor | None:
        """None: an image has no one label to be right about."""
        return None

    def mass(self, labels: Tensor) -> Any:
        return len(labels)


def make_objective(settings: TrainSettings, labels: np.ndarray | None, model: PromptedModel) -> CrossEntropy:
    """The loss that `settings` describe, for training images of these labels (N,), or (N, K); None of a stream.

    Raises:
        ValueError: weights that do not fit the classes, or what a multi-label model has no use for.
    """
    given = settings.class_weights
    if not model.multi_label:
        weights = None if given is None else class_weights(given, labels, model.num_classes)
        return CrossEntropy(weights, settings.label_smoothing)
    for name in ("class_weights", "label_smoothing", "protoverb_weight"):
        if value := getattr(settings, name):
            unused = getattr(TrainSettings, name)
            raise ValueError(f"{name} must be {unused} for a multi-label model, got {value!r}")
    return BinaryCrossEntropy()
