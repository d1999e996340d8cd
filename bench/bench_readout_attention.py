"""Attention of one query row per image over tokens before their LayerNorm: forward and backward.

    pytest bench/bench_readout_attention.py --benchmark-only

Peers: "sdpa" normalises all tokens, projects keys and values of all of them, concatenates the prompts and runs
`scaled_dot_product_attention` for one query row, as a block of timm does; "absorbed" multiplies the query by the key
weights first, as we do, with plain PyTorch operations on normalised tokens; both compiled as well, with max-autotune
when asked for by name. Every implementation is checked against the definition in float64 first; one that exceeds its
error budget is reported and not timed.

`extra_info` holds the bytes that must move and the floating-point operations (formulas in `_work`), and `share of
ceiling`: the time this machine needs for them at its own measured copy bandwidth and matrix rate, over the measured
time.
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
from vptm_kernels import readout_attention
from vptm_kernels.readout_attention.reference import readout_attention_reference

DEVICE = timing.selection.device
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    batch: int
    prompts: int
    tokens: int = 198
    heads: int = 12
    head_dim: int = 64

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} N={self.tokens} P={self.prompts} D={self.head_dim}"


# BEiT-B/16 at 224 with a mask row: one image, where launches and the split of its tokens decide, a serving and a
# training batch, with prompts and without; and BEiT-L/16 at 384. On a CPU batches of 4 and 32.
SHAPES = (
    [Shape(64, 0, 5, 2, 16), Shape(64, 50, 5, 2, 16)]
    if timing.selection.tiny
    else [Shape(1, 50), Shape(8, 50), Shape(64, 0), Shape(64, 50), Shape(256, 50), Shape(16, 50, 578, 16)]
    if DEVICE == "cuda"
    else [Shape(4, 0), Shape(4, 100), Shape(32, 10)]
)


@dataclass
class Inputs:
    x: Tensor
    q: Tensor
    k_weight: Tensor
    v_weight: Tensor
    v_bias: Tensor
    prompts: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        copies = {name: t.detach().to(dtype) for name, t in vars(self).items()}
        return Inputs(**{name: t.requires_grad_(name in ("x", "q", "prompts")) for name, t in copies.items()})


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(DEVICE, dtype)

    width = shape.width
    return Inputs(
        x=random(shape.batch, shape.tokens, width, scale=2.0),
        q=random(shape.batch, width),
        k_weight=random(width, width, scale=width**-0.5),
        v_weight=random(width, width, scale=width**-0.5),
        v_bias=random(width),
        prompts=random(shape.prompts, 2 * width),
        bias=random(shape.heads, shape.tokens + shape.prompts),
    ).to(dtype)


Implementation = Callable[[Shape, Inputs], Tensor]
Call = Callable[[], tuple[Tensor, ...]]


def _vptm(shape: Shape, i: Inputs) -> Tensor:
    return readout_attention(
        *(i.x, i.q, None, None, EPS, i.k_weight, i.v_weight, i.v_bias),
        num_heads=shape.heads,
        prompt_kv=i.prompts,
        bias=i.bias,
    )


def _definition(shape: Shape, i: Inputs) -> Tensor:
    return readout_attention_reference(
        *(i.x, i.q, None, None, EPS, i.k_weight, i.v_weight, i.v_bias),
        num_heads=shape.heads,
        prompt_kv=i.prompts,
        bias=i.bias,
    )


def _sdpa(shape: Shape, i: Inputs) -> Tensor:
    normed = F.layer_norm(i.x, i.x.shape[-1:], eps=EPS)
    kv = F.linear(normed, torch.cat([i.k_weight, i.v_weight]), F.pad(i.v_bias, (shape.width, 0)))
    kv = torch.cat([kv, i.prompts.expand(len(kv), -1, -1)], 1)
    k, v = kv.unflatten(2, (2, shape.heads, -1)).permute(2, 0, 3, 1, 4)
    query = i.q.unflatten(1, (shape.heads, 1, -1))
    return F.scaled_dot_product_attention(query, k, v, i.bias[None, :, None]).flatten(1)


def _absorbed(shape: Shape, i: Inputs) -> Tensor:
    normed = F.layer_norm(i.x, i.x.shape[-1:], eps=EPS)
    query = i.q.unflatten(1, (shape.heads, -1)) * shape.head_dim**-0.5
    prompt_k, prompt_v = i.prompts.unflatten(1, (2, shape.heads, -1)).unbind(1)
    absorbed = torch.einsum("bhd,hdc->bhc", query, i.k_weight.unflatten(0, (shape.heads, -1)))
    scores = torch.cat([absorbed @ normed.mT, torch.einsum("bhd,phd->bhp", query, prompt_k)], -1)
    weights = (scores + i.bias).softmax(-1)
    of_tokens, of_prompts = weights.tensor_split([shape.tokens], -1)
    value = torch.einsum("bhc,hdc->bhd", of_tokens @ normed, i.v_weight.unflatten(0, (shape.heads, -1)))
    value = value + torch.einsum("bhp,phd->bhd", of_prompts, prompt_v)
    return value.flatten(1) + i.v_bias * of_tokens.sum(-1).repeat_interleave(shape.head_dim, 1)


PEERS = {
    "sdpa": timing.Peer(_sdpa),
    "absorbed": timing.Peer(_absorbed),
    **timing.compiled(_sdpa, "sdpa compiled"),
    **timing.compiled(_absorbed, "absorbed compiled"),
}


def _call(implementation: Implementation, shape: Shape, inputs: Inputs, direction: str) -> Call:
    """One call; its result is (out,) or (out, dx, dq and, if there are prompts, dprompts)."""
    grad = torch.ones_like(inputs.q)

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (implementation(shape, inputs),)

    def both() -> tuple[Tensor, ...]:
        out = implementation(shape, inputs)
        learned = [inputs.x, inputs.q, *([inputs.prompts] if shape.prompts else [])]
        return (out, *torch.autograd.grad(out, learned, grad))

    return forward if direction == "forward" else both


@lru_cache(maxsize=1)
def _check(shape: Shape, direction: str, dtype: torch.dtype) -> timing.Check:
    inputs = _inputs(shape, dtype)
    exact, eager = (_call(_definition, shape, i, direction)() for i in (inputs.to(torch.float64), inputs))
    return timing.within_budget(exact, eager, [2, 3, 3, 3])


def _work(shape: Shape, direction: str, dtype: torch.dtype) -> timing.Work:
    """Of what no implementation can avoid.

    Forward reads the tokens once, both weights, queries, prompts, and writes one row per image: B*N*C + 2*C² + 2*B*C +
    2*P*C elements, with C = H*D; 4*B*H*N*C operations for scores and weighted sums of tokens, 4*B*C² for the weights
    and 4*B*P*C for prompts. Forward and backward read tokens again and write their gradient, 3*B*N*C + 2*C² + 4*B*C +
    4*P*C elements, with 12, 8 and 8 in place of the three fours.
    """
    tokens, square = shape.batch * shape.tokens * shape.width, shape.width**2
    rows, prompts = shape.batch * shape.width, shape.prompts * shape.width
    forward = direction == "forward"
    elements = (1 if forward else 3) * tokens + 2 * square + (2 if forward else 4) * (rows + prompts)
    operations = (4 if forward else 12) * shape.heads * tokens
    operations += (4 if forward else 8) * (shape.batch * square + shape.batch * prompts)
    return timing.Work(elements * dtype.itemsize, operations)


@pytest.mark.parametrize("implementation", timing.rows(PEERS))
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", timing.selection.dtypes, ids=timing.label)
def bench_readout_attention(
    benchmark: BenchmarkFixture, implementation: str, shape: Shape, direction: str, dtype: torch.dtype
) -> None:
    benchmark.group = f"readout attention, {direction}, {shape}, {dtype}, {DEVICE}"
    benchmark.extra_info |= {
        "prompt_length": shape.prompts,
        "batch": shape.batch,
        "shape": f"H={shape.heads} N={shape.tokens} D={shape.head_dim}, {direction}",
    }
    inputs = _inputs(shape, dtype)
    forms = {"vptm": _vptm} | {name: peer.form(benchmark.group) for name, peer in timing.present(PEERS).items()}
    timing.report(
        benchmark,
        implementation,
        {name: _call(form, shape, inputs, direction) for name, form in forms.items()},
        check=_check(shape, direction, dtype),
        work=_work(shape, direction, dtype),
        device=DEVICE,
        dtype=dtype,
        table=(7, 2),
        rounds=15,
        graph=True,
    )
