"""Linear layers whose weights do not learn, on a CPU, by whichever library was measured to be faster there.

PyTorch sends float32 products to MKL. On AMD processors with AVX-512, oneDNN, which comes with PyTorch too, takes 0.89
to 0.92 of the time for 788 rows and 0.4 to 0.8 for few (`docs/kernels.md`), and applies an exact GELU on the way out.
Weights that it packed beforehand save another 3 to 10 %. bfloat16 PyTorch sends to oneDNN itself where the processor
multiplies it, without that GELU and with weights that are packed at every call.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .private_torch import differentiates_forward, onednn_linear, onednn_pack
from .tracing import nothing_traces

# Below so many weights (768 x 128 is a tie) the call itself costs more than the product gains.
_FEWEST_WEIGHTS = 1 << 17
# What weights are packed for; 1 to 788 rows were as fast with it as with their own number.
_ROWS = 197


@functools.cache
def onednn_is_faster(dtype: torch.dtype) -> bool:
    """Whether this is a processor on which oneDNN was measured to be faster: for float32 AMD's, with AVX-512, and for
    bfloat16 those that multiply it."""
    if dtype == torch.bfloat16:
        return multiplies_bfloat16()
    if (
        dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
    ):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return False


def has_bfloat16() -> bool | None:
    """Whether this processor has instructions for bfloat16; None where PyTorch does not know it."""
    known = torch.cpu.get_capabilities()  # {name of a feature: whether this processor has it}
    return any(name.endswith("bf16") and present for name, present in known.items()) if known else None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 gain by oneDNN: on an x86 processor that has such instructions (AVX-512, AMX)."""
    x86 = torch.cpu.get_capabilities().get("architecture") == "x86_64"
    return torch.backends.mkldnn.is_available() and x86 and has_bfloat16() is True


def _learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient of what is made of these may be taken."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def runs_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `frozen_linear` sends this product to oneDNN."""
    # what is traced must not depend on the processor, and the operator has no forward derivative
    if onednn_linear is None or not nothing_traces(x) or differentiates_forward() or _learns(weight, bias):
        return False
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return weight.dtype == wanted and _is_for_onednn(weight)


def _is_for_onednn(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.numel() >= _FEWEST_WEIGHTS
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster(weight.dtype)
    )


def pack_weight(weight: Tensor) -> Tensor | None:
    """The weight (O, I) of a `frozen_linear` as oneDNN reads it fastest; None where oneDNN is not the faster one.

    It takes as much memory again and is a copy: edits of `weight` do not reach it. It cannot be sliced, viewed or
    deep-copied.
    """
    if onednn_pack is None or onednn_linear is None or not nothing_traces(weight) or not _is_for_onednn(weight):
        return None
    found: Tensor = onednn_pack(weight.detach(), _ROWS)
    return found


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, packed: Tensor | None = None
) -> Tensor:
    """`linear(x, weight, bias)`, then the exact (erf) GELU if asked for: x (..., I), weight (O, I), bias (O,).

    Gradients of every order reach x. A weight or bias that learns is one that `linear` itself multiplies. Where oneDNN
    runs and x does not learn, it reads `packed`, what `pack_weight(weight)` gave, if that is not None.
    """
    learns = _learns(x)
    # PyTorch sends bfloat16 to oneDNN itself: only the GELU on the way out would be gained, which training cannot have
    if runs_onednn(x, weight, bias) and not (learns and weight.dtype == torch.bfloat16):
        x = x.to(weight.dtype)
        if not learns:
            return _onednn(x, weight if packed is None else packed, bias, gelu)
        # rows in one dimension: what a Function gives may not be a view, or nobody could add to it in place
        rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        out = rows.view(*x.shape[:-1], weight.shape[0])
    else:
        out = F.linear(x, weight, bias)
    if not gelu:
        return out
    in_place = not torch.is_grad_enabled() and nothing_traces(out) and not differentiates_forward()
    return torch.ops.aten.gelu_.default(out) if in_place else F.gelu(out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    assert onednn_linear is not None
    out: Tensor = onednn_linear(x, weight, bias, activation, [], algorithm)
    return out


class _Linear(torch.autograd.Function):
    """oneDNN's operator with the gradient of x, which it lacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,), (grad,) = ctx.saved_tensors, grads
        # where this gradient is recorded, its own is wanted
        recorded = torch.is_grad_enabled() or not nothing_traces(grad)
        return grad @ weight if recorded else _onednn(grad.contiguous(), weight.t(), None), None, None
