"""Residual addition and LayerNorm after a linear: forward and backward.

    pytest bench/bench_residual_norm.py --benchmark-only

Two settings. "plain" adds the output of a linear to the residual stream and normalises; its peer "addmm" lets the
matrix product add the residual itself (`torch.addmm` with beta=1), then runs LayerNorm. "LayerScale and drop path" has
a factor per channel and per image as well, which a matrix product cannot apply; there the definition compiled, which
fuses all but the product, is the peer on a CPU too. The linear, without a bias, is part of what is timed. Every
implementation is checked against the definition in float64 first.
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
from vptm_kernels.residual_norm.reference import residual_norm_reference

DEVICE = timing.selection.device
EPS = 1e-6
# (rows of all images, channels): BEiT-B/16 at 224 with a batch of 64 and of 1, BEiT-L/16. On a CPU a batch of 4.
SIZES = [(64, 197, 768), (1, 197, 768), (64, 197, 1024)] if DEVICE == "cuda" else [(4, 197, 768)]
if timing.selection.tiny:
    SIZES = [(64, 5, 32)]


@dataclass
class Inputs:
    x: Tensor
    inner: Tensor
    weight: Tensor
    gamma: Tensor | None
    row_scale: Tensor | None

    def to(self, dtype: torch.dtype) -> Inputs:
        x, inner, weight = (t.detach().to(dtype) for t in (self.x, self.inner, self.weight))
        gamma, row_scale = (None if t is None else t.to(dtype) for t in (self.gamma, self.row_scale))
        return Inputs(x.requires_grad_(), inner.requires_grad_(), weight, gamma, row_scale)


@lru_cache(maxsize=1)
def _inputs(size: tuple[int, int, int], factors: bool, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    batch, tokens, width = size

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)

    return Inputs(
        x=random(batch, tokens, width),
        inner=random(batch, tokens, width),
        weight=random(width, width, scale=width**-0.5),
        gamma=random(width) if factors else None,
        row_scale=(torch.arange(batch) % 2 * 2.0).to(DEVICE, dtype) if factors else None,
    ).to(dtype)


Implementation = Callable[[Inputs], tuple[Tensor, Tensor]]
Call = Callable[[], tuple[Tensor, ...]]


def _vptm(i: Inputs) -> tuple[Tensor, Tensor]:
    return residual_norm(i.x, F.linear(i.inner, i.weight), gamma=i.gamma, row_scale=i.row_scale, eps=EPS)


def _eager(i: Inputs) -> tuple[Tensor, Tensor]:
    return residual_norm_reference(i.x, F.linear(i.inner, i.weight), gamma=i.gamma, row_scale=i.row_scale, eps=EPS)


def _addmm(i: Inputs) -> tuple[Tensor, Tensor]:
    x_new = torch.addmm(i.x.flatten(0, 1), i.inner.flatten(0, 1), i.weight.mT).view_as(i.x)
    return x_new, F.layer_norm(x_new, x_new.shape[-1:], eps=EPS)


PEERS = {
    "eager": timing.Peer(_eager),
    "addmm": timing.Peer(_addmm),
    **timing.compiled(_eager, long=False),
}


def _takes_part(name: str, factors: bool) -> bool:
    if name == "addmm":
        return not factors
    # a CPU compiles for half a minute: once per direction
    return PEERS[name].mode is None or factors or DEVICE == "cuda"


def _call(implementation: Implementation, inputs: Inputs, direction: str) -> Call:
    """One call; its result is (x_new, normed) or (x_new, normed, dx, dinner)."""
    grads = [torch.ones_like(inputs.x), inputs.x.detach().clone()]

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return implementation(inputs)

    def both() -> tuple[Tensor, ...]:
        outputs = implementation(inputs)
        return (*outputs, *torch.autograd.grad(outputs, [inputs.x, inputs.inner], grads))

    return forward if direction == "forward" else both


@lru_cache(maxsize=1)
def _check(size: tuple[int, int, int], factors: bool, direction: str, dtype: torch.dtype) -> timing.Check:
    inputs = _inputs(size, factors, dtype)
    exact, eager = (_call(_eager, i, direction)() for i in (inputs.to(torch.float64), inputs))
    return timing.within_budget(exact, eager, [2, 2, 3, 3])


def _work(size: tuple[int, int, int], direction: str, dtype: torch.dtype) -> timing.Work:
    """Of what no implementation can avoid, with rows of C channels.

    Forward reads both inputs and the weight and writes both outputs, 4*rows*C + C² elements, 2*rows*C² operations;
    forward and backward also read x_new and two gradients and write two, 9*rows*C + C² elements, 4*rows*C² operations.
    """
    batch, tokens, width = size
    elements = (4 if direction == "forward" else 9) * batch * tokens * width + width**2
    operations = (2 if direction == "forward" else 4) * batch * tokens * width**2
    return timing.Work(elements * dtype.itemsize, operations)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("factors", [False, True], ids=["plain", "LayerScale and drop path"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_residual_norm(
    benchmark: BenchmarkFixture,
    implementation: str,
    size: tuple[int, int, int],
    factors: bool,
    direction: str,
    dtype: torch.dtype,
) -> None:
    kind = "LayerScale and drop path" if factors else "plain"
    if implementation != "vptm" and not _takes_part(implementation, factors):
        pytest.skip(f"not timed: {implementation} takes no part in {kind!r} here")
    batch, tokens, width = size
    benchmark.group = f"residual norm, {kind}, {direction}, {size}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {"batch": batch, "shape": f"{kind}, N={tokens} C={width}, {direction}"}
    inputs, peers = _inputs(size, factors, dtype), timing.present(PEERS)
    forms = {"vptm": _vptm} | {n: p.form(benchmark.group) for n, p in peers.items() if _takes_part(n, factors)}
    timing.report(
        benchmark,
        implementation,
        {name: _call(form, inputs, direction) for name, form in forms.items()},
        check=_check(size, factors, direction, dtype),
        work=_work(size, direction, dtype),
        device=DEVICE,
        dtype=dtype,
        table=(7, 2),
        rounds=15,
        graph=True,
    )
