"""Linear layers whose weights do not learn, on a CPU, by whichever library was measured to be faster there.

PyTorch sends float32 products to MKL. On AMD processors with AVX-512, oneDNN, which comes with PyTorch too, takes 0.89
to 0.92 of the time for 788 rows and 0.4 to 0.8 for few (`bench/NOTES.md`), and applies an exact GELU on the way out.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

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


def runs_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `frozen_linear` sends this product to oneDNN."""
    # the operator has no gradient, and a traced graph must not depend on the processor it was traced on
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        weight.device.type == "cpu"
        and weight.dtype == wanted
        and wanted in (torch.float32, torch.bfloat16)
        and weight.numel() >= _FEWEST_WEIGHTS
        and onednn_is_faster()
    )


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """`linear(x, weight, bias)`, then the exact (erf) GELU if asked for: x (..., I), weight (O, I), bias (O,)."""
    if runs_onednn(x, weight):
        activation, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, activation, [], algorithm)
    out = F.linear(x, weight, bias)
    if not gelu:
        return out
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return F.gelu(out) if recorded else torch.ops.aten.gelu_.default(out)


def _flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
