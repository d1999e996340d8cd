"""Whether somebody is listening to what a call does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def nothing_traces(t: Tensor) -> bool:
    """Whether a call on `t` runs now and for itself: no graph, no fake tensors, no mode, no transform is listening."""
    return (
        type(t) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.peek_interpreter_stack()
    )
