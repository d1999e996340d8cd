"""Every private interface of PyTorch that `vptm_kernels` and `vptm` use, and what they do where a version lacks it.

who listens to a call       where nobody can be asked somebody may: every call takes the registered op
attention on a CPU          lse and gradients are written out with public operations
gradients of a softmax      the same
oneDNN's linear             `torch.nn.functional.linear` and `gelu`
oneDNN's packed weights     weights are multiplied as they are
the counter of edits        a tensor is looked at in every call
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from torch._C import (
        _get_tracing_state,
        _is_any_autocast_enabled,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._functorch import peek_interpreter_stack

    forward_ad._current_level  # noqa: B018
    _CAN_ASK = True
except (ImportError, AttributeError):
    _CAN_ASK = False


def _operator(library: str, name: str) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(getattr(torch.ops, library), name, None)
    return found


# (q, k, v, dropout, causal, attn_mask=, scale=) -> out, lse: what scaled_dot_product_attention runs on a CPU
cpu_attention = _operator("aten", "_scaled_dot_product_flash_attention_for_cpu")
cpu_attention_backward = _operator("aten", "_scaled_dot_product_flash_attention_for_cpu_backward")
if cpu_attention is None or cpu_attention_backward is None:
    cpu_attention = cpu_attention_backward = None

# {activation: (grad, output, dim, dtype of the input) -> gradient of the input}
activation_gradients = {
    name: gradient
    for name in ("softmax", "log_softmax")
    if (gradient := _operator("aten", f"_{name}_backward_data")) is not None
}

# (x, weight, bias, activation, scalars, algorithm) -> activation(linear(x))
onednn_linear = _operator("mkldnn", "_linear_pointwise")
# (weight, rows that are expected) -> the same in the layout that this operator multiplies by, without a storage
onednn_pack = _operator("mkldnn", "_reorder_linear_weight")


def listened_to() -> bool:
    """Whether a mode, a transform, a trace or a forward derivative would have to see what is called now."""
    return (
        not _CAN_ASK
        or _len_torch_dispatch_stack() != 0
        or _len_torch_function_stack() != 0
        or _get_tracing_state() is not None
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def differentiates_forward() -> bool:
    """Whether a forward derivative may be taken."""
    return not _CAN_ASK or forward_ad._current_level >= 0


def autocasting() -> bool:
    """Whether autocast may be on for some device."""
    return not _CAN_ASK or _is_any_autocast_enabled()


def edits(t: Tensor) -> int | None:
    """How often a tensor was edited in place; None where nobody counts."""
    return None if t.is_inference() else getattr(t, "_version", None)
