"""Schedules of the published methods, and the learning rates that an optimiser gets of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from beit_factory import tiny_beit
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import vptm
from vptm.training.schedules import LearningRate, published_rate


def trace(schedule: str, *, lr: float, epochs: int, warmup_epochs: int, steps: int) -> list[float]:
    """Learning rate of every step, read from an optimiser."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = LearningRate(optimiser, schedule, lr=lr, epochs=epochs, warmup_epochs=warmup_epochs, steps=steps)
    rates = []
    for step in range(epochs * steps):
        scheduler.step_update(step)
        rates.append(optimiser.param_groups[0]["lr"])
    return rates


def test_vpt_changes_once_an_epoch_and_starts_at_zero() -> None:
    """100 epochs of 3 steps, 10 of warm-up: epoch 0 learns nothing, epoch 10 is the peak, epoch 55 half of it."""
    rates = trace("vpt", lr=2.0, epochs=100, warmup_epochs=10, steps=3)
    assert rates[:6] == pytest.approx([0.0, 0.0, 0.0, 0.2, 0.2, 0.2])
    assert rates[30] == 2.0 and rates[55 * 3] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1 + math.cos(math.pi * 89 / 90))


def test_provp_warms_up_one_epoch_and_ends_above_zero() -> None:
    """Its values for 200 epochs at 0.1: 1e-5, then the peak, at the end 2.5e-5."""
    rates = trace("provp", lr=0.1, epochs=200, warmup_epochs=1, steps=2)
    assert rates[:4] == pytest.approx([1e-5, 1e-5, 0.1, 0.1])
    assert rates[-1] == pytest.approx(2.467e-5, rel=1e-3)


def test_spt_changes_every_step() -> None:
    """The warm-up rises within an epoch and the decay ends near 1e-8."""
    rates = trace("spt", lr=5e-2, epochs=100, warmup_epochs=10, steps=4)
    assert rates[0] == 0 and rates[1] == pytest.approx(5e-2 / 40) and rates[40] == pytest.approx(5e-2)
    assert all(a > b for a, b in pairwise(rates[40:]))
    assert 1e-8 < rates[-1] < 1e-5


@given(st.sampled_from(["vpt", "spt", "provp"]), st.integers(2, 40), st.integers(0, 10), st.integers(1, 7), st.data())
def test_rates_stay_between_zero_and_the_peak(
    schedule: str, epochs: int, warmup: int, steps: int, data: st.DataObject
) -> None:
    """No combination divides by zero, overshoots, or turns negative."""
    warmup = min(warmup, epochs - 1)
    step = data.draw(st.integers(0, epochs * steps - 1))
    rate = published_rate(schedule, step, lr=0.3, epochs=epochs, warmup_epochs=warmup, steps=steps)
    assert 0 <= rate <= 0.3


def build() -> vptm.PromptedBEiT:
    torch.manual_seed(0)
    return vptm.PromptedBEiT(
        tiny_beit(),
        num_classes=2,
        prompt_length=2,
        prompt_mode="deep",
        readout="cls",
        verbalizer="linear",
        token_activation="hidden",
    )


@pytest.mark.parametrize("schedule", ["cosine", "tanh", "none", "vpt", "spt", "provp"])
def test_a_scaled_group_follows_every_schedule(schedule: str) -> None:
    """Published schedules wrote one rate into all groups; warm-up began at the same rate for all, also for one at 0."""
    groups: list[dict[str, object]] = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(3)]
    groups[1]["lr_scale"], groups[2]["lr_scale"] = 5.0, 0.0
    optimiser = torch.optim.SGD(groups, lr=0.2)
    scheduler = LearningRate(optimiser, schedule, lr=0.2, epochs=5, warmup_epochs=2, steps=3)
    for step, expected in enumerate(trace(schedule, lr=0.2, epochs=5, warmup_epochs=2, steps=3)):
        scheduler.step_update(step)
        assert [group["lr"] for group in optimiser.param_groups] == [expected, 5.0 * expected, 0.0]
        assert scheduler.rate == expected


def test_a_constant_rate_warms_up_too() -> None:
    """timm's "none" leaves warm-up out without a word."""
    rates = trace("none", lr=0.4, epochs=4, warmup_epochs=2, steps=2)
    assert rates[:4] == sorted(rates[:4]) and rates[0] == pytest.approx(0.004) and rates[4:] == [0.4] * 4
    assert trace("none", lr=0.4, epochs=2, warmup_epochs=0, steps=2) == [0.4] * 4


def test_fit_is_the_published_loop() -> None:
    """Momentum SGD by hand, rates 0, 0.05, 0.1 by epoch, decay on prompts and head, ends at the same values."""
    images, labels = torch.randn(8, 3, 8, 12), torch.arange(8) % 2
    model, twin = build(), build()
    start = model.prompts.weight.detach().clone()
    result = vptm.fit(
        model,
        DataLoader(TensorDataset(images, labels), batch_size=4),
        epochs=3,
        lr=0.1,
        weight_decay=0.5,
        prompt_weight_decay=0.5,
        optimizer="momentum",
        schedule="vpt",
        warmup_epochs=2,
        progress=False,
    )
    assert [row["lr"] for row in result.history] == pytest.approx([0.0, 0.05, 0.1])
    head = twin.verbalizer.head
    groups = [
        {"params": [head.bias], "weight_decay": 0.0},
        {"params": [twin.prompts.weight, head.weight], "weight_decay": 0.5},
    ]
    optimiser = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for rate in (0.0, 0.05, 0.1):
        for group in optimiser.param_groups:
            group["lr"] = rate
        for batch in (slice(0, 4), slice(4, 8)):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(twin(images[batch]), labels[batch]).backward()
            optimiser.step()
        if rate == 0.0:
            assert torch.equal(twin.prompts.weight, start)
    for name, tensor in twin.learned_state_dict().items():
        assert torch.allclose(tensor, model.learned_state_dict()[name], atol=1e-6), name
