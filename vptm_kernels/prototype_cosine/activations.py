"""What stands between the token logits and the projection: every activation, its gradient, and what kernels call it."""

from __future__ import annotations

import torch
from torch import Tensor

from .._runtime.sizes import accumulator

# {name: ACTIVATION of the kernels, which compute it as they read the logits}
ACTIVATIONS = {"logits": 0, "softmax": 1, "log_softmax": 2}


def activate(logits: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """The activation of logits (B, V) over the V tokens, into `out` if given, which may be the logits."""
    if activation == "softmax":
        return torch.softmax(logits, -1, out=out)
    if activation == "log_softmax":
        return torch.log_softmax(logits, -1, out=out)
    return logits


def through_activation(da: Tensor, a: Tensor, activation: str, subtract: Tensor, twice: Tensor | None) -> Tensor:
    """Gradient of the logits from that of the activations, sums in float32 or better. May overwrite da."""
    dtype, exact = da.dtype, accumulator(da.dtype)
    da, a = da.to(exact), a.to(exact)
    if twice is not None:
        da.addcmul_(a, twice.expand_as(a))
    if activation == "softmax":
        da.sub_(subtract).mul_(a)
    elif activation == "log_softmax":
        da.addcmul_(a.exp(), subtract.expand_as(a), value=-1)
    return da.to(dtype)
