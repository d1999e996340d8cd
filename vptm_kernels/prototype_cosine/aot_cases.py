"""The variants of the prototype_cosine kernels that are compiled ahead of time, as models call them."""

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
    activation: str = "softmax",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 64,
    dim: int = 128,
    width: int = 768,
    tokens: int = 8192,
    classes: int = 100,
    squares: bool = False,
    learned_bias: bool = False,
) -> None:
    from . import torch_impl, triton_impl

    hidden, weight = torch.empty(batch, width, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
    bias, reader = torch.empty(tokens, dtype=dtype), torch.empty(dim, tokens, dtype=dtype)
    ids = torch.zeros(batch, dtype=torch.int64)
    with (
        patch.object(triton_impl, "architecture", lambda device: target),
        patch.object(torch_impl, "choose_plan", lambda *shape: "stream"),
    ):
        if passes == "forward":
            triton_impl.forward(hidden, weight, bias, reader, None, activation, squares, [False] * 4, 0)
        elif passes == "backward":
            grad, rows = torch.empty(batch, dim), torch.empty(batch) if squares else None
            outputs = (grad, torch.empty(batch), torch.empty(2, batch), hidden.new_empty(0))
            needs = [True, False, learned_bias, True]
            triton_impl.backward(grad, rows, hidden, weight, bias, reader, None, *outputs, activation, squares, needs)
        elif passes == "cosine":
            triton_impl.similarity(
                torch.empty(batch, dim), torch.empty(classes, dim, dtype=dtype), None, [], classes, 1e-12
            )
        else:
            heads, biases = torch.empty(4, dim, width, dtype=dtype), torch.empty(4, dim, dtype=dtype)
            triton_impl.task_linear(hidden, heads, biases, ids, torch.empty(batch, dim))
            prototypes, offsets = torch.empty(4 * classes, dim, dtype=dtype), range(0, 4 * classes + 1, classes)
            triton_impl.similarity(torch.empty(batch, dim), prototypes, ids, list(offsets), classes, 1e-12)


def cases() -> Iterator[Case]:
    def case(name: str, ci: bool = False, precision: str = "highest", **variant: Any) -> Case:
        return Case(f"prototype_cosine/{name}", lambda target: _run(target, **variant), ci, precision)

    yield case("cosine-bf16", True, passes="cosine")
    yield case("tasks-bf16", True, passes="tasks")
    yield case("cosine-fp32", passes="cosine", dtype=torch.float32)
    yield case("tasks-fp32", passes="tasks", dtype=torch.float32)
    for passes in ("forward", "backward"):
        for activation in ("logits", "softmax", "log_softmax"):
            yield case(f"{passes}-{activation}-bf16", True, passes=passes, activation=activation)
            yield case(f"{passes}-{activation}-fp16", passes=passes, activation=activation, dtype=torch.float16)
            yield case(f"{passes}-{activation}-bf16-B1", passes=passes, activation=activation, batch=1)
            yield case(f"{passes}-{activation}-bf16-token-space", passes=passes, activation=activation, squares=True)
        yield case(f"{passes}-softmax-bf16-B1000", passes=passes, batch=1000)
        yield case(f"{passes}-softmax-bf16-d512", passes=passes, dim=512)
        yield case(f"{passes}-softmax-bf16-C1024", passes=passes, width=1024)
        yield case(f"{passes}-softmax-bf16-odd", passes=passes, width=765, tokens=8191, dim=100)
        yield case(f"{passes}-softmax-fp32", passes=passes, dtype=torch.float32)
        yield case(f"{passes}-softmax-tf32", passes=passes, dtype=torch.float32, precision="high")
    yield case("backward-softmax-bf16-bias", passes="backward", learned_bias=True)
