"""Calls of the Triton kernels, planned once a signature: block sizes, constants, launches and the buffers they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.launch import Launch
from .._runtime.plans import Plans, signature
from .._runtime.sizes import accumulator, cdiv, needs_int64, next_power_of_2
from .._runtime.triton_support import architecture, dot_precision, float32_precision
from .configs import Config, backward_config, forward_config, merge_channels
from .kernels_bwd import readout_attention_grad_kernel
from .kernels_fwd import readout_attention_merge_kernel, readout_attention_split_kernel

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
PROMPT_BLOCK = 16

_forwards: Plans[_Forward] = Plans()
_backwards: Plans[_Backward] = Plans()


def forward(
    x: Tensor,
    absorbed: Tensor,
    prompt_scores: Tensor | None,
    bias: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (x, absorbed, prompt_scores, bias)
    key = (*map(signature, tensors), eps, keep, float32_precision(absorbed.dtype))
    plan = _forwards.get(key)
    if plan is None:
        plan = _forwards.keep(key, _Forward(*tensors, eps, keep))
    return plan(*tensors)


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
    assert mixed is not None
    tensors = (x, absorbed, prompt_scores, bias)
    others = (grad_prompt_weights.contiguous(), grad_mass.contiguous(), mixed.contiguous(), lse, moments)
    places = (*map(signature, (*tensors, grad_mixed)), *(t.data_ptr() % 16 for t in others))
    key = (places, tuple(needs), float32_precision(absorbed.dtype))
    plan = _backwards.get(key)
    if plan is None:
        plan = _backwards.keep(key, _Backward(*tensors, grad_mixed, needs))
    return plan(*tensors, grad_mixed, *others)


def _token_stride(x: Tensor) -> int:
    # The stride of a dimension of one element may be anything: take the one it would have.
    return x.stride(1) if x.shape[1] > 1 else x.shape[2]


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _outer_strides(t: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last of `_unit_stride(t)`."""
    if t.stride(-1) == 1:
        return t.stride()[:-1]
    return (t.shape[1] * t.shape[2], t.shape[2]) if t.ndim == 3 else (t.shape[1],)


