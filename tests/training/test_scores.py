"""Scores against loops that follow their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vptm.training.scores import Answers, calibration_error, class_scores


@given(count=st.integers(1, 40), bins=st.integers(1, 15), seed=st.integers(0, 99))
def test_calibration_error_equals_its_loop(count: int, bins: int, seed: int) -> None:
    """Bins are open below and closed above: a confidence of 1, and those on an edge, are counted once."""
    draw = np.random.default_rng(seed)
    confidence = draw.integers(1, 2 * bins + 1, count) / (2 * bins)  # half of them on an edge
    correct = draw.random(count) < 0.5
    wanted = 0.0
    for m in range(1, bins + 1):
        inside = [k for k in range(count) if (m - 1) / bins < confidence[k] <= m / bins]
        if inside:
            gap = np.mean(correct[inside]) - np.mean(confidence[inside])
            wanted += len(inside) / count * abs(gap)
    assert calibration_error(confidence, correct, bins) == pytest.approx(wanted, abs=1e-12)


def test_scores_of_classes_are_their_quotients() -> None:
    """Classes without images (3) or predictions (2), or either (4), have no recall, no precision, no F1."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 3, 0])
    answers = Answers(labels, predicted, torch.full((6,), 0.75, dtype=torch.float64), 0.5)
    got = class_scores(answers, 5, confusion=True)
    assert got["per_class"] == [2 / 3, 1 / 2, 0.0, None, None]
    assert got["precision_per_class"] == [2 / 3, 1 / 2, None, 0.0, None]
    assert got["f1_per_class"] == pytest.approx([2 / 3, 1 / 2, 0.0, 0.0, None])
    assert got["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 4)
    assert got["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert got["accuracy"] == 0.5 and got["ece"] == pytest.approx(0.25) and math.isfinite(got["loss"]) and got["n"] == 6
    assert got["confusion"] == [[2, 1, 0, 0, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
