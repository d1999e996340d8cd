"""Attention of image tokens to a prompt prefix and to themselves, with a relative position bias: forward and backward.

    pytest bench/bench_prompted_attention.py --benchmark-only

Peers get what they need: prompts concatenated to keys and values, and the bias as timm builds it (gathered from the
table, permuted, made contiguous) with columns for prompts, of zeros or of their gates. `scaled_dot_product_attention`
runs once per backend, by force: the backend it would choose can be wrong (cuDNN before 9.26 with a mask). FlexAttention
adds the bias itself, in its own kernel and, where flash-attn-4 is installed, in that one's. "flash without bias" and
"flash-attn-4 without bias" compute less than the others and are there as the speed of light. Every implementation is
checked against the definition in float64 first, on two images alone and on the first two of the batch; one that exceeds
its error budget is reported and not timed.

`extra_info` holds the bytes that must move and the floating-point operations (formulas in `_work`), and `share of
ceiling`: the time this machine needs for them at its own measured copy bandwidth and matrix rate, over the measured
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

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

DEVICE = timing.selection.device
CUDA = DEVICE == "cuda"


@dataclass(frozen=True)
class Shape:
    batch: int
    prompts: int
    window: tuple[int, int] = (14, 14)
    heads: int = 12
    head_dim: int = 64
    gated: bool = False

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1] + 1

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} N={self.tokens} P={self.prompts} D={self.head_dim}"
        return f"{sizes} gated" if self.gated else sizes


def _shapes() -> list[tuple[Shape, torch.dtype]]:
    """With every dtype, most important first.

    BEiT-B/16 at 224 in a training batch, without prompts, with a few and with as many as VPT uses; one image, where
    launches and tails decide; and BEiT-L/16 at 384, whose bias outgrows the first-level cache. Then every number of
    prompts, batch, size and resolution. On a CPU a batch of two, on its full grid also 100 prompts and a batch of 16.
    Gated: every head and prompt has a value that is added to its column.
    """
    dtypes = timing.selection.dtypes
    if timing.selection.tiny:
        small = [Shape(batch, prompts, (2, 2), 2, 16) for batch in (64, 1) for prompts in (0, 50, 100)]
        return [(shape, dtype) for dtype in dtypes for shape in small]
    if not CUDA:
        more = [Shape(2, 100), Shape(16, 50)] if timing.selection.full else []
        return list(product([Shape(2, 0), Shape(2, 50), Shape(2, 50, gated=True), *more], dtypes))
    first = [Shape(64, 0), Shape(64, 50), Shape(64, 10), Shape(1, 50), Shape(16, 50, (24, 24), 16)]
    first += [Shape(64, 50, gated=True)]
    grid = product(((14, 14), (24, 24)), (12, 16), (64, 1, 8, 256), (50, 0, 10, 100, 200))
    rest = [Shape(batch, prompts, window, heads) for window, heads, batch, prompts in grid]
    rest = [shape for shape in rest if shape not in first]
    return [(shape, dtype) for part in (first, rest) for dtype in dtypes for shape in part]


SHAPES = _shapes()


@dataclass
class Inputs:
    qkv: Tensor
    prompts: Tensor
    bias: RelativePositionBias
    frozen_bias: Tensor
    gates: Tensor | None
    grad: Tensor


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    width = shape.heads * shape.head_dim

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    table = torch.randn(table_rows(shape.window), shape.heads, generator=generator).to(DEVICE)
    bias = RelativePositionBias(table, shape.window)
    return Inputs(
        qkv=random(shape.batch, shape.tokens, 3 * width).requires_grad_(),
        prompts=random(shape.prompts, 2 * width).requires_grad_(),
        bias=bias,
        frozen_bias=bias.dense(torch.float16 if CUDA else dtype),
        gates=torch.randn(shape.heads, shape.prompts, generator=generator).to(DEVICE) if shape.gated else None,
        grad=random(shape.batch, shape.tokens, width),
    )


def _vptm(shape: Shape, x: Inputs) -> Tensor:
    out = prompted_attention(x.qkv, x.prompts, num_heads=shape.heads, bias=x.frozen_bias, prompt_column_bias=x.gates)
    assert isinstance(out, Tensor)
    return out


def _concatenated(shape: Shape, x: Inputs, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = x.qkv.view(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim).permute(2, 0, 3, 1, 4)
    pk, pv = x.prompts.view(shape.prompts, 2, shape.heads, shape.head_dim).permute(1, 2, 0, 3)
    k = torch.cat([k, pk.expand(shape.batch, -1, -1, -1)], 2)
    v = torch.cat([v, pv.expand(shape.batch, -1, -1, -1)], 2)
    if not biased:
        return q, k, v, None
    mask = pad(x.bias.dense().contiguous(), (0, shape.prompts))
    if x.gates is not None:
        mask += pad(x.gates, (shape.tokens, 0))[:, None]
    return q, k, v, mask.to(x.qkv.dtype)[None]


def _sdpa(shape: Shape, x: Inputs, backend: SDPBackend | None, biased: bool = True) -> Tensor:
    q, k, v, mask = _concatenated(shape, x, biased)
    chosen: AbstractContextManager[object] = nullcontext() if backend is None else sdpa_kernel(backend)
    with chosen:
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def _eager(shape: Shape, x: Inputs) -> Tensor:
    given = {"num_heads": shape.heads, "bias": x.bias, "prompt_column_bias": x.gates}
    return prompted_attention_reference(x.qkv, x.prompts, **given)[0]


def _flex(shape: Shape, x: Inputs, backend: str = "AUTO") -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, mask = _concatenated(shape, x, True)
    assert mask is not None
    dense = mask[0]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + dense[h, i, j]

    # a backend is a choice of CUDA's alone
    options: Any = {"BACKEND": backend} if q.is_cuda else None
    out = flex_attention(q, k, v, score_mod=add_bias, kernel_options=options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)


def _flex_flash(shape: Shape, x: Inputs) -> Tensor:
    return _flex(shape, x, "FLASH")


def _flash_4(shape: Shape, x: Inputs) -> Tensor:
    from flash_attn.cute import flash_attn_func

    q, k, v, _ = _concatenated(shape, x, False)
    out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
    # some versions give the log-sum-exp as well
    out = out if isinstance(out, Tensor) else out[0]
    return out.flatten(2)


def _xformers(shape: Shape, x: Inputs) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v, mask = _concatenated(shape, x, True)
    assert mask is not None
    # it wants rows of eight: a slice of a wider bias, expanded to the batch
    wide = pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
    out = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), wide.expand(shape.batch, -1, -1, -1))
    return out.flatten(2)


Implementation = Callable[[Shape, Inputs], Tensor]


def _forced(backend: SDPBackend, biased: bool = True) -> Implementation:
    return lambda shape, x: _sdpa(shape, x, backend, biased)


PEERS = {
    "eager": timing.Peer(_eager),
    "sdpa": timing.Peer(lambda shape, x: _sdpa(shape, x, None)),
    "sdpa efficient": timing.Peer(_forced(SDPBackend.EFFICIENT_ATTENTION), needs=("cuda",)),
    "sdpa cudnn": timing.Peer(_forced(SDPBackend.CUDNN_ATTENTION), needs=("cuda",)),
    "sdpa math": timing.Peer(_forced(SDPBackend.MATH), needs=("cuda",)),
    "flex compiled": timing.Peer(_flex, mode=timing.MODES[""], long=True),
    "flex flash compiled": timing.Peer(_flex_flash, needs=("cuda", "flash_attn.cute"), mode=timing.MODES[""]),
    "xformers": timing.Peer(_xformers, needs=("cuda", "xformers")),
    **timing.compiled(_eager),
    "flash without bias": timing.Peer(_forced(SDPBackend.FLASH_ATTENTION, biased=False), needs=("cuda",), paired=False),
    "flash-attn-4 without bias": timing.Peer(_flash_4, needs=("cuda", "flash_attn.cute"), paired=False),
}
# FlexAttention has no backward on a CPU
FORWARD_ONLY = () if CUDA else ("flex compiled",)
Call = Callable[[], Any]


def _detached(x: Inputs) -> Inputs:
    return replace(x, qkv=x.qkv.detach(), prompts=x.prompts.detach())


def _no_backward() -> None:
    raise NotImplementedError("FlexAttention has no backward on a CPU")


def _forms(group: str) -> dict[str, Implementation]:
    return {"vptm": _vptm} | {name: peer.form(group) for name, peer in timing.present(PEERS).items()}


def _call(implementation: Implementation, shape: Shape, x: Inputs, direction: str) -> Call:
    """One call; its result is out, or (dqkv, dprompts)."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return implementation(shape, x)

        return forward

    return lambda: torch.autograd.grad(implementation(shape, x), [x.qkv, x.prompts], x.grad, allow_unused=True)


