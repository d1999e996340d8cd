"""Losses against loops that follow their definition term by term."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vptm.training.losses import instance_contrast, prototype_contrast, protoverb_loss


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def naive_instance_contrast(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    total = rows.new_zeros(())
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if labels[i] == labels[j]:
                positive = (cosine(a, b) / temperature).exp()
                others = [(cosine(rows[t], b) / temperature).exp() for t in range(len(rows)) if labels[t] != labels[j]]
                total = total - (positive / sum(others, positive)).log()
    return total / len(rows) ** 2


def naive_prototype_contrast(rows: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    total = rows.new_zeros(())
    for a, label in zip(rows, labels.tolist()):
        scores = torch.stack([(cosine(a, c) / temperature).exp() for c in prototypes])
        total = total - (scores[label] / scores.sum()).log()
    return total / len(rows) / len(prototypes)


def problem(rows: int, classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, dim, generator=draw, dtype=torch.float64).requires_grad_()
    prototypes = torch.randn(classes, dim, generator=draw, dtype=torch.float64).requires_grad_()
    return embeddings, prototypes, torch.randint(classes, (rows,), generator=draw)


@given(
    rows=st.integers(1, 7),
    classes=st.integers(1, 4),
    dim=st.integers(1, 5),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_protoverb_losses_equal_their_loops(rows: int, classes: int, dim: int, temperature: float, seed: int) -> None:
    """Values and gradients of both losses, balanced or not, also where all rows are of one class."""
    embeddings, prototypes, labels = problem(rows, classes, dim, seed)
    for found, wanted in (
        (
            instance_contrast(embeddings, labels, temperature=temperature),
            naive_instance_contrast(embeddings, labels, temperature),
        ),
        (
            prototype_contrast(embeddings, prototypes, labels, temperature=temperature),
            naive_prototype_contrast(embeddings, prototypes, labels, temperature),
        ),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        leaves = [embeddings, prototypes]
        gradients = [torch.autograd.grad(t, leaves, materialize_grads=True, allow_unused=True) for t in (found, wanted)]
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_balanced_support_set_has_protoverbs_divisors() -> None:
    """With S rows of each of K classes: 1 / (S K²) before the prototype terms, 1 / (S K)² before the instance terms."""
    shots, classes = 3, 4
    rows = torch.randn(shots * classes, 1, generator=torch.Generator().manual_seed(0)).sign() * torch.ones(1, 2)
    labels = torch.arange(classes).repeat_interleave(shots)
    same = torch.ones(classes, 2)
    terms = shots * classes * math.log(classes)  # every row is equally near to equal prototypes
    expected = terms / (shots * classes**2)
    assert prototype_contrast(rows, same, labels).item() == pytest.approx(expected, rel=1e-6)
    alike = torch.ones(shots * classes, 2)
    one = math.log(1 + shots * (classes - 1))  # one positive against the rows of all other classes
    expected = classes * shots**2 * one / (shots * classes) ** 2
    assert instance_contrast(alike, labels).item() == pytest.approx(expected, rel=1e-6)


def test_gradcheck() -> None:
    embeddings, prototypes, labels = problem(5, 3, 4, 0)
    assert torch.autograd.gradcheck(
        lambda e, c: protoverb_loss(e, c, labels, temperature=0.5), (embeddings, prototypes)
    )


def test_it_is_the_sum_of_both() -> None:
    embeddings, prototypes, labels = problem(6, 3, 4, 1)
    parts = instance_contrast(embeddings, labels) + prototype_contrast(embeddings, prototypes, labels)
    torch.testing.assert_close(protoverb_loss(embeddings, prototypes, labels), parts, rtol=1e-14, atol=0)


def test_low_temperatures_neither_overflow_nor_lose_the_gradient() -> None:
    """exp(1 / 0.005) overflows float32: the losses must work on logarithms."""
    embeddings, prototypes, labels = (t.detach().float() if t.is_floating_point() else t for t in problem(6, 3, 4, 2))
    embeddings.requires_grad_()
    loss = protoverb_loss(embeddings, prototypes, labels, temperature=0.005)
    (gradient,) = torch.autograd.grad(loss, [embeddings])
    assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 3, 1])}, "labels must be in 0..2, got 3 for image 1"),
        ({"labels": torch.tensor([0, 1])}, "labels must be (3,) integers, one for each embedding, got (2,)"),
        ({"labels": torch.zeros(3)}, "labels must be (3,) integers"),
        ({"embeddings": torch.zeros(0, 4)}, "embeddings must be (N, d) floating point with N >= 1, got (0, 4)"),
        ({"prototypes": torch.zeros(3, 5)}, "prototypes must be (K, 4) with K >= 1, got (3, 5)"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    arguments = {"embeddings": torch.ones(3, 4), "prototypes": torch.ones(3, 4), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        protoverb_loss(**{**arguments, **changes})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
