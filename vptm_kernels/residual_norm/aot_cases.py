"""The variants of the residual_norm kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from ..aot import Case


def _run(
    target: str,
    *,
    passes: str,
    dtype: torch.dtype = torch.bfloat16,
    stream: torch.dtype | None = None,
    width: int = 768,
    factors: bool = False,
    learned: bool = False,
) -> None:
    from . import triton_impl

    x = torch.empty(64, 197, width, dtype=stream or dtype)
    update = torch.empty(64, 197, width, dtype=dtype)
    gamma, weight, bias = (torch.empty(width, dtype=dtype) if factors else None for _ in range(3))
    row_scale = torch.empty(64) if factors else None
    with patch.object(triton_impl, "architecture", lambda device: target):
        if passes == "forward":
            triton_impl.forward(x, update, gamma, row_scale, weight, bias, 1e-6, True)
            return
        moments = torch.empty(2, 64 * 197)
        needs = [True, factors, learned, learned, learned]
        triton_impl.backward(x, update, x, update, gamma, row_scale, weight, moments, needs)


def cases() -> Iterator[Case]:
    def case(name: str, ci: bool = False, **variant: Any) -> Case:
        return Case(f"residual_norm/{name}", lambda target: _run(target, **variant), ci)

    for passes in ("forward", "backward"):
        yield case(f"{passes}-bf16", True, passes=passes)
        yield case(f"{passes}-bf16-factors", True, passes=passes, factors=True, learned=True)
        yield case(f"{passes}-bf16-float32-stream", passes=passes, stream=torch.float32, factors=True)
        yield case(f"{passes}-fp16", passes=passes, dtype=torch.float16)
        yield case(f"{passes}-fp32", passes=passes, dtype=torch.float32, factors=True, learned=True)
        yield case(f"{passes}-bf16-odd", passes=passes, width=765, factors=True, learned=True)
        yield case(f"{passes}-bf16-C4096", passes=passes, width=4096, factors=True, learned=True)
        yield case(f"{passes}-bf16-C8192", passes=passes, width=8192, factors=True, learned=True)