def _two_images(implementation: Implementation, shape: Shape, x: Inputs, gradients: bool = True) -> tuple[Tensor, ...]:
    """out, dqkv and dprompts of the first images alone: the definition in float64 has no room for a whole batch."""
    few = replace(x, qkv=x.qkv[:2].detach().requires_grad_(), grad=x.grad[:2])
    few_images = replace(shape, batch=len(few.qkv))
    if not gradients:
        return (implementation(few_images, _detached(few)),)
    out = implementation(few_images, few)
    return out.detach(), *torch.autograd.grad(out, [few.qkv, few.prompts], few.grad)


@lru_cache(maxsize=4)
def _exact(shape: Shape, dtype: torch.dtype, of: torch.dtype, biased: bool) -> tuple[Tensor, ...]:
    """out, dqkv, dprompts of the definition on two images, in float64 or in the dtype that is timed."""
    x = _inputs(shape, of)
    qkv, prompts = (t.detach().to(dtype).requires_grad_() for t in (x.qkv[:2], x.prompts))
    bias = x.bias._replace(table=x.bias.table.to(dtype)) if biased else None
    gates = None if x.gates is None or not biased else x.gates.to(dtype)
    out, _ = prompted_attention_reference(qkv, prompts, num_heads=shape.heads, bias=bias, prompt_column_bias=gates)
    grads = torch.autograd.grad(out, [qkv, prompts], x.grad[:2].to(dtype))
    return out.detach(), *grads


