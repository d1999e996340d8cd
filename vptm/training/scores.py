"""What the answers of a model come to, by scikit-learn where it has the number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

CALIBRATION_BINS = 15


class Answers(NamedTuple):
    """What a model said of every image of a loader: labels and predictions (N,) int64 on the CPU, the softmax
    probability (N,) float64 of the predictions, and the mean cross-entropy."""

    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """The share, in 0..1, that is right."""
        return int((self.labels == self.predicted).sum()) / len(self.labels)

    def row(self) -> dict[str, Any]:
        """What `metrics.csv` keeps of a validation."""
        return {"val_loss": self.loss, "val_accuracy": self.accuracy}

    def scores(self, classes: int, *, confusion: bool = False) -> dict[str, Any]:
        """What `vptm.evaluate` gives."""
        return class_scores(self, classes, confusion=confusion)


class SeveralAnswers(NamedTuple):
    """What a multi-label model said of every image of a loader: labels (N, K) of 0 and 1, uint8 on the CPU, scores (N,
    K) float64, and the mean binary cross-entropy."""

    labels: Tensor
    logits: Tensor
    loss: float

    def row(self) -> dict[str, Any]:
        """What `metrics.csv` keeps of a validation."""
        return {"val_loss": self.loss, "val_accuracy": None, "val_map": self.average_precisions()[0]}

    def average_precisions(self) -> tuple[float, list[float | None]]:
        """Their mean over the classes with images, and that of every class, None without images.

        Raises:
            ValueError: no class has images.
        """
        from sklearn.metrics import average_precision_score

        labels, scores = self.labels.numpy(), self.logits.numpy()
        present = labels.any(0)
        if not present.any():
            raise ValueError("loader must yield an image with a label, all labels are 0")
        found = average_precision_score(labels[:, present], scores[:, present], average=None)
        every = np.full(labels.shape[1], np.nan)
        every[present] = found
        return float(np.mean(found)), _known(every)

    def scores(self, classes: int, *, confusion: bool = False) -> dict[str, Any]:
        """What `vptm.evaluate` gives."""
        from sklearn.metrics import f1_score, precision_recall_fscore_support

        labels, said = self.labels.numpy(), self.logits.numpy() >= 0  # where the sigmoid is at least 0.5
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, said, labels=range(classes), average=None, zero_division=np.nan
        )
        mean, every = self.average_precisions()
        return {
            "map": mean,
            "macro_f1": float(np.nanmean(f1)),
            "micro_f1": float(f1_score(labels, said, average="micro", zero_division=0.0)),
            "loss": self.loss,
            "n": len(labels),
            "ap_per_class": every,
            "recall_per_class": _known(recall),
            "precision_per_class": _known(precision),
            "f1_per_class": _known(f1),
        }


def not_validated(multi_label: bool) -> dict[str, Any]:
    """`row()` where validation images were not looked at."""
    return {"val_loss": None, "val_accuracy": None} | ({"val_map": None} if multi_label else {})


def validation_score(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """What epochs are compared by, larger is better: (accuracy, or mean average precision, then minus the loss); None
    where validation images were not looked at."""
    quality = row["val_map"] if "val_map" in row else row["val_accuracy"]
    return None if quality is None else (quality, -row["val_loss"])


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: how far the confidence of predictions is from the share of them that is right.

    With M bins of one width, of which B_m holds the n_m of n predictions whose confidence is in ((m - 1) / M, m / M]::

        ECE = sum over m of (n_m / n) |share of B_m that is right - mean confidence of B_m|

    Args:
        confidence: (n,) softmax probability of what was predicted, in (0, 1].
        correct: (n,) bool.
        bins: M.

    Example:
        >>> round(calibration_error(np.array([0.9, 0.9, 0.6]), np.array([True, False, True])), 4)  # (0.8 + 0.4) / 3
        0.4
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def class_scores(answers: Answers, classes: int, *, confusion: bool = False) -> dict[str, Any]:
    """The scores that `vptm.evaluate` gives for images of one class each."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predicted = answers.labels.numpy(), answers.predicted.numpy()
    # a quotient without a denominator says nothing of its class
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=range(classes), average=None, zero_division=np.nan
    )
    result = {
        "accuracy": answers.accuracy,
        "balanced_accuracy": float(np.nanmean(recall)),
        "macro_f1": float(np.nanmean(f1)),
        "ece": calibration_error(answers.confidence.numpy(), labels == predicted),
        "loss": answers.loss,
        "n": len(labels),
        "per_class": _known(recall),
        "precision_per_class": _known(precision),
        "f1_per_class": _known(f1),
    }
    if confusion:
        result["confusion"] = confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    return result


def _known(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def by_name(scores: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """`scores` with what is said of classes under their names; of the confusion matrix the counts that are not 0, as
    {label: {prediction: count}}.

    Example:
        >>> by_name({"per_class": [0.5, 1.0], "confusion": [[1, 1], [0, 1]]}, ["hat", "shoe"])
        {'per_class': {'hat': 0.5, 'shoe': 1.0}, 'confusion': {'hat': {'hat': 1, 'shoe': 1}, 'shoe': {'shoe': 1}}}
    """
    named = {name: dict(zip(classes, value)) if name.endswith("per_class") else value for name, value in scores.items()}
    if "confusion" in scores:
        named["confusion"] = {
            label: {other: count for other, count in zip(classes, row) if count}
            for label, row in zip(classes, scores["confusion"])
        }
    return named
