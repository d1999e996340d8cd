"""How time and memory grow: fitted exponents in tokens N, prompts P, batch B, classes K and tasks.

    pytest bench/bench_complexity.py --benchmark-only

Each bench doubles one size and fits the exponent e of cost ~ size^e by least squares on logarithms, of the median time
of interleaved runs and of the peak memory beyond the inputs. Where part of the cost does not depend on the size, the
cost at a base size is subtracted first: the growth with P is fitted above P = 0. What should be found: 2 in N inside
attention and 1 outside of it, 1 in B, P and K, 0 in the number of tasks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.beit import Beit
from torch import Tensor

import vptm.encoder
from bench import timing
from vptm import PromptedBEiT
from vptm_kernels import FoldedHead, prompted_attention, prototype_cosine

DEVICE, DTYPE, FULL = timing.selection.device, timing.selection.dtypes[0], timing.selection.full
ROUNDS = 9


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


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale).to(DEVICE, DTYPE)


def _no_grad(call: Callable[[], object]) -> timing.Run:
    def run() -> object:
        with torch.inference_mode():
            return call()

    return run


def attention_tokens(side: int) -> timing.Run:
    """Attention alone, without prompts, over side^2 + 1 tokens."""
    heads = 12
    qkv = _random(64 if FULL else 1, side**2 + 1, 3 * 64 * heads)
    return _no_grad(lambda: prompted_attention(qkv, num_heads=heads))


@cache
def _model(side: int, prompts: int) -> PromptedBEiT:
    """BEiT-B/16 or on a CPU four blocks of a third of its width."""
    torch.manual_seed(0)
    width, depth, heads = (768, 12, 12) if FULL else (256, 4, 4)
    backbone = Beit(
        img_size=16 * side,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are what is timed
        model = PromptedBEiT(
            backbone, 10, prompt_mode="deep", prompt_length=prompts, readout="cls", token_activation="hidden"
        )
    return model.eval().to(DEVICE, DTYPE)


def _forward(side: int, prompts: int, batch: int) -> timing.Run:
    model, images = _model(side, prompts), _random(batch, 3, 16 * side, 16 * side)
    return _no_grad(lambda: model.forward_hidden(images))


def model_without_attention(side: int) -> timing.Run:
    """The whole model with attention replaced by a copy of the queries: what is left must be linear in N."""
    run = _forward(side, 10, 16 if FULL else 1)

    def copied(qkv: Tensor, *_: object, **__: object) -> Tensor:
        return qkv[..., : qkv.shape[-1] // 3].clone()

    def replaced() -> object:
        original, vptm.encoder.prompted_attention = vptm.encoder.prompted_attention, copied  # type: ignore
        try:
            return run()
        finally:
            vptm.encoder.prompted_attention = original  # type: ignore

    return replaced


def model_prompts(prompts: int) -> timing.Run:
    return _forward(14, prompts, 16 if FULL else 1)


def model_batch(batch: int) -> timing.Run:
    return _forward(14, 10, batch)


def classes(count: int) -> timing.Run:
    """The verbalizer of a saved adapter, to `count` classes."""
    width, dim = 768, 128
    head = FoldedHead(_random(dim, width, scale=width**-0.5), _random(dim))
    hidden, prototypes = _random(64, width), _random(count, dim)
    return _no_grad(lambda: prototype_cosine(hidden, head, None, prototypes))


def tasks(count: int) -> timing.Run:
    """One batch, every image of a task of its own, out of `count` tasks that are held."""
    heads, prompts, batch = 12, 10, 64 if FULL else 4
    qkv, pool = _random(batch, 197, 3 * 64 * heads), _random(count * prompts, 2 * 64 * heads)
    starts = torch.arange(batch) * (count // batch) * prompts
    ranges = torch.stack([starts, torch.full_like(starts, prompts)], 1).int().to(DEVICE)
    return _no_grad(
        lambda: prompted_attention(qkv, pool, num_heads=heads, prompt_ranges=ranges, max_prompt_length=prompts)
    )


@dataclass(frozen=True)
class Sweep:
    """`make(size)` is one call; `size_of` what is fitted against; `base` a size whose cost is subtracted."""

    make: Callable[[int], timing.Run]
    sizes: tuple[int, ...]
    expected: float
    size_of: Callable[[int], int] = int
    base: int | None = None


def _tokens(side: int) -> int:
    return side**2 + 1


# Sides of the patch grid: 14 is 224 pixels, 24 is 384. On a CPU as few doublings as show an exponent, large enough that
# what a call costs at any size does not bend the line.
SWEEPS = {
    "tokens N, attention alone": Sweep(attention_tokens, (14, 20, 28, 40) if FULL else (12, 17, 24), 2, _tokens),
    "tokens N, without attention": Sweep(model_without_attention, (14, 20, 28) if FULL else (16, 23, 32), 1, _tokens),
    "prompts P, deep": Sweep(model_prompts, (50, 100, 200, 400) if FULL else (200, 400, 800), 1, base=0),
    "batch B": Sweep(model_batch, (16, 32, 64, 128) if FULL else (4, 8, 16), 1),
    "classes K": Sweep(classes, (1000, 4000, 16000, 64000) if FULL else (1000, 2000, 4000), 1, base=1),
    "tasks": Sweep(tasks, (64, 256, 1024) if FULL else (4, 16, 64), 0),
}


def measure(sweep: Sweep, rounds: int = ROUNDS, clock: timing.Clock | None = None) -> dict[str, object]:
    """Sizes, median seconds, peak bytes, and the exponents of both."""
    points = sweep.sizes if sweep.base is None else (sweep.base, *sweep.sizes)
    runs = {str(point): sweep.make(point) for point in points}
    found = timing.compare(runs, str(points[0]), check=None, rounds=rounds, device=DEVICE, clock=clock)
    seconds = {point: found.median(str(point)) for point in points}
    memory = {point: timing.peak_extra_bytes(runs[str(point)], DEVICE) for point in points}
    sizes = [sweep.size_of(point) for point in sweep.sizes]

    def exponent(costs: dict[int, float]) -> float | None:
        base = 0.0 if sweep.base is None else costs[sweep.base]
        found = fitted_exponent(sizes, [costs[point] for point in sweep.sizes], base)
        return None if found is None else round(found, 2)

    return {
        "sizes": sizes,
        "seconds": [seconds[point] for point in sweep.sizes],
        "peak extra bytes": [memory[point] for point in sweep.sizes],
        "exponent of time": exponent(seconds),
        "exponent of memory": exponent({point: float(held) for point, held in memory.items()}),
        "expected exponent of time": sweep.expected,
    }


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=list(SWEEPS))
def bench_complexity(benchmark: BenchmarkFixture, sweep: Sweep) -> None:
    name = next(name for name, other in SWEEPS.items() if other is sweep)
    benchmark.group = f"complexity in {name}, {DTYPE}, {DEVICE}"
    found = measure(sweep)
    benchmark.extra_info |= found | {"sweep": name}
    clock = timing.clock_of(DEVICE)
    largest = sweep.make(sweep.sizes[-1])
    benchmark.pedantic(lambda: clock(largest), rounds=3, warmup_rounds=1)
