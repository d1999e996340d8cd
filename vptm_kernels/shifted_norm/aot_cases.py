"""The variants of the shifted_norm kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from ..aot import Case


def _run(target: str, *, dtype: torch.dtype = torch.bfloat16, width: int = 768, shifted: bool = True) -> None:
    from . import triton_impl

    x = torch.empty(64, 197, width, dtype=dtype)
    shift = torch.empty(width) if shifted else None
    with patch.object(triton_impl, "architecture", lambda device: target):
        triton_impl.forward(x, shift, 1e-6)


def cases() -> Iterator[Case]:
    def case(name: str, ci: bool = False, **variant: Any) -> Case:
        return Case(f"shifted_norm/{name}", lambda target: _run(target, **variant), ci)

    yield case("bf16", True)
    yield case("bf16-no-shift", shifted=False)
    yield case("fp16", dtype=torch.float16)
    yield case("fp32", dtype=torch.float32)
    yield case("bf16-odd", width=765)
    yield case("bf16-C4096", width=4096)
    yield case("bf16-C8192", width=8192)
