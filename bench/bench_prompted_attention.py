"""Attention of image tokens to a prompt prefix and to themselves, with a relative position bias: forward and backward.

    pytest bench/bench_prompted_attention.py --benchmark-only

Peers get what they need: prompts concatenated to keys and values, and the bias as timm builds it (gathered from the
table, permuted, made contiguous) with zero columns for prompts. `scaled_dot_product_attention` runs once per backend,
by force: the backend it would choose can be wrong (cuDNN before 9.26 with a mask). "flash, no bias" computes less
than the others and is there as the speed of light. Every implementation is checked against the definition in float64
first; one that exceeds its error budget is reported and not timed.

`extra_info` holds the bytes that must move and the floating-point operations (formulas in `_work`), and `share of
ceiling`: the time this machine needs for them at its own measured copy bandwidth and matrix rate, over the measured
time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench import timing
from vptm_kernels import RelativePositionBias, prompted_attention
from vptm_kernels.prompted_attention.bias import table_rows
from vptm_kernels.prompted_attention.reference import prompted_attention_reference

DEVICE, DTYPE = timing.selection.device, timing.selection.dtypes[0]
CUDA = DEVICE == "cuda"


@dataclass(frozen=True)
class Shape:
    batch: int
    prompts: int
    window: tuple[int, int] = (14, 14)
    heads: int = 12
    head_dim: int = 64

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1] + 1

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} N={self.tokens} P={self.prompts} D={self.head_dim}"


# BEiT-B/16 at 224 in a training batch, without prompts, with a few and with as many as VPT uses; one image, where
# launches and tails decide; and BEiT-L/16 at 384, whose bias outgrows the first-level cache. Then the rest of what VPT
# uses. On a CPU a batch of two.
SHAPES = (
    [
        *(Shape(64, prompts) for prompts in (0, 50, 10)),
        Shape(1, 50),
        Shape(16, 50, (24, 24), 16),
        *(Shape(64, prompts) for prompts in (100, 200)),
        *(Shape(batch, 50) for batch in (8, 256)),
    ]
    if timing.selection.full
    else [Shape(2, 0), Shape(2, 50)]
)


@dataclass
class Inputs:
    qkv: Tensor
    prompts: Tensor
    bias: RelativePositionBias
    frozen_bias: Tensor
    grad: Tensor


@cache
def _inputs(shape: Shape) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    width = shape.heads * shape.head_dim

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, DTYPE)

    table = torch.randn(table_rows(shape.window), shape.heads, generator=generator).to(DEVICE)
    bias = RelativePositionBias(table, shape.window)
    return Inputs(
        qkv=random(shape.batch, shape.tokens, 3 * width).requires_grad_(),
        prompts=random(shape.prompts, 2 * width).requires_grad_(),
        bias=bias,
        frozen_bias=bias.dense(torch.float16 if CUDA else DTYPE),
        grad=random(shape.batch, shape.tokens, width),
    )


def _vptm(shape: Shape, x: Inputs) -> Tensor:
    out = prompted_attention(x.qkv, x.prompts, num_heads=shape.heads, bias=x.frozen_bias)
    assert isinstance(out, Tensor)
    return out


def _concatenated(shape: Shape, x: Inputs, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = x.qkv.view(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim).permute(2, 0, 3, 1, 4)
    pk, pv = x.prompts.view(shape.prompts, 2, shape.heads, shape.head_dim).permute(1, 2, 0, 3)
    k = torch.cat([k, pk.expand(shape.batch, -1, -1, -1)], 2)
    v = torch.cat([v, pv.expand(shape.batch, -1, -1, -1)], 2)
    mask = pad(x.bias.dense().contiguous(), (0, shape.prompts)).to(DTYPE)[None] if biased else None
    return q, k, v, mask


def _sdpa(shape: Shape, x: Inputs, backend: SDPBackend | None, biased: bool = True) -> Tensor:
    q, k, v, mask = _concatenated(shape, x, biased)
    chosen: AbstractContextManager[object] = nullcontext() if backend is None else sdpa_kernel(backend)
    with chosen:
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _eager(shape: Shape, x: Inputs) -> Tensor:
    return prompted_attention_reference(x.qkv, x.prompts, num_heads=shape.heads, bias=x.bias)[0]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(shape: Shape, x: Inputs) -> Tensor:
    q, k, v, mask = _concatenated(shape, x, True)
    assert mask is not None
    dense = mask[0]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + dense[h, i, j]

    return _compiled_flex()(q, k, v, score_mod=add_bias).transpose(1, 2).flatten(2)


Implementation = Callable[[Shape, Inputs], Tensor]


def _forced(backend: SDPBackend, biased: bool = True) -> Implementation:
    return lambda shape, x: _sdpa(shape, x, backend, biased)


PEERS = {
    "eager": timing.Peer(_eager),
    "sdpa": timing.Peer(lambda shape, x: _sdpa(shape, x, None)),
    "sdpa efficient": timing.Peer(_forced(SDPBackend.EFFICIENT_ATTENTION), needs=("cuda",)),
    "sdpa cudnn": timing.Peer(_forced(SDPBackend.CUDNN_ATTENTION), needs=("cuda",)),
    "sdpa math": timing.Peer(_forced(SDPBackend.MATH), needs=("cuda",)),
    "flex compiled": timing.Peer(_flex, needs=("cuda",)),
    "flash, no bias": timing.Peer(_forced(SDPBackend.FLASH_ATTENTION, biased=False), needs=("cuda",), paired=False),
}
IMPLEMENTATIONS: dict[str, Implementation] = {"vptm": _vptm} | {name: peer.run for name, peer in PEERS.items()}


def _call(implementation: Implementation, shape: Shape, direction: str) -> Callable[[], object]:
    x = _inputs(shape)
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return implementation(shape, x)

        return forward

    def both() -> object:
        return torch.autograd.grad(implementation(shape, x), [x.qkv, x.prompts], x.grad, allow_unused=True)

    return both


@cache
def _exact(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, dqkv, dprompts of the definition on two images, in float64 or in the dtype that is timed."""
    x = _inputs(shape)
    qkv, prompts = (t.detach().to(dtype).requires_grad_() for t in (x.qkv[:2], x.prompts))
    bias = x.bias._replace(table=x.bias.table.to(dtype))
    out, _ = prompted_attention_reference(qkv, prompts, num_heads=shape.heads, bias=bias)
    grads = torch.autograd.grad(out, [qkv, prompts], x.grad[:2].to(dtype))
    return out.detach(), *grads