def _check(shape: Shape, dtype: torch.dtype, direction: str, forms: Mapping[str, Implementation]) -> timing.Check:
    """Of the first two images, alone and in the batch: what a batch adds to them is that there are others."""
    x, factors = _inputs(shape, dtype), [2, 3, 3]
    which = 0 if direction == "forward" else 1

    def check(name: str, found: Tensor | tuple[Tensor, ...]) -> None:
        biased = name == "vptm" or PEERS[name].paired
        exact, eager = (_exact(shape, each, dtype, biased) for each in (torch.float64, dtype))
        alone = _two_images(forms[name], shape, x, gradients=name not in FORWARD_ONLY)
        some = len(alone)
        timing.within_budget(exact[:some], eager[:some], factors[:some])(name, alone)
        results = (found,) if isinstance(found, Tensor) else found
        assert all(t is None or t.isfinite().all() for t in results), f"{name}: not finite in the batch"
        in_batch = timing.within_budget(exact[which : which + 1], eager[which : which + 1], factors[which:])
        in_batch(f"{name}: in the batch", results[0][:2])

    return check


def _work(shape: Shape, dtype: torch.dtype, direction: str) -> timing.Work:
    """Of what no implementation can avoid.

    Forward reads qkv and the prompts and writes out: (4*B*N + 2*P) * H*D elements; 4*B*H*N*(N+P)*D operations. Forward
    and backward together read qkv, out and dout again and write dqkv and dprompts: (13*B*N + 6*P) * H*D elements, and
    recompute the scores: 14*B*H*N*(N+P)*D operations.
    """
    width, pairs = shape.heads * shape.head_dim, shape.tokens * (shape.tokens + shape.prompts)
    rows = shape.batch * shape.tokens
    elements = (4 * rows + 2 * shape.prompts if direction == "forward" else 13 * rows + 6 * shape.prompts) * width
    operations = (4 if direction == "forward" else 14) * shape.batch * shape.heads * pairs * shape.head_dim
    return timing.Work(elements * dtype.itemsize, operations)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=timing.label)
def bench_prompted_attention(
    benchmark: BenchmarkFixture, implementation: str, shape: Shape, dtype: torch.dtype, direction: str
) -> None:
    benchmark.group = f"prompted attention, {direction}, {shape}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {
        "prompt_length": shape.prompts,
        "batch": shape.batch,
        "shape": f"H={shape.heads} N={shape.tokens} D={shape.head_dim}{' gated' * shape.gated}, {direction}",
    }
    x, forms = _inputs(shape, dtype), _forms(benchmark.group)
    runs = {name: _call(form, shape, x, direction) for name, form in forms.items()}
    for name in FORWARD_ONLY:
        if name in runs:
            alone = _call(forms[name], shape, _detached(x), direction)
            runs[name] = alone if direction == "forward" else _no_backward
    timing.report(
        benchmark,
        implementation,
        runs,
        check=_check(shape, dtype, direction, forms),
        work=_work(shape, dtype, direction),
        device=DEVICE,
        dtype=dtype,
        alone=[name for name, peer in PEERS.items() if not peer.paired],
        table=(7, 2),
        rounds=15,
        graph=True,
    )
