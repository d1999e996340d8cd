"""The registered op, which has no derivative, and the branch between Triton and PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._runtime.triton_support import device_of
from . import torch_impl


def run_norm(x: Tensor, shift: Tensor | None, eps: float, impl: str) -> Tensor:
    """What the op does, for calls that nothing traces."""
    if impl == "torch":
        return torch_impl.forward(x, shift, eps)
    from . import triton_impl

    with device_of(x):
        return triton_impl.forward(x, shift, eps)


@torch.library.custom_op("vptm::shifted_norm", mutates_args=())
def shifted_norm_op(x: Tensor, shift: Tensor | None, eps: float, impl: str) -> Tensor:
    return run_norm(x, shift, eps, impl)


@shifted_norm_op.register_fake
def _(x: Tensor, shift: Tensor | None, eps: float, impl: str) -> Tensor:
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.vptm.shifted_norm)
def _flops(*_: object, **__: object) -> int:
    """No matrix product, and PyTorch's counter counts nothing else."""
    return 0