def _check(shape: Shape) -> timing.Check:
    """Of an implementation's name and what `_two_images` gives for it."""
    return timing.within_budget(_exact(shape, torch.float64), _exact(shape, DTYPE), [2, 3, 3])


def _two_images(implementation: Implementation, shape: Shape) -> tuple[Tensor, ...]:
    """out, dqkv and dprompts of the first images alone: the definition in float64 has no room for a whole batch."""
    x = _inputs(shape)
    few = Inputs(x.qkv[:2].detach().requires_grad_(), x.prompts, x.bias, x.frozen_bias, x.grad[:2])
    small = Shape(len(few.qkv), shape.prompts, shape.window, shape.heads, shape.head_dim)
    out = implementation(small, few)
    return out.detach(), *torch.autograd.grad(out, [few.qkv, few.prompts], few.grad)


def _work(shape: Shape, direction: str) -> tuple[int, int]:
    """(bytes, floating-point operations) that no implementation can avoid.

    Forward reads qkv and the prompts and writes out: (4*B*N + 2*P) * H*D elements; 4*B*H*N*(N+P)*D operations. Forward
    and backward together read qkv, out and dout again and write dqkv and dprompts: (13*B*N + 6*P) * H*D elements, and
    recompute the scores: 14*B*H*N*(N+P)*D operations.
    """
    width, pairs = shape.heads * shape.head_dim, shape.tokens * (shape.tokens + shape.prompts)
    rows = shape.batch * shape.tokens
    elements = (4 * rows + 2 * shape.prompts if direction == "forward" else 13 * rows + 6 * shape.prompts) * width
    operations = (4 if direction == "forward" else 14) * shape.batch * shape.heads * pairs * shape.head_dim
    return elements * torch.finfo(DTYPE).bits // 8, operations


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_prompted_attention(benchmark: BenchmarkFixture, name: str, shape: Shape, direction: str) -> None:
    benchmark.group = f"prompted attention, {direction}, {shape}, {DTYPE}, {DEVICE}"
    runs: dict[str, timing.Run] = {name: _call(IMPLEMENTATIONS[name], shape, direction)}
    refused: dict[str, str] = {}
    if name == "vptm":
        # whoever is wrong on two images is not timed on all of them
        _check(shape)("vptm", _two_images(_vptm, shape))
        for peer, other in timing.present(PEERS).items():
            why = timing.refusal(peer, lambda run=other.run: _two_images(run, shape), _check(shape))  # type: ignore[misc]
            if other.paired and why is None:
                runs[peer] = _call(other.run, shape, direction)
            elif other.paired and why is not None:
                refused[peer] = why
    elif PEERS[name].paired and (
        why := timing.refusal(name, lambda: _two_images(IMPLEMENTATIONS[name], shape), _check(shape))
    ):
        pytest.skip(f"not timed: {why}")
    found = timing.compare(runs, name, check=None, rounds=15, device=DEVICE, graph=True)
    found.refused |= refused
    moved, operations = _work(shape, direction)
    benchmark.extra_info |= found.info() | {
        "implementation": name,
        "prompt_length": shape.prompts,
        "batch": shape.batch,
        "shape": f"H={shape.heads} N={shape.tokens} D={shape.head_dim}, {direction}",
        "dtype": str(DTYPE),
        "peak extra bytes": {name: timing.peak_extra_bytes(runs[name], DEVICE)},
    }
    benchmark.extra_info |= timing.work_info(found.median(name), moved, operations, DEVICE, DTYPE)
    benchmark.pedantic(timing.finished(runs[name], DEVICE), rounds=7, warmup_rounds=2)
