"""The complexity bench fits what is there, and bytes, which no other process can disturb, grow as the design says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_complexity as bench
from bench import timing


@given(
    exponent=st.floats(-1, 3),
    factor=st.floats(1e-9, 1e3),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=6, unique=True),
)
def test_fit_recovers_the_exponent_of_a_power(exponent, factor, sizes):
    costs = [factor * size**exponent for size in sizes]
    assert bench.fitted_exponent(sizes, costs) == pytest.approx(exponent, abs=1e-6)


def test_a_constant_part_is_subtracted():
    """Above a large constant a linear cost looks nearly constant: fitted without its base it would be wrong."""
    sizes = [1, 2, 4, 8]
    costs = [100 + 3 * size for size in sizes]
    assert bench.fitted_exponent(sizes, costs, base=100) == pytest.approx(1)
    assert bench.fitted_exponent(sizes, costs) < 0.1
    assert bench.fitted_exponent(sizes, [99, 110, 120, 130], base=100) is None, "below its base: no growth to fit"


@pytest.mark.parametrize("sizes, costs", [([1, 2], [1, 2]), ([1, 2, 3], [1, 2])])
def test_too_few_points_are_refused(sizes, costs):
    with pytest.raises(ValueError, match="at least 3 sizes"):
        bench.fitted_exponent(sizes, costs)


class Growing:
    """A clock that takes as many seconds as the run returns."""

    def __call__(self, run):
        return float(run())


@pytest.mark.parametrize("power", [0, 1, 2])
def test_measure_reports_what_the_clock_saw(power):
    sweep = bench.Sweep(lambda size: lambda: 5 + size**power, (2, 4, 8), power, base=0 if power else None)
    found = bench.measure(sweep, rounds=1, clock=Growing())
    assert found["exponent of time"] == pytest.approx(power, abs=0.01)
    assert found["seconds"] == [5 + size**power for size in (2, 4, 8)]


@pytest.mark.parametrize("name", bench.SWEEPS)
def test_every_exponent_is_fitted_as_designed(name):
    """By a clock that counts floating-point operations: quadratic in N inside attention alone, linear in P, B and K,
    constant in the number of tasks. A sweep of something else, or fitted against something else, shows here."""
    # float32 may run in oneDNN, which is not counted
    sweep = replace(bench.SWEEPS[name], make=partial(bench.SWEEPS[name].make, dtype=torch.float64))

    def operations(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops())

    found = bench.measure(sweep, rounds=1, clock=operations)
    assert found["exponent of time"] == pytest.approx(sweep.expected, abs=0.03)
    assert (
        found["expected exponent of time"]
        == sweep.expected
        == {"tokens N, attention alone": 2, "tasks": 0}.get(name, 1)
    )
    largest = sweep.sizes[-1]
    assert found["seconds"][-1] == sweep.work(largest, torch.float64).operations, "what its share of the ceiling is of"


@pytest.mark.parametrize(
    "make, sizes, base, low, high",
    [
        (bench.tasks, (4, 16, 64), None, -0.02, 0.02),
        (bench.model_batch, (1, 2, 4), None, 0.8, 1.05),
        (bench.classes, (100, 200, 400), 1, 0.9, 1.1),
    ],
    ids=["tasks", "batch", "classes"],
)
def test_peak_memory_grows_as_designed(make, sizes, base, low, high):
    """Constant in the number of tasks, linear in batch and classes: a copy of the pool per image would show here."""
    held = {size: timing.peak_extra_bytes(make(size), "cpu") for size in (*sizes, *([] if base is None else [base]))}
    exponent = bench.fitted_exponent(sizes, [held[size] for size in sizes], 0 if base is None else held[base])
    assert low <= exponent <= high, held


def test_attention_is_what_is_replaced():
    """If the encoder called attention by another name, the sweep without attention would time it unnoticed."""
    called = []

    def seen(qkv, *_, **__):
        called.append(qkv.shape)
        return qkv[..., : qkv.shape[-1] // 3]

    run = bench._forward(12, 10, 1)
    original, bench.vptm.frozen.folded.prompted_attention = bench.vptm.frozen.folded.prompted_attention, seen
    try:
        run()
    finally:
        bench.vptm.frozen.folded.prompted_attention = original
    assert len(called) >= 3, "every block before the read-out"
