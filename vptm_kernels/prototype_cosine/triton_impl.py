"""Launches of the Triton kernels: pointers, strides, block sizes and the few buffers they need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.triton_support import architecture, dot_precision
from . import torch_impl
from .configs import (
    Config,
    channels,
    combine_config,
    forward_config,
    hidden_grad_config,
    reader_grad_config,
    tokens_per_split,
)
from .folding import accumulator
from .kernels_bwd import _hidden_grad_kernel, _reader_grad_kernel
from .kernels_fwd import _combine_kernel, _cosine_kernel, _readout_kernel, _task_cosine_kernel, _task_linear_kernel

_ACTIVATIONS = {"logits": 0, "softmax": 1, "log_softmax": 2}


def _dtype(t: Tensor) -> Any:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_B": config.rows, "BLOCK_V": config.tokens, "BLOCK_C": config.width, "BLOCK_D": config.dims}


def _aligned(*matrices: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in matrices)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def forward(
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
    room: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a @ reader.T (B, D), sum of a² (B,), [log-sum-exp, sum of a] (2, B), and `room` elements kept for backward."""
    (batch, width), tokens, dim = hidden.shape, token_weight.shape[0], reader.shape[0]
    exact = accumulator(hidden.dtype)
    out = hidden.new_empty(batch, dim, dtype=exact)
    squared = hidden.new_empty(batch if squares else 0, dtype=exact)
    saved = hidden.new_empty((2, batch) if activation != "logits" else (0,), dtype=exact)
    kept = hidden.new_empty(room)
    if batch == 0:
        return out, squared, saved, kept
    plan = torch_impl.plan_of(hidden, token_weight, reader, gram, activation, squares, needs, room, False)
    if plan == "fold":
        torch_impl.fold_forward(hidden, token_weight, token_bias, reader, gram, out, squared, kept)
        return out, squared, saved, kept

    arch = architecture(hidden.device)
    config = forward_config(arch, 8 * hidden.element_size(), batch, dim, _aligned(hidden, token_weight, reader))
    row_blocks, dim_blocks = _cdiv(batch, config.rows), _cdiv(dim, config.dims)
    per_split = tokens_per_split(arch, tokens, row_blocks * dim_blocks, config.tokens)
    splits = _cdiv(tokens, per_split)
    part = hidden.new_empty(splits, batch, dim, dtype=exact)
    seen = hidden.new_empty((splits, dim) if activation == "log_softmax" else 0, dtype=exact)
    statistics = hidden.new_empty(splits, 4, batch, dtype=exact)
    shared = {"ACTIVATION": _ACTIVATIONS[activation], "SQUARES": squares, "ACC": _dtype(hidden)}
    _readout_kernel[(splits, row_blocks, dim_blocks)](
        *(hidden, token_weight, token_bias, reader, part, seen, statistics),
        *(batch, width, tokens, dim, per_split),
        *(hidden.stride(0), token_weight.stride(0), reader.stride(0)),
        **shared,
        HAS_BIAS=token_bias is not None,
        PRECISION=dot_precision(hidden.dtype, arch),
        **_blocks(config),
        **_launch_options(config.num_warps, config.num_stages),
    )
    combine = combine_config(arch, splits, dim)
    _combine_kernel[(_cdiv(batch, combine.rows), _cdiv(dim, combine.dims))](
        *(part, seen, statistics, out, squared, saved),
        *(batch, tokens, dim, per_split, splits),
        **shared,
        BLOCK_S=combine.splits,
        BLOCK_B=combine.rows,
        BLOCK_D=combine.dims,
        **_launch_options(combine.num_warps, 1),
    )
    return out, squared, saved, kept


