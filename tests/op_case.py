"""What the tests of every op do with the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vptm_kernels import FoldedHead


def converted(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same values in another dtype, as fresh leaves."""

    def convert(value: Any) -> Any:
        if isinstance(value, FoldedHead):
            return FoldedHead(convert(value.weight), convert(value.bias))
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in call.items()}
