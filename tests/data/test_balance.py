"""Classes of unequal size that are to count alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from vptm.data.balance import balanced_sampler, class_weights

LABELS = np.repeat([0, 1, 2], [6, 3, 1])


def test_balanced_weights_give_every_class_the_same_sum() -> None:
    """That is what balanced means: images times weight is N / K for each class."""
    weights = class_weights("balanced", LABELS, 3)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3], dtype=torch.float64))
    for given in ([1, 2.5, 3], "1, 2.5,3", (1, 2.5, 3)):
        assert class_weights(given, None, 3).tolist() == [1.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ("balanced", LABELS[:-1], "class_weights balanced needs a training image of each of 3 classes, got none of "),
        ("balanced", None, "class_weights must be numbers for a stream, whose labels nobody has counted, got balanced"),
        ("1,2", LABELS, "class_weights must be balanced or 3 numbers, one for a class, got 2"),
        ("1,2,0", LABELS, "class_weights must be balanced, or a list of finite numbers > 0, got '1,2,0'"),
        ([1, 2, float("nan")], LABELS, r"class_weights must be balanced, or a list of .*, got \[1, 2, nan\]"),
        ("even", LABELS, "class_weights must be balanced, or a list of .*, got 'even'"),
        (np.ones(3), LABELS, r"class_weights must be balanced, or a list of .*, got array\("),
        (3.0, LABELS, "class_weights must be balanced, or a list of .*, got 3.0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        class_weights(given, labels, 3)
    assert "\n" not in str(refusal.value)


def test_the_sampler_draws_classes_alike_from_the_global_generator() -> None:
    """A generator of its own would not be seeded by an epoch: a resumed run would draw other images."""
    sampler = balanced_sampler(np.repeat(LABELS, 60))
    torch.manual_seed(3)
    first = list(sampler)
    torch.manual_seed(3)
    assert list(sampler) == first and len(first) == len(sampler) == 600 and list(sampler) != first
    counts = Counter(np.repeat(LABELS, 60)[first].tolist())
    assert all(150 < counts[k] < 250 for k in range(3)), counts


@pytest.mark.parametrize("labels", [np.full((4, 2), 0.5), np.array([0.0, 1.0])])
def test_the_sampler_draws_classes_and_nothing_else(labels: np.ndarray) -> None:
    """Shares would be weighed as if every value were a class."""
    with pytest.raises(ValueError, match=r"labels must be \(N,\) integers, got \(.*\) of float64"):
        balanced_sampler(labels)
