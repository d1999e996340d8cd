"""The variants of the readout_attention kernels that are compiled ahead of time, as models call them."""

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
    batch: int = 64,
    tokens: int = 198,
    prompts: int = 10,
    heads: int = 12,
    width: int = 768,
    learned: str = "x q prompts",
) -> None:
    from . import triton_impl

    x = torch.empty(batch, tokens, width, dtype=stream or dtype)
    # As the product over heads leaves it, heads first.
    absorbed = torch.empty(heads, batch, width, dtype=dtype).transpose(0, 1)
    scores = torch.empty(heads, batch, prompts, dtype=dtype).transpose(0, 1) if prompts else None
    bias = torch.empty(heads, tokens + prompts, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
    with patch.object(triton_impl, "architecture", lambda device: target):
        if passes == "forward":
            triton_impl.forward(x, absorbed, scores, bias, 1e-6, bool(learned))
            return
        kept = (torch.empty(batch, heads, width, dtype=dtype), torch.empty(batch, heads))
        grads = (absorbed, torch.empty(batch, heads, prompts, dtype=dtype), torch.empty(batch, heads, dtype=dtype))
        needs = ["x" in learned, "q" in learned, "prompts" in learned and prompts > 0, "bias" in learned]
        triton_impl.backward(*grads, x, absorbed, scores, bias, *kept, torch.empty(2, batch, tokens), needs)


def cases() -> Iterator[Case]:
    def case(name: str, ci: bool = False, precision: str = "highest", **variant: Any) -> Case:
        return Case(f"readout_attention/{name}", lambda target: _run(target, **variant), ci, precision)

    half, single = torch.float16, torch.float32
    for passes in ("forward", "backward"):
        for batch in (1, 64, 512):
            yield case(f"{passes}-bf16-B{batch}", batch == 1, passes=passes, batch=batch)
        yield case(f"{passes}-bf16-P0", passes=passes, prompts=0)
        yield case(f"{passes}-bf16-C1024", True, passes=passes, heads=16, width=1024, batch=512)
        yield case(f"{passes}-bf16-float32-stream", True, passes=passes, stream=single)
        yield case(f"{passes}-fp16", passes=passes, dtype=half)
        yield case(f"{passes}-fp32", passes=passes, dtype=single)
        yield case(f"{passes}-tf32", passes=passes, dtype=single, precision="high")
        yield case(f"{passes}-bf16-C384", passes=passes, heads=6, width=384)
        yield case(f"{passes}-bf16-C1280", passes=passes, heads=16, width=1280)
        yield case(f"{passes}-bf16-odd", passes=passes, heads=5, width=765, tokens=101, batch=3)
        yield case(f"{passes}-bf16-H24", passes=passes, heads=24, width=1536)
        yield case(f"{passes}-bf16-N577", passes=passes, tokens=577)
    yield case("forward-inference", passes="forward", learned="")
    yield case("backward-prompts-only", passes="backward", learned="prompts")
    yield case("backward-x-only", passes="backward", learned="x")
    yield case("backward-q-only", passes="backward", learned="q")
    yield case("backward-bias", passes="backward", learned="x q prompts bias")
