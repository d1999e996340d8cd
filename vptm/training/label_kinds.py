"""What labels a model learns: one class of every image, or any number of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vptm.data.labels import check_labels, check_several, check_shares
from vptm.models.prompted_model import PromptedModel
from vptm.training.scores import Answers, SeveralAnswers


class OneLabel:
    """Every image is of one of K classes."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def read(self, labels: Tensor) -> Tensor:
        """Labels (B,) int64 of a batch; ValueError of others."""
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(f"labels must be (B,) integers, got {tuple(labels.shape)} of {labels.dtype}")
        check_labels(labels, self.classes, of="row")
        return labels.long()

    def learned(self, labels: Tensor) -> Tensor:
        """Labels (B,) int64 of a batch that is trained on, or shares (B, K) float32; ValueError of others."""
        return labels.float() if self.are_shares(labels) else labels.long()

    def are_shares(self, labels: Tensor) -> bool:
        """Whether labels of a batch are shares (B, K) of the classes, and not integers (B,) in 0..K-1.

        Raises:
            ValueError: they are neither.
        """
        if labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] == self.classes:
            if labels.device.type == "cpu":  # looking stalls a GPU
                check_shares(labels, of="row")
            return True
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(
                f"labels must be (B,) integers or (B, {self.classes}) shares, got {tuple(labels.shape)} of "
                f"{labels.dtype}"
            )
        check_labels(labels, self.classes, of="row")
        return False

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of a batch, 0-d."""
        return F.cross_entropy(scores, labels, reduction="sum")

    def kept(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """What `answers` needs of a batch; scores are on the CPU."""
        return labels.cpu(), scores.argmax(1), scores.softmax(1).amax(1)

    def answers(self, kept: Any, loss: float) -> Answers:
        """The answers to all batches, of which `kept` gave the parts."""
        labels, predicted, confidence = kept
        return Answers(labels, predicted, confidence, loss)


class SeveralLabels(OneLabel):
    """Every image is of any of K classes, or of none: labels (B, K) of 0 and 1."""

    def read(self, labels: Tensor) -> Tensor:
        """Labels (B, K) float32 of a batch; ValueError of others."""
        check_several(labels, self.classes, of="row")
        return labels.float()

    def learned(self, labels: Tensor) -> Tensor:
        """The same of a batch that is trained on."""
        return self.read(labels)

    def are_shares(self, labels: Tensor) -> bool:
        """Never; ValueError of other labels."""
        self.read(labels)
        return False

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The sum over a batch of the mean over the classes, 0-d."""
        return F.binary_cross_entropy_with_logits(scores, labels.to(scores)) * len(labels)

    def kept(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return labels.cpu().to(torch.uint8), scores

    def answers(self, kept: Any, loss: float) -> Any:
        labels, logits = kept
        return SeveralAnswers(labels, logits, loss)


def labels_of(model: PromptedModel) -> OneLabel:
    """The kind of labels that a model gives."""
    return (SeveralLabels if model.multi_label else OneLabel)(model.num_classes)
