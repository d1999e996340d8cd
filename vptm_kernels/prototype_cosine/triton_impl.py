"""Calls of the Triton kernels, planned once a signature: block sizes, constants, launches and the buffers they need."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .._runtime.launch import Launch
from .._runtime.plans import Plans, signature
from .._runtime.sizes import accumulator, cdiv
from .._runtime.triton_support import architecture, dot_precision, float32_precision
from . import torch_impl
from .activations import ACTIVATIONS
from .configs import (
    Config,
    channels,
    combine_config,
    cosine_warps,
    forward_config,
    hidden_grad_config,
    reader_grad_config,
    task_linear_blocks,
    tokens_per_split,
)
from .kernels_bwd import prototype_cosine_hidden_grad_kernel, prototype_cosine_reader_grad_kernel
from .kernels_fwd import (
    prototype_cosine_combine_kernel,
    prototype_cosine_cosine_kernel,
    prototype_cosine_readout_kernel,
    prototype_cosine_task_cosine_kernel,
    prototype_cosine_task_linear_kernel,
)

_readouts: Plans[_Readout] = Plans()
_backwards: Plans[_Backward] = Plans()
_launches: Plans[Launch] = Plans()


def _dtype(t: Tensor) -> Any:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def _blocks(config: Config) -> dict[str, int]:
    return {"BLOCK_B": config.rows, "BLOCK_V": config.tokens, "BLOCK_C": config.width, "BLOCK_D": config.dims}


def _aligned(*matrices: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in matrices)


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
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a @ reader.T (B, D), sum of a² (B,), [log-sum-exp, sum of a] (2, B), `kept_size` elements kept for backward."""
    tensors = (hidden, token_weight, token_bias, reader)
    options = (activation, squares, tuple(needs), kept_size)
    key = (*map(signature, tensors), gram is not None, options, float32_precision(hidden.dtype))
    plan = _readouts.get(key)
    if plan is None:
        plan = _readouts.keep(key, _Readout(*tensors, gram, *options))
    return plan(*tensors, gram)


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
    tensors = (hidden, token_weight, token_bias, reader)
    grad, saved = grad_out.to(hidden.dtype).contiguous(), saved.contiguous()
    options = (activation, squares, tuple(needs), kept.numel())
    others = (grad_squared is not None, grad_out.dtype, grad.data_ptr() % 16, saved.data_ptr() % 16)
    key = (*map(signature, tensors), gram is not None, options, others, float32_precision(hidden.dtype))
    plan = _backwards.get(key)
    if plan is None:
        plan = _backwards.keep(key, _Backward(*tensors, gram, *options, grad_squared is not None))
    return plan(grad_out, grad, grad_squared, *tensors, gram, out, squared, saved, kept)


class _Plan:
    """What calls of one signature share: sizes, constants and launches. It holds no tensor."""

    def __init__(
        self,
        hidden: Tensor,
        token_weight: Tensor,
        token_bias: Tensor | None,
        reader: Tensor,
        gram: Tensor | None,
        activation: str,
        squares: bool,
        needs: tuple[bool, ...],
        kept_size: int,
    ) -> None:
        (self.batch, self.width), self.tokens, self.dim = hidden.shape, token_weight.shape[0], reader.shape[0]
        self.activation, self.squares, self.needs, self.kept_size = activation, squares, needs, kept_size
        self.exact = accumulator(hidden.dtype)
        matrices = (hidden, token_weight, reader, gram)
        self.folds = torch_impl.plan_of(*matrices, activation, squares, needs, kept_size, False) == "fold"
        self.arch, self.bits = architecture(hidden.device), 8 * hidden.element_size()
        self.aligned = _aligned(hidden, token_weight, reader)
        self.strides = (hidden.stride(0), token_weight.stride(0), reader.stride(0))
        self.shared = {"ACTIVATION": ACTIVATIONS[activation], "ACC": _dtype(hidden)}
        self.of_bias = {"HAS_BIAS": token_bias is not None, "PRECISION": dot_precision(hidden.dtype, self.arch)}