class _Plan:
    """What calls of one signature share: sizes, constants and launches. It holds no tensor."""

    def __init__(self, x: Tensor, absorbed: Tensor, prompt_scores: Tensor | None, bias: Tensor | None) -> None:
        self.batch, self.tokens, self.width = x.shape
        self.heads = absorbed.shape[1]
        self.prompts = 0 if prompt_scores is None else prompt_scores.shape[2]
        self.exact = accumulator(absorbed.dtype)
        self.arch = architecture(x.device)
        self.precision = dot_precision(absorbed.dtype, self.arch)
        self.stream_bits = 8 * x.element_size()
        self.shape = (self.arch, self.stream_bits, 8 * absorbed.element_size(), self.tokens, self.width)
        self.image_stride, self.token_stride = x.stride(0), _token_stride(x)
        self.absorbed_strides = _outer_strides(absorbed)
        self.prompt_strides = (0, 0, 0) if prompt_scores is None else prompt_scores.stride()
        self.narrows_bias = bias is not None and bias.dtype == torch.float64 and self.exact != torch.float64
        self.bias_stride = 0 if bias is None else bias.shape[1] if self.narrows_bias else _outer_strides(bias)[0]
        self.constants: dict[str, Any] = {
            "C": self.width,
            "H": self.heads,
            "HP": max(16, next_power_of_2(self.heads)),
            "ACC": _TRITON_DTYPES[self.exact],
            "enable_fp_fusion": True,
        }

    def walk(self, config: Config, *strides: int) -> dict[str, Any]:
        """Of the kernels that walk over the channels of a split; strides: of what stands heads first."""
        return {
            "BLOCK_N": config.tokens,
            "BLOCK_C": config.channels,
            "EVEN": self.width % config.channels == 0,
            # not of batches that happen to make odd widths multiples of 16
            "ALIGNED": self.width % 16 == 0 and all(stride % 16 == 0 for stride in strides),
            "CENTRE": self.stream_bits > 16,
            "INDEX": tl.int64 if needs_int64(self.tokens * self.token_stride) else tl.int32,
            "PRECISION": self.precision,
            "STAGES": config.num_stages,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }

    def bias_row(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        return (
            bias.to(torch.float32, memory_format=torch.contiguous_format) if self.narrows_bias else _unit_stride(bias)
        )


class _Forward(_Plan):
    def __init__(
        self,
        x: Tensor,
        absorbed: Tensor,
        prompt_scores: Tensor | None,
        bias: Tensor | None,
        eps: float,
        keep: bool,
    ) -> None:
        super().__init__(x, absorbed, prompt_scores, bias)
        self.keep = keep
        config = forward_config(*self.shape)
        self.splits = cdiv(self.tokens, config.tokens)
        self._split = Launch(
            readout_attention_split_kernel,
            (self.batch * self.splits,),
            (
                *(self.batch, self.tokens, self.splits, self.image_stride, self.token_stride),
                *(*self.absorbed_strides, self.bias_stride),
            ),
            {
                "BIAS": bias is not None,
                "KEEP": keep,
                "EPS": eps,
                **self.constants,
                **self.walk(config, *self.absorbed_strides),
            },
        )
        block = merge_channels(self.arch, self.width)
        self._merge = Launch(
            readout_attention_merge_kernel,
            (self.batch, cdiv(self.width, block)),
            (self.tokens, self.prompts, self.splits, *self.prompt_strides, self.bias_stride),
            {
                "BLOCK_C": block,
                "BLOCK_P": PROMPT_BLOCK,
                "HAS_PROMPTS": self.prompts > 0,
                "PROMPT_BIAS": self.prompts > 0 and bias is not None and bias.shape[1] > self.tokens,
                "KEEP": keep,
                **self.constants,
                "num_warps": 4,
            },
        )

    def __call__(
        self, x: Tensor, absorbed: Tensor, prompt_scores: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, heads, exact, splits = self.batch, self.heads, self.exact, self.splits
        mixed = absorbed.new_empty((batch, heads, self.width))
        prompt_weights = absorbed.new_empty((batch, heads, self.prompts))
        mass = absorbed.new_empty((batch, heads))
        lse = absorbed.new_empty((batch, heads), dtype=exact) if self.keep else absorbed.new_empty((0,))
        moments = absorbed.new_empty((2, batch, self.tokens), dtype=exact) if self.keep else absorbed.new_empty((0,))
        if batch:
            row = self.bias_row(bias)
            part = absorbed.new_empty((batch, splits, heads, self.width), dtype=exact)
            statistics = absorbed.new_empty((batch, splits, 2, heads), dtype=exact)
            self._split(x, _unit_stride(absorbed), row, part, statistics, moments)
            self._merge(part, statistics, prompt_scores, row, mixed, prompt_weights, mass, lse)
        return mixed, prompt_weights, mass, lse, moments


class _Backward(_Plan):
    def __init__(
        self,
        x: Tensor,
        absorbed: Tensor,
        prompt_scores: Tensor | None,
        bias: Tensor | None,
        grad_mixed: Tensor,
        needs: Sequence[bool],
    ) -> None:
        super().__init__(x, absorbed, prompt_scores, bias)
        self.needs = needs = tuple(needs)
        self.columns = 0 if bias is None else bias.shape[1]
        config = backward_config(*self.shape)
        self.splits = cdiv(self.tokens, config.tokens) if needs[0] or needs[1] or needs[3] else 1
        grad_strides = _outer_strides(grad_mixed)
        self._grad = Launch(
            readout_attention_grad_kernel,
            (self.batch * self.splits,),
            (
                *(self.batch, self.tokens, self.prompts, self.columns, self.splits),
                *(self.image_stride, self.token_stride, *self.absorbed_strides, *self.prompt_strides),
                *(self.bias_stride, *grad_strides),
            ),
            {
                "BLOCK_P": PROMPT_BLOCK,
                "BIAS": bias is not None,
                "HAS_PROMPTS": self.prompts > 0,
                "PROMPT_BIAS": self.prompts > 0 and self.columns > self.tokens,
                "OF_X": needs[0],
                "OF_W": needs[1],
                "OF_PROMPTS": needs[2],
                "OF_BIAS": needs[3],
                **self.constants,
                **self.walk(config, *self.absorbed_strides, *grad_strides),
            },
        )

    def __call__(
        self,
        x: Tensor,
        absorbed: Tensor,
        prompt_scores: Tensor | None,
        bias: Tensor | None,
        grad_mixed: Tensor,
        grad_prompt_weights: Tensor,
        grad_mass: Tensor,
        mixed: Tensor,
        lse: Tensor,
        moments: Tensor,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        batch, heads, splits, needs = self.batch, self.heads, self.splits, self.needs
        dx = x.new_empty(x.shape) if needs[0] else None
        dprompt_scores = absorbed.new_empty((batch, heads, self.prompts)) if needs[2] else None
        parts = grad_bias = None
        if needs[1]:
            dtype = absorbed.dtype if splits == 1 else self.exact
            parts = absorbed.new_empty((splits, batch, heads, self.width), dtype=dtype)
        if needs[3]:
            grad_bias = absorbed.new_empty((batch, heads, self.columns), dtype=self.exact)
        if batch:
            self._grad(
                *(x, _unit_stride(absorbed), prompt_scores, self.bias_row(bias), _unit_stride(grad_mixed)),
                *(grad_prompt_weights, grad_mass, mixed, lse, moments),
                *(dx, parts, dprompt_scores, grad_bias),
            )
        dabsorbed = None
        if parts is not None:
            dabsorbed = parts[0] if splits == 1 else parts.sum(0).to(absorbed.dtype)
        dbias = None if grad_bias is None or bias is None else grad_bias.sum(0).to(bias.dtype)
        return dx, dabsorbed, dprompt_scores, dbias
