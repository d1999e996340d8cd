"""How time and memory grow: fitted exponents in tokens N, prompts P, batch B, classes K and tasks.

    pytest bench/bench_complexity.py --benchmark-only

Each bench doubles one size and fits the exponent e of cost ~ size^e by least squares on logarithms, of the median time
of interleaved runs and of the peak memory beyond the inputs. Where part of the cost does not depend on the size, the
cost at a base size is subtracted first: the growth with P is fitted above P = 0. What should be found: 2 in N inside
attention and 1 outside of it, 1 in B, P and K, 0 in the number of tasks.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import vptm.frozen.folded
from bench import bench_model, timing
from vptm import PromptedBEiT
from vptm_kernels import FoldedHead, prompted_attention, prototype_cosine

DEVICE = timing.selection.device
# a CPU has no time for these
FULL = DEVICE == "cuda" and timing.selection.full
FIRST_DTYPE = timing.selection.dtypes[0]
ROUNDS = 9
WIDTH, DIM = 768, 128
BATCH = 16 if FULL else 1
# BEiT-B/16 or on a CPU four blocks of a third of its width
SIZE = "B" if FULL else "four blocks of 256"
bench_model.SIZES["four blocks of 256"] = (48, 2, 3) if timing.selection.tiny else (256, 4, 4)


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float], base: float = 0.0) -> float | None:
    """e of `cost - base ~ size^e`, by least squares on logarithms; None where a cost does not exceed the base."""
    if len(sizes) != len(costs) or len(sizes) < 3:
        raise ValueError(f"an exponent needs at least 3 sizes with a cost each, got {len(sizes)} and {len(costs)}")
    above = [cost - base for cost in costs]
    if min(above) <= 0:
        return None
    x, y = ([math.log(value) for value in values] for values in (sizes, above))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / sum((a - mean_x) ** 2 for a in x)


# ------------------------------------------------------------------ what is measured


def _random(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale).to(DEVICE, dtype)


def _no_grad(call: Callable[[], object]) -> timing.Run:
    def run() -> object:
        with torch.inference_mode():
            return call()

    return run


def attention_tokens(side: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    """Attention alone, without prompts, over side^2 + 1 tokens."""
    heads = 12
    qkv = _random(dtype, 64 if FULL else 1, side**2 + 1, 3 * 64 * heads)
    return _no_grad(lambda: prompted_attention(qkv, num_heads=heads))


# one at a time beyond those that a sweep uses
@lru_cache(maxsize=1)
def _model(side: int, prompts: int, dtype: torch.dtype) -> PromptedBEiT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            copy.deepcopy(bench_model._backbone(SIZE, 16 * side)),
            10,
            prompt_mode="deep",
            prompt_length=prompts,
            readout="cls",
            token_activation="hidden",
        )
    return model.eval().to(DEVICE, dtype)


def _forward(side: int, prompts: int, batch: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    model, images = _model(side, prompts, dtype), _random(dtype, batch, 3, 16 * side, 16 * side)
    return _no_grad(lambda: model.forward_hidden(images))


def model_without_attention(side: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    """The whole model with attention replaced by a copy of the queries: what is left must be linear in N."""
    run = _forward(side, 10, BATCH, dtype)

    def copied(qkv: Tensor, *_: object, **__: object) -> Tensor:
        return qkv[..., : qkv.shape[-1] // 3].clone()

    def replaced() -> object:
        original, vptm.frozen.folded.prompted_attention = vptm.frozen.folded.prompted_attention, copied  # type: ignore
        try:
            return run()
        finally:
            vptm.frozen.folded.prompted_attention = original  # type: ignore

    return replaced


def model_prompts(prompts: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    return _forward(14, prompts, BATCH, dtype)


def model_batch(batch: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    return _forward(14, 10, batch, dtype)


def classes(count: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    """The verbalizer of a saved adapter, to `count` classes."""
    head = FoldedHead(_random(dtype, DIM, WIDTH, scale=WIDTH**-0.5), _random(dtype, DIM))
    hidden, prototypes = _random(dtype, 64, WIDTH), _random(dtype, count, DIM)
    return _no_grad(lambda: prototype_cosine(hidden, head, None, prototypes))


def tasks(count: int, dtype: torch.dtype = FIRST_DTYPE) -> timing.Run:
    """One batch, every image of a task of its own, out of `count` tasks that are held."""
    heads, prompts, batch = 12, 10, 64 if FULL else 4
    qkv, pool = _random(dtype, batch, 197, 3 * WIDTH), _random(dtype, count * prompts, 2 * WIDTH)
    starts = torch.arange(batch) * (count // batch) * prompts
    ranges = torch.stack([starts, torch.full_like(starts, prompts)], 1).int().to(DEVICE)
    return _no_grad(
        lambda: prompted_attention(qkv, pool, num_heads=heads, prompt_ranges=ranges, max_prompt_length=prompts)
    )


# ------------------------------------------------------------------ what it must cost


def _attention_work(batch: int, tokens: int, prompts: int, dtype: torch.dtype) -> timing.Work:
    """4 B N C + 2 P C elements, 4 B N (N+P) C operations; of a pool, the prompts of one image are read by it alone."""
    elements = (4 * batch * tokens + 2 * prompts) * WIDTH
    return timing.Work(elements * dtype.itemsize, 4 * batch * tokens * (tokens + prompts) * WIDTH)


def _model_work(side: int, prompts: int, batch: int, dtype: torch.dtype) -> timing.Work:
    return bench_model.work(bench_model.Setting("deep", prompts, batch, SIZE, 16 * side), dtype)


def _without_attention_work(side: int, dtype: torch.dtype) -> timing.Work:
    """Less both products of every block but the last."""
    whole, (width, depth, _), tokens = _model_work(side, 10, BATCH, dtype), bench_model.SIZES[SIZE], _tokens(side)
    return whole._replace(operations=whole.operations - 4 * (depth - 1) * BATCH * tokens * (tokens + 10) * width)


def _classes_work(count: int, dtype: torch.dtype) -> timing.Work:
    """64 images: 64 (C + K) + d (C + 1 + K) elements, 2 * 64 d (C + K) operations."""
    elements = 64 * (WIDTH + count) + DIM * (WIDTH + 1 + count)
    return timing.Work(elements * dtype.itemsize, 2 * 64 * DIM * (WIDTH + count))


def _tasks_work(count: int, dtype: torch.dtype) -> timing.Work:
    batch = 64 if FULL else 4
    one = _attention_work(batch, 197, 10, dtype)
    return one._replace(moved=one.moved + 2 * (batch - 1) * 10 * WIDTH * dtype.itemsize)


@dataclass(frozen=True)
class Sweep:
    """`make(size)` is one call, `work(size, dtype)` what it must cost; `size_of` what is fitted against; `base` a size
    whose cost is subtracted."""

    make: Callable[..., timing.Run]
    sizes: tuple[int, ...]
    expected: float
    size_of: Callable[[int], int] = int
    base: int | None = None
    work: Callable[[int, torch.dtype], timing.Work] | None = None


def _tokens(side: int) -> int:
    return side**2 + 1


# Sides of the patch grid: 14 is 224 pixels, 24 is 384. On a CPU as few doublings as show an exponent, large enough that
# what a call costs at any size does not bend the line.
SWEEPS = {
    "tokens N, attention alone": Sweep(
        attention_tokens,
        (14, 20, 28, 40) if FULL else (12, 17, 24),
        2,
        _tokens,
        work=lambda side, dtype: _attention_work(64 if FULL else 1, _tokens(side), 0, dtype),
    ),
    "tokens N, without attention": Sweep(
        model_without_attention, (14, 20, 28) if FULL else (16, 23, 32), 1, _tokens, work=_without_attention_work
    ),
    "prompts P, deep": Sweep(
        model_prompts,
        (50, 100, 200, 400) if FULL else (200, 400, 800),
        1,
        base=0,
        work=lambda prompts, dtype: _model_work(14, prompts, BATCH, dtype),
    ),
    "batch B": Sweep(
        model_batch,
        (16, 32, 64, 128) if FULL else (4, 8, 16),
        1,
        work=lambda batch, dtype: _model_work(14, 10, batch, dtype),
    ),
    "classes K": Sweep(
        classes, (1000, 4000, 16000, 64000) if FULL else (1000, 2000, 4000), 1, base=1, work=_classes_work
    ),
    "tasks": Sweep(tasks, (64, 256, 1024) if FULL else (4, 16, 64), 0, work=_tasks_work),
}


def measure(sweep: Sweep, rounds: int = ROUNDS, clock: timing.Clock | None = None) -> dict[str, object]:
    """Sizes, median seconds, peak bytes, and the exponents of both; the memory of the largest as a call of vptm."""
    points = sweep.sizes if sweep.base is None else (sweep.base, *sweep.sizes)
    runs = {str(point): sweep.make(point) for point in points}
    found = timing.compare(runs, str(points[0]), check=None, rounds=rounds, device=DEVICE, clock=clock)
    seconds = {point: found.median(str(point)) for point in points}
    memory = {point: timing.peak_extra_bytes(runs[str(point)], DEVICE, warm=True) for point in points}
    sizes = [sweep.size_of(point) for point in sweep.sizes]

    def exponent(costs: dict[int, float]) -> float | None:
        base = 0.0 if sweep.base is None else costs[sweep.base]
        found = fitted_exponent(sizes, [costs[point] for point in sweep.sizes], base)
        return None if found is None else round(found, 2)

    return {
        "sizes": sizes,
        "seconds": [seconds[point] for point in sweep.sizes],
        "peak bytes by size": [memory[point] for point in sweep.sizes],
        "peak extra bytes": {"vptm": memory[sweep.sizes[-1]]},
        "exponent of time": exponent(seconds),
        "exponent of memory": exponent({point: float(held) for point, held in memory.items()}),
        "expected exponent of time": sweep.expected,
    }


@pytest.mark.parametrize("grows", SWEEPS)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_complexity(benchmark: BenchmarkFixture, grows: str, dtype: torch.dtype) -> None:
    benchmark.group = f"complexity in {grows}, {dtype}, {DEVICE}"
    sweep = replace(SWEEPS[grows], make=partial(SWEEPS[grows].make, dtype=dtype))
    found = measure(sweep)
    benchmark.extra_info |= found | {"sweep": grows, "dtype": str(dtype), "device": DEVICE}
    size, taken = sweep.sizes[-1], found["seconds"]
    assert sweep.work is not None and isinstance(taken, list)
    benchmark.extra_info |= timing.work_info(taken[-1], *sweep.work(size, dtype), DEVICE, dtype)
    benchmark.pedantic(timing.finished(sweep.make(size), DEVICE), rounds=3, warmup_rounds=1)