class _Readout(_Plan):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.folds or self.batch == 0:
            return
        batch, tokens, dim = self.batch, self.tokens, self.dim
        config = forward_config(self.arch, self.bits, dim, self.aligned, self.activation == "log_softmax")
        row_blocks, dim_blocks = cdiv(batch, config.rows), cdiv(dim, config.dims)
        per_split = tokens_per_split(self.arch, tokens, row_blocks * dim_blocks, config.tokens)
        self.splits = cdiv(tokens, per_split)
        shared = self.shared | {"SQUARES": self.squares}
        self._read = Launch(
            prototype_cosine_readout_kernel,
            (self.splits, row_blocks, dim_blocks),
            (batch, self.width, tokens, dim, per_split, *self.strides),
            {
                **shared,
                **self.of_bias,
                **_blocks(config),
                **_launch_options(config.num_warps, config.num_stages),
            },
        )
        combine = combine_config(self.arch, cdiv(tokens, config.tokens), dim)
        self._combine = Launch(
            prototype_cosine_combine_kernel,
            (cdiv(batch, combine.rows), cdiv(dim, combine.dims)),
            (batch, tokens, dim, per_split, self.splits),
            {
                **shared,
                "BLOCK_S": combine.splits,
                "BLOCK_B": combine.rows,
                "BLOCK_D": combine.dims,
                **_launch_options(combine.num_warps, 1),
            },
        )

    def __call__(
        self,
        hidden: Tensor,
        token_weight: Tensor,
        token_bias: Tensor | None,
        reader: Tensor,
        gram: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, exact = self.batch, self.exact
        out = hidden.new_empty((batch, self.dim), dtype=exact)
        squared = hidden.new_empty((batch if self.squares else 0,), dtype=exact)
        saved = hidden.new_empty((2, batch) if self.activation != "logits" else (0,), dtype=exact)
        kept = hidden.new_empty((self.kept_size,))
        if batch == 0:
            return out, squared, saved, kept
        if self.folds:
            torch_impl.fold_forward(hidden, token_weight, token_bias, reader, gram, out, squared, kept)
            return out, squared, saved, kept
        part = hidden.new_empty((self.splits, batch, self.dim), dtype=exact)
        seen = hidden.new_empty((self.splits, self.dim) if self.activation == "log_softmax" else (0,), dtype=exact)
        statistics = hidden.new_empty((self.splits, 4, batch), dtype=exact)
        self._read(hidden, token_weight, token_bias, reader, part, seen, statistics)
        self._combine(part, seen, statistics, out, squared, saved)
        return out, squared, saved, kept


class _Backward(_Plan):
    def __init__(
        self, hidden: Tensor, token_weight: Tensor, token_bias: Tensor | None, reader: Tensor, *options: Any
    ) -> None:
        *options_of_both, has_squared = options
        super().__init__(hidden, token_weight, token_bias, reader, *options_of_both)
        if self.folds or self.batch == 0:
            return
        batch, tokens, dim, needs = self.batch, self.tokens, self.dim, self.needs
        shared = self.shared | self.of_bias
        self._of_reader = self._of_hidden = None
        if needs[3]:
            config = reader_grad_config(self.arch, self.bits, dim, self.aligned)
            self._of_reader = Launch(
                prototype_cosine_reader_grad_kernel,
                (cdiv(tokens, config.tokens), cdiv(dim, config.dims)),
                (batch, self.width, tokens, dim, *self.strides[:2]),
                {**shared, **_blocks(config), **_launch_options(config.num_warps, config.num_stages)},
            )
        if needs[0] or (needs[2] and token_bias is not None):
            recompute = self.activation != "logits" or has_squared
            config = hidden_grad_config(self.arch, self.bits, dim, self.aligned, recompute)
            block = channels(self.arch, self.bits, self.width, self.aligned)
            self.row_blocks = cdiv(batch, config.rows)
            channel_blocks = cdiv(self.width, block) if needs[0] else 1
            per_split = tokens_per_split(self.arch, tokens, self.row_blocks * channel_blocks, config.tokens)
            self.splits = cdiv(tokens, per_split)
            self._of_hidden = Launch(
                prototype_cosine_hidden_grad_kernel,
                (self.splits, self.row_blocks, channel_blocks),
                (batch, self.width, tokens, dim, per_split, *self.strides),
                {
                    **shared,
                    "SQUARES": has_squared,
                    "FOR_HIDDEN": needs[0],
                    "FOR_BIAS": needs[2],
                    **_blocks(config),
                    "BLOCK_O": block,
                    **_launch_options(config.num_warps, config.num_stages),
                },
            )

    def __call__(
        self,
        grad_out: Tensor,
        grad: Tensor,
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
    ) -> tuple[Tensor | None, ...]:
        """grad: grad_out as kernels read it, in the dtype of hidden."""
        needs, activation = self.needs, self.activation
        inputs = (hidden, token_weight, token_bias, reader, gram)
        if self.batch == 0:
            sources = (hidden, None, token_bias, reader)
            return tuple(
                torch.zeros(t.shape, dtype=t.dtype, device=t.device) if needed and t is not None else None
                for t, needed in zip(sources, needs)
            )
        if self.folds:
            return torch_impl.fold_backward(grad_out, grad_squared, *inputs, kept, needs)
        dhidden = dbias = dreader = None
        if self._of_reader is not None:
            dreader = reader.new_empty(reader.shape)
            self._of_reader(hidden, token_weight, token_bias, grad, saved, dreader)
        if self._of_hidden is not None:
            exact = self.exact
            twice = grad_out.new_empty((0,)) if grad_squared is None else 2 * grad_squared
            subtract = grad_out.new_empty((0,))
            if activation == "softmax":
                subtract = (grad_out * out).sum(1)
            elif activation == "log_softmax":
                subtract = grad_out @ reader.sum(1, dtype=exact)
            if activation != "logits" and grad_squared is not None:
                subtract += twice * (squared if activation == "softmax" else saved[1])
            part = hidden.new_empty((self.splits, self.batch, self.width) if needs[0] else (0,), dtype=exact)
            bias_part = hidden.new_empty((self.row_blocks, self.tokens) if needs[2] else (0,), dtype=exact)
            self._of_hidden(hidden, token_weight, token_bias, reader, grad, saved, subtract, twice, part, bias_part)
            dhidden = part.sum(0).to(hidden.dtype) if needs[0] else None
            dbias = bias_part.sum(0).to(hidden.dtype) if needs[2] else None
        return dhidden, None, dbias, dreader


def task_linear(hidden: Tensor, weight: Tensor, bias: Tensor, task_ids: Tensor, out: Tensor) -> None:
    batch, width, (tasks, dim, _) = hidden.shape[0], hidden.shape[1], weight.shape
    if batch == 0:
        return
    task_ids = task_ids.contiguous()
    tensors = (hidden, weight, bias, task_ids)
    key = ("task_linear", *map(signature, tensors))
    launch = _launches.get(key)
    if launch is None:
        dims, columns = task_linear_blocks(architecture(hidden.device))
        launch = Launch(
            prototype_cosine_task_linear_kernel,
            (batch, cdiv(dim, dims)),
            (tasks, width, dim, hidden.stride(0), weight.stride(0), weight.stride(1), bias.stride(0)),
            {"ACC": _dtype(hidden), "BLOCK_C": columns, "BLOCK_D": dims, **_launch_options(4, 1)},
        )
        _launches.keep(key, launch)
    launch(*tensors, out)


def similarity(
    embedding: Tensor, prototypes: Tensor, task_ids: Tensor | None, offsets: Sequence[int], widest: int, eps: float
) -> Tensor:
    """Cosines (B, widest) in the dtype of the embedding, -inf beyond the classes of a row's task."""
    batch = embedding.shape[0]
    out = embedding.new_empty((batch, widest))
    if batch == 0:
        return out
    embedding = embedding.contiguous()
    task_ids = None if task_ids is None else task_ids.contiguous()
    places = (*map(signature, (embedding, prototypes, task_ids)), float32_precision(prototypes.dtype))
    key = ("similarity", places, len(offsets), widest, eps)
    launch = _launches.get(key)
    if launch is None:
        launch = _launches.keep(key, _similarity_launch(embedding, prototypes, task_ids, offsets, widest, eps))
    if task_ids is None:
        launch(embedding, prototypes, out)
    else:
        launch(embedding, prototypes, task_ids, _bounds(tuple(offsets), embedding.device), out)
    return out


def _similarity_launch(
    embedding: Tensor, prototypes: Tensor, task_ids: Tensor | None, offsets: Sequence[int], widest: int, eps: float
) -> Launch:
    (batch, dim), arch = embedding.shape, architecture(embedding.device)
    block = 16 if arch == "cpu" else 64
    sizes = {"ACC": _dtype(embedding), "BLOCK_K": 16 if arch == "cpu" else 32, "BLOCK_D": block}
    columns, stride = cdiv(widest, sizes["BLOCK_K"]), prototypes.stride(0)
    if task_ids is not None:
        scalars = (len(offsets) - 1, dim, widest, stride, eps)
        return Launch(prototype_cosine_task_cosine_kernel, (batch, columns), scalars, sizes | _launch_options(4, 1))
    # float32 sums of 16-bit prototypes take three tensor-core products; float32 prototypes are multiplied as such.
    precise = prototypes.element_size() > 2 or arch.startswith("gfx")
    constants = {
        **sizes,
        "PRECISION": dot_precision(prototypes.dtype, arch) if precise else "tf32x3",
        "BLOCK_B": 16,
        **_launch_options(cosine_warps(arch, prototypes.element_size() * 8), 1),
    }
    return Launch(
        prototype_cosine_cosine_kernel, (cdiv(batch, 16), columns), (batch, widest, dim, stride, eps), constants
    )


@functools.lru_cache(maxsize=64)
def _bounds(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)
