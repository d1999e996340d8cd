"""Whether somebody is listening to what a call does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

try:  # PyTorch has no public way to ask; where a version lacks one of these, every call takes the registered op
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

_PLAIN = frozenset((Tensor, Parameter, type(None)))


def nothing_traces(*tensors: object) -> bool:
    """Whether a call on these (None counts as a tensor) runs now and for itself: tensors of no subclass, and no graph,
    mode, transform or forward derivative that would have to see it."""
    return (
        not torch.compiler.is_compiling()
        and _CAN_ASK
        and _PLAIN.issuperset(map(type, tensors))
        and _len_torch_dispatch_stack() == 0
        and _len_torch_function_stack() == 0
        and _get_tracing_state() is None
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def autocasting() -> bool:
    """Whether autocast may be on for some device; where nothing can be asked, it may."""
    return not _CAN_ASK or _is_any_autocast_enabled()