def backward(
    grad_out: Tensor,
    grad_squared: Tensor | None,
    hidden: Tensor,
    token_weight: Tensor,
    token_bias: Tensor | None,
    reader: Tensor,
    gram: Tensor | None,
    out: Tensor,
    squared: Tensor,
    saved: Tensor,
    kept: Tensor,
    activation: str,
    squares: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, token_weight (never), token_bias and reader, None where not needed."""
    if needs[1]:
        raise ValueError("token_weight must be frozen for impl='triton', got requires_grad=True")
    inputs = (hidden, token_weight, token_bias, reader, gram)
    plan = torch_impl.plan_of(hidden, token_weight, reader, gram, activation, squares, needs, kept.numel(), False)
    (batch, width), tokens, dim = hidden.shape, token_weight.shape[0], reader.shape[0]
    if batch == 0:
        sources = (hidden, None, token_bias, reader)
        return tuple(
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) if needed and t is not None else None
            for t, needed in zip(sources, needs)
        )
    if plan == "fold":
        return torch_impl.fold_backward(grad_out, grad_squared, *inputs, kept, needs)

    exact, arch, bits = grad_out.dtype, architecture(hidden.device), 8 * hidden.element_size()
    aligned = _aligned(hidden, token_weight, reader)
    grad = grad_out.to(hidden.dtype).contiguous()
    shared = {
        "ACTIVATION": _ACTIVATIONS[activation],
        "HAS_BIAS": token_bias is not None,
        "ACC": _dtype(hidden),
        "PRECISION": dot_precision(hidden.dtype, arch),
    }
    dhidden = dbias = dreader = None
    if needs[3]:
        dreader = reader.new_empty(reader.shape)
        config = reader_grad_config(arch, bits, batch, dim, aligned)
        _reader_grad_kernel[(_cdiv(tokens, config.tokens), _cdiv(dim, config.dims))](
            *(hidden, token_weight, token_bias, grad, saved, dreader),
            *(batch, width, tokens, dim, hidden.stride(0), token_weight.stride(0)),
            **shared,
            **_blocks(config),
            **_launch_options(config.num_warps, config.num_stages),
        )
    if needs[0] or (needs[2] and token_bias is not None):
        twice = grad_out.new_empty(0) if grad_squared is None else 2 * grad_squared
        subtract = grad_out.new_empty(0)
        if activation == "softmax":
            subtract = (grad_out * out).sum(1)
        elif activation == "log_softmax":
            subtract = grad_out @ reader.sum(1, dtype=exact)
        if activation != "logits" and grad_squared is not None:
            subtract += twice * (squared if activation == "softmax" else saved[1])
        recompute = activation != "logits" or grad_squared is not None
        config = hidden_grad_config(arch, bits, batch, dim, aligned, recompute)
        block = channels(arch, bits, width, aligned)
        row_blocks, channel_blocks = _cdiv(batch, config.rows), _cdiv(width, block) if needs[0] else 1
        per_split = tokens_per_split(arch, tokens, row_blocks * channel_blocks, config.tokens)
        splits = _cdiv(tokens, per_split)
        part = hidden.new_empty((splits, batch, width) if needs[0] else 0, dtype=exact)
        bias_part = hidden.new_empty((row_blocks, tokens) if needs[2] else 0, dtype=exact)
        _hidden_grad_kernel[(splits, row_blocks, channel_blocks)](
            *(hidden, token_weight, token_bias, reader, grad, saved, subtract, twice, part, bias_part),
            *(batch, width, tokens, dim, per_split),
            *(hidden.stride(0), token_weight.stride(0), reader.stride(0)),
            **shared,
            SQUARES=grad_squared is not None,
            FOR_HIDDEN=needs[0],
            FOR_BIAS=needs[2],
            **_blocks(config),
            BLOCK_O=block,
            **_launch_options(config.num_warps, config.num_stages),
        )
        dhidden = part.sum(0).to(hidden.dtype) if needs[0] else None
        dbias = bias_part.sum(0).to(hidden.dtype) if needs[2] else None
    return dhidden, None, dbias, dreader


def task_linear(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, out: Tensor) -> None:
    batch, width, (tasks, dim, _) = hidden.shape[0], hidden.shape[1], weight.shape
    if batch == 0:
        return
    block = 16 if architecture(hidden.device) == "cpu" else 64
    _task_linear_kernel[(batch, _cdiv(dim, block))](
        *(hidden, weight, bias, task_ids, out, tasks, width, dim),
        *(hidden.stride(0), weight.stride(0), weight.stride(1), bias.stride(0)),
        ACC=_dtype(hidden),
        BLOCK_C=block,
        BLOCK_D=block,
        **_launch_options(4, 1),
    )


def similarity(
    embedding: Tensor, prototypes: Tensor, task_ids: Tensor | None, offsets: Sequence[int], widest: int, eps: float
) -> Tensor:
    """Cosines (B, widest) in the dtype of the embedding, -inf beyond the classes of a row's task."""
    batch, dim = embedding.shape
    out = embedding.new_empty(batch, widest)
    if batch == 0:
        return out
    embedding = embedding.contiguous()
    arch = architecture(embedding.device)
    block = 16 if arch == "cpu" else 64
    sizes = {"ACC": _dtype(embedding), "BLOCK_K": 16 if arch == "cpu" else 32, "BLOCK_D": block}
    columns = _cdiv(widest, sizes["BLOCK_K"])
    if task_ids is None:
        # float32 sums of 16-bit prototypes take three tensor-core products; float32 prototypes are multiplied as such.
        precise = prototypes.element_size() > 2 or arch.startswith("gfx")
        precision = dot_precision(prototypes.dtype, arch) if precise else "tf32x3"
        _cosine_kernel[(_cdiv(batch, 16), columns)](
            *(embedding, prototypes, out, batch, widest, dim, prototypes.stride(0), eps),
            **sizes,
            PRECISION=precision,
            BLOCK_B=16,
            **_launch_options(4, 1),
        )
        return out
    bounds = _bounds(tuple(offsets), embedding.device)
    _task_cosine_kernel[(batch, columns)](
        *(embedding, prototypes, task_ids, bounds, out, len(offsets) - 1, dim, widest, prototypes.stride(0), eps),
        **sizes,
        **_launch_options(4, 1),
    )
    return out


@functools.lru_cache(maxsize=64)
def _bounds(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)
