"""One half of a block's way in inference: a linear, its residual addition and the LayerNorm after it.

    pytest bench/bench_shifted_norm.py --benchmark-only

vptm lets the product add to the residual stream, leaves the bias out of it and adds it inside the norm
(`shifted_norm`). Its peers keep the bias: "eager" adds what `F.linear` gives, then normalises; "residual_norm" is the
op of this library that does those two in one pass; "compiled" is eager compiled. Every one is checked against the
definition in float64 first, by the normalised rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from bench import timing
from vptm_kernels.residual_norm import residual_norm
from vptm_kernels.shifted_norm import shifted_norm

DEVICE = timing.selection.device
EPS = 1e-6
# (images, rows, channels): BEiT-B/16 at 224 with a batch of 64 and of 1, BEiT-L/16. On a CPU a batch of 4.
SIZES = [(64, 197, 768), (1, 197, 768), (64, 197, 1024)] if DEVICE == "cuda" else [(4, 197, 768)]
if timing.selection.tiny:
    SIZES = [(64, 5, 32)]


@dataclass
class Inputs:
    x: Tensor
    inner: Tensor
    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.to(dtype) for t in (self.x, self.inner, self.weight, self.bias)))


@lru_cache(maxsize=1)
def _inputs(size: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    *_, width = size
    x, inner = (torch.randn(*size, generator=generator) for _ in range(2))
    weight, bias = torch.randn(width, width, generator=generator) * width**-0.5, torch.randn(width, generator=generator)
    return Inputs(*(t.to(DEVICE, dtype) for t in (x, inner, weight, bias)))


def _vptm(i: Inputs) -> Tensor:
    # the stream of a model is one that nobody else holds; a bench has to leave it for the next turn
    x = torch.addmm(i.x.flatten(0, 1), i.inner.flatten(0, 1), i.weight.mT).view_as(i.x)
    return shifted_norm(x, i.bias, eps=EPS)


def _eager(i: Inputs) -> Tensor:
    return F.layer_norm(i.x + F.linear(i.inner, i.weight, i.bias), i.x.shape[-1:], eps=EPS)


def _residual_norm(i: Inputs) -> Tensor:
    return residual_norm(i.x, F.linear(i.inner, i.weight, i.bias), eps=EPS)[1]


PEERS = {
    "eager": timing.Peer(_eager),
    "residual_norm": timing.Peer(_residual_norm),
    **timing.compiled(_eager, long=False),
}


def _work(size: tuple[int, int, int], dtype: torch.dtype) -> timing.Work:
    """Of what no implementation can avoid: both inputs and the weight read, both outputs written, one product."""
    batch, tokens, width = size
    elements = 4 * batch * tokens * width + width**2
    return timing.Work(elements * dtype.itemsize, 2 * batch * tokens * width**2)


def _call(form: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.inference_mode():
            return form(inputs)

    return call


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_shifted_norm(
    benchmark: BenchmarkFixture, implementation: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, tokens, width = size
    benchmark.group = f"shifted norm, {size}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"batch": batch, "shape": f"N={tokens} C={width}"}
    inputs = _inputs(size, dtype)
    forms = {"vptm": _vptm} | {name: peer.form(benchmark.group) for name, peer in timing.present(PEERS).items()}
    exact, eager = (_call(_eager, each)() for each in (inputs.to(torch.float64), inputs))
    timing.report(
        benchmark,
        implementation,
        {name: _call(form, inputs) for name, form in forms.items()},
        check=timing.within_budget([exact], [eager], [2]),
        work=_work(size, dtype),
        device=DEVICE,
        dtype=dtype,
        table=(7, 2),
        rounds=15,
        graph=True,
    )
