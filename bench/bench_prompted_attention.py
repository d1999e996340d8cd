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

import statistics
import time
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

from vptm_kernels import RelativePositionBias, prompted_attention
from vptm_kernels.prompted_attention.bias import table_rows
from vptm_kernels.prompted_attention.reference import prompted_attention_reference
from vptm_kernels.testing import assert_close_to_exact

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
# On a GPU one replay of a graph of so many calls is timed, so that launches are not.
CALLS = 10 if CUDA else 1
PAIRED_ROUNDS = 7


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
# launches and tails decide; and BEiT-L/16 at 384, whose bias outgrows the first-level cache. On a CPU a batch of two.
SHAPES = (
    [Shape(64, 0), Shape(64, 10), Shape(64, 50), Shape(1, 50), Shape(16, 50, (24, 24), 16)]
    if CUDA
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
PEERS: dict[str, Implementation] = {"eager": _eager, "sdpa": lambda s, x: _sdpa(s, x, None)}
if CUDA:
    PEERS = {
        "sdpa efficient": lambda s, x: _sdpa(s, x, SDPBackend.EFFICIENT_ATTENTION),
        "sdpa cudnn": lambda s, x: _sdpa(s, x, SDPBackend.CUDNN_ATTENTION),
        "sdpa math": lambda s, x: _sdpa(s, x, SDPBackend.MATH),
        "flex compiled": _flex,
        "flash, no bias": lambda s, x: _sdpa(s, x, SDPBackend.FLASH_ATTENTION, biased=False),
    }
IMPLEMENTATIONS: dict[str, Implementation] = {"vptm": _vptm, **PEERS}


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


def _refuse_if_wrong(name: str, implementation: Implementation, shape: Shape) -> None:
    x = _inputs(shape)
    few = Inputs(x.qkv[:2].detach().requires_grad_(), x.prompts, x.bias, x.frozen_bias, x.grad[:2])
    small = Shape(len(few.qkv), shape.prompts, shape.window, shape.heads, shape.head_dim)
    out = implementation(small, few)
    found = (out.detach(), *torch.autograd.grad(out, [few.qkv, few.prompts], few.grad))
    for what, actual, exact, eager in zip(
        ("out", "dqkv", "dprompts"), found, _exact(shape, torch.float64), _exact(shape, DTYPE)
    ):
        assert_close_to_exact(f"{name}: {what}", actual, exact, eager, factor=2 if what == "out" else 3)


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


def _seconds(run: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@cache
def _ceilings() -> tuple[float, float]:
    """(bytes per second of a copy, operations per second of a matrix product), both measured here."""
    size = 1 << (28 if CUDA else 24)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    n = 8192 if CUDA else 1024
    a, b = torch.randn(2, n, n).to(DEVICE, DTYPE)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    product = min(_seconds(lambda: a @ b) for _ in range(5))
    return 2 * size / copy, 2 * n**3 / product


def _repeated(run: Callable[[], object]) -> Callable[[], object]:
    """CALLS calls of `run` in one: a CUDA graph on a GPU."""
    if not CUDA:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def bench_prompted_attention(benchmark: BenchmarkFixture, name: str, shape: Shape, direction: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    if name != "flash, no bias":
        try:
            _refuse_if_wrong(name, implementation, shape)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            if name == "vptm":
                raise
            pytest.skip(f"not timed: {str(error).splitlines()[0]}")
    benchmark.group = f"prompted attention, {direction}, {shape}, {DTYPE}, {DEVICE}, {CALLS} calls"
    run = _repeated(_call(implementation, shape, direction))
    benchmark.pedantic(lambda: _seconds(run), rounds=7, warmup_rounds=2)

    moved, operations = _work(shape, direction)
    bandwidth, rate = _ceilings()
    floor = max(moved / bandwidth, operations / rate)
    seconds = benchmark.stats.stats.median / CALLS
    benchmark.extra_info |= {
        "implementation": name,
        "microseconds per call": round(seconds * 1e6, 1),
        "bytes": moved,
        "operations": operations,
        "measured copy bandwidth": bandwidth,
        "measured matrix rate": rate,
        "share of ceiling": round(floor / seconds, 3),
    }
    if name == "vptm":
        peers: dict[str, Callable[[], object]] = {}
        for peer, other in PEERS.items():
            if peer == "flash, no bias":
                continue
            try:
                _refuse_if_wrong(peer, other, shape)
                peers[peer] = _repeated(_call(other, shape, direction))
            except (AssertionError, RuntimeError, NotImplementedError) as error:
                benchmark.extra_info.setdefault("refused", {})[peer] = str(error).splitlines()[0]
        times: dict[str, list[float]] = {each: [] for each in ("vptm", *peers)}
        for _ in range(PAIRED_ROUNDS):
            for each, timed in {"vptm": run, **peers}.items():
                times[each].append(_seconds(timed))
        for peer in peers:
            ratios = [theirs / ours for theirs, ours in zip(times[peer], times["vptm"])]
            benchmark.extra_info[f"speed-up over {peer}"] = round(statistics.median(ratios), 3)
