"""Linear layers whose weights do not learn, on a CPU, by whichever library was measured to be faster there.

PyTorch sends float32 products to MKL. On AMD processors with AVX-512, oneDNN, which comes with PyTorch too, takes 0.89
to 0.92 of the time for 788 rows and 0.4 to 0.8 for few (`docs/kernels.md`), and applies an exact GELU on the way out.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .private_torch import differentiates_forward, onednn_linear
from .tracing import nothing_traces

# Below so many weights (768 x 128 is a tie) the call itself costs more than the product gains.
_FEWEST_WEIGHTS = 1 << 17


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor on which oneDNN was measured to be faster: AMD's, with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AVX512-BF16 or AMX), so that such products gain by oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _recorded(x: Tensor) -> bool:
    """Whether a derivative, backward or forward, or a trace may be taken of what happens to `x`."""
    return torch.is_grad_enabled() or not nothing_traces(x) or differentiates_forward()


def runs_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `frozen_linear` sends this product to oneDNN."""
    # its operator has no gradient, and what is traced must not depend on the processor
    if onednn_linear is None or _recorded(x):
        return False
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        weight.device.type == "cpu"
        and weight.dtype == wanted
        and wanted in (torch.float32, torch.bfloat16)
        and weight.numel() >= _FEWEST_WEIGHTS
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`linear(x, weight, bias)`, then the exact (erf) GELU if asked for: x (..., I), weight (O, I), bias (O,)."""
    if runs_onednn(x, weight):
        return _onednn(x.to(weight.dtype), weight, bias, gelu)
    out = F.linear(x, weight, bias)
    if not gelu:
        return out
    return F.gelu(out) if _recorded(out) else torch.ops.aten.gelu_.default(out)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    assert onednn_linear is not None
    out: Tensor = onednn_linear(x, weight, bias, activation, [], algorithm)
    return out
