"""Whether somebody is listening to what a call does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .private_torch import listened_to

_PLAIN = frozenset((Tensor, Parameter, type(None)))


def nothing_traces(*tensors: object) -> bool:
    """Whether a call on these (None counts as a tensor) runs now and for itself: tensors of no subclass, and no graph,
    mode, transform or forward derivative that would have to see it."""
    return not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, tensors)) and not listened_to()
