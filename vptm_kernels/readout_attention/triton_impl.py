"""Launches of the Triton kernels: strides, block sizes and the few buffers they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.triton_support import architecture, dot_precision
from .configs import Config, backward_config, forward_config, merge_channels, next_power_of_2
from .kernels_bwd import _grad_kernel
from .kernels_fwd import _merge_kernel, _split_kernel
from .torch_impl import accumulator

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
PROMPT_BLOCK = 16


class _Problem(NamedTuple):
    """Sizes and flags that every kernel of one call shares."""

    batch: int
    tokens: int
    prompts: int
    heads: int
    width: int
    int64: bool
    exact: torch.dtype
    arch: str
    stream_bits: int
    dtype_bits: int
    precision: str

    @property
    def shape(self) -> tuple[str, int, int, int, int, int]:
        """What block sizes depend on."""
        return self.arch, self.stream_bits, self.dtype_bits, self.batch, self.tokens, self.width

    def constants(self) -> dict[str, Any]:
        return {
            "C": self.width,
            "H": self.heads,
            "HP": max(16, next_power_of_2(self.heads)),
            "ACC": _TRITON_DTYPES[self.exact],
            "enable_fp_fusion": True,
        }

    def walk(self, config: Config) -> dict[str, Any]:
        """Of the kernels that walk over the channels of a split."""
        return {
            "BLOCK_N": config.tokens,
            "BLOCK_C": config.channels,
            "EVEN": self.width % config.channels == 0,
            "CENTRE": self.stream_bits > 16,
            "INDEX": tl.int64 if self.int64 else tl.int32,
            "PRECISION": self.precision,
            "STAGES": config.num_stages,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _token_stride(x: Tensor) -> int:
    # The stride of a dimension of one element may be anything: take the one it would have.
    return x.stride(1) if x.shape[1] > 1 else x.shape[2]


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _bias_row(bias: Tensor | None, exact: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return _unit_stride(bias.float() if bias.dtype == torch.float64 and exact != torch.float64 else bias)


def _problem(x: Tensor, absorbed: Tensor, prompt_scores: Tensor | None) -> _Problem:
    batch, tokens, width = x.shape
    return _Problem(
        batch=batch,
        tokens=tokens,
        prompts=0 if prompt_scores is None else prompt_scores.shape[2],
        heads=absorbed.shape[1],
        width=width,
        int64=tokens * _token_stride(x) >= 2**31,
        exact=accumulator(absorbed.dtype),
        arch=architecture(x.device),
        stream_bits=8 * x.element_size(),
        dtype_bits=8 * absorbed.element_size(),
        precision=dot_precision(absorbed.dtype, architecture(x.device)),
    )


def forward(
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = _problem(x, absorbed, prompt_scores)
    batch, tokens, heads, width, prompts = problem.batch, problem.tokens, problem.heads, problem.width, problem.prompts
    exact, constants = problem.exact, problem.constants()
    mixed = absorbed.new_empty(batch, heads, width)
    prompt_weights = absorbed.new_empty(batch, heads, prompts)
    mass = absorbed.new_empty(batch, heads)
    lse = absorbed.new_empty(batch, heads, dtype=exact) if keep else absorbed.new_empty(0)
    moments = absorbed.new_empty(2, batch, tokens, dtype=exact) if keep else absorbed.new_empty(0)
    if batch == 0:
        return mixed, prompt_weights, mass, lse, moments
    absorbed, bias = _unit_stride(absorbed), _bias_row(bias, exact)
    stride_bias = 0 if bias is None else bias.stride(0)
    config = forward_config(*problem.shape)
    splits = _cdiv(tokens, config.tokens)
    part = absorbed.new_empty(batch, splits, heads, width, dtype=exact)
    statistics = absorbed.new_empty(batch, splits, 2, heads, dtype=exact)
    _split_kernel[(batch * splits,)](
        *(x, absorbed, bias, part, statistics, moments),
        *(batch, tokens, splits, x.stride(0), _token_stride(x), absorbed.stride(0), absorbed.stride(1)),
        stride_bias,
        BIAS=bias is not None,
        KEEP=keep,
        EPS=eps,
        **constants,
        **problem.walk(config),
    )
    block = merge_channels(problem.arch, width)
    _merge_kernel[(batch, _cdiv(width, block))](
        *(part, statistics, prompt_scores, bias, mixed, prompt_weights, mass, lse),
        *(tokens, prompts, splits),
        *((0, 0, 0) if prompt_scores is None else prompt_scores.stride()),
        stride_bias,
        BLOCK_C=block,
        BLOCK_P=PROMPT_BLOCK,
        HAS_PROMPTS=prompts > 0,
        PROMPT_BIAS=prompts > 0 and bias is not None and bias.shape[1] > tokens,
        KEEP=keep,
        **constants,
        num_warps=4,
    )
    return mixed, prompt_weights, mass, lse, moments


def backward(
    grad_mixed: Tensor,
    grad_prompt_weights: Tensor,
    grad_mass: Tensor,
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    mixed: Tensor | None,
    lse: Tensor,
    moments: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, absorbed, prompt_scores and bias."""
    problem = _problem(x, absorbed, prompt_scores)
    batch, tokens, heads, width, prompts = problem.batch, problem.tokens, problem.heads, problem.width, problem.prompts
    exact = problem.exact
    columns = 0 if bias is None else bias.shape[1]
    config = backward_config(*problem.shape)
    of_tokens = needs[0] or needs[1] or needs[3]
    splits = _cdiv(tokens, config.tokens) if of_tokens else 1
    dx = x.new_empty(x.shape) if needs[0] else None
    dprompt_scores = absorbed.new_empty(batch, heads, prompts) if needs[2] else None
    parts = grad_bias = None
    if needs[1]:
        parts = absorbed.new_empty(splits, batch, heads, width, dtype=absorbed.dtype if splits == 1 else exact)
    if needs[3]:
        grad_bias = absorbed.new_empty(batch, heads, columns, dtype=exact)
    if batch:
        absorbed, grad_mixed, row = _unit_stride(absorbed), _unit_stride(grad_mixed), _bias_row(bias, exact)
        _grad_kernel[(batch * splits,)](
            *(x, absorbed, prompt_scores, row),
            *(grad_mixed, grad_prompt_weights.contiguous(), grad_mass.contiguous(), mixed, lse, moments),
            *(dx, parts, dprompt_scores, grad_bias),
            *(batch, tokens, prompts, columns, splits),
            *(x.stride(0), _token_stride(x), absorbed.stride(0), absorbed.stride(1)),
            *((0, 0, 0) if prompt_scores is None else prompt_scores.stride()),
            0 if row is None else row.stride(0),
            *(grad_mixed.stride(0), grad_mixed.stride(1)),
            BLOCK_P=PROMPT_BLOCK,
            BIAS=bias is not None,
            HAS_PROMPTS=prompts > 0,
            PROMPT_BIAS=prompts > 0 and columns > tokens,
            OF_X=needs[0],
            OF_W=needs[1],
            OF_PROMPTS=needs[2],
            OF_BIAS=needs[3],
            **problem.constants(),
            **problem.walk(config),
        )
    dabsorbed = None
    if parts is not None:
        dabsorbed = parts[0] if splits == 1 else parts.sum(0).to(absorbed.dtype)
    dbias = None if grad_bias is None or bias is None else grad_bias.sum(0).to(bias.dtype)
    return dx, dabsorbed, dprompt_scores, dbias
