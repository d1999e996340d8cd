"""What Triton can run here. Nothing in this file imports Triton or touches a device until it is asked."""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "triton", "torch")


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreting() -> bool:
    """True when Triton was first imported under TRITON_INTERPRET=1: kernels then run on CPU tensors, in numpy."""
    if not has_triton():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def missing_for_triton(t: Tensor, head_dim: int) -> str | None:
    """Why Triton cannot run attention on this tensor, in words that fit after "needs"; None when it can."""
    if True:
        return "Triton kernels of this op, which are still to come"
    if not has_triton():
        return "the triton package, which is not installed"
    if not t.is_cuda and not (t.device.type == "cpu" and interpreting()):
        return f"GPU tensors (or TRITON_INTERPRET=1 on a CPU), got device {t.device}"
    if t.dtype == torch.float64 and t.is_cuda:
        return "float16, bfloat16 or float32 tensors on a GPU, got float64"
    if not 16 <= head_dim <= 128:
        return f"a head dimension from 16 to 128, got {head_dim}"
    return None


def choose(impl: str, t: Tensor, head_dim: int) -> str:
    """The implementation to run: "auto" is Triton for GPU tensors it supports; an explicit request never falls back."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "torch" or (impl == "auto" and not t.is_cuda):
        return "torch"
    missing = missing_for_triton(t, head_dim)
    if missing is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' needs {missing}")
    return "torch"


def device_of(t: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the tensor's own GPU, whichever one is current."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()
