"""The public function: argument checks and choice of implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._runtime.arguments import shape_of
from .._runtime.plans import Plans, signature
from .._runtime.tracing import nothing_traces
from .._runtime.triton_support import choose
from .configs import MAX_WIDTH
from .ops import run_norm, shifted_norm_op

# implementation of calls that passed the checks, by all that checks ask for
_checked: Plans[str] = Plans()

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shifted_norm(x: Tensor, shift: Tensor | None, *, eps: float, impl: str = "auto") -> Tensor:
    """LayerNorm, without weight and bias, of rows plus a constant row. It has no derivative: it is for encoders in
    inference, whose residual stream lacks the biases of the linears that were added to it.

    Args:
        x: (..., C), at least one dimension; float16, bfloat16, float32 or float64.
        shift: (C,), any floating dtype, or None for a plain LayerNorm.
        eps: of the LayerNorm.
        impl: "auto" is "triton" for GPU tensors of float16, bfloat16 or float32 with C <= 8192, else "torch". An
            explicit "triton" or "torch" never falls back.

    Returns:
        (..., C) in the dtype of x, contiguous. The sum with `shift` and the statistics are of float32 (float64 for
        float64), and the result is rounded once.

    Equal to::

        layer_norm(x + shift, (C,), eps=eps)

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it must be and what it is.
        RuntimeError: a gradient is asked for.

    >>> import torch
    >>> from vptm_kernels.shifted_norm import shifted_norm
    >>> x, shift = torch.randn(2, 5, 8), torch.randn(8)
    >>> expected = torch.nn.functional.layer_norm(x + shift, (8,), eps=1e-6)
    >>> torch.allclose(shifted_norm(x, shift, eps=1e-6), expected, atol=1e-6)
    True
    """
    recorded = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, shift))
    plain = not recorded and nothing_traces(x, shift)
    key = (signature(x), signature(shift), eps, impl) if plain else None
    known = None if key is None else _checked.get(key)
    if known is not None:
        return run_norm(x, shift, eps, known)
    for name, t in (("x", x), ("shift", shift)):
        if not isinstance(t, Tensor) and not (name == "shift" and t is None):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite non-negative number, got {eps!r}")
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., C) of at least one dimension, got {shape_of(x)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if shift is not None:
        if shape_of(shift) != (x.shape[-1],):
            raise ValueError(f"shift must be (C,) = ({x.shape[-1]},), got {shape_of(shift)}")
        if not shift.is_floating_point():
            raise ValueError(f"shift must be floating point, got {shift.dtype}")
        if shift.device != x.device:
            raise ValueError(f"shift must be on the device of x, {x.device}, got {shift.device}")
    wide = x.shape[-1] > MAX_WIDTH
    impl = choose(impl, x, lacking=f"at most {MAX_WIDTH} channels, got {x.shape[-1]}" if wide else None)
    if key is not None:
        _checked.keep(key, impl)
    run = run_norm if plain else shifted_norm_op
    found: Tensor = run(x, shift, float(eps), impl)
    return found
