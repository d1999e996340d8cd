"""A registered op without its dispatch, for calls that nothing traces: its schema and alias checks take longer than a
small kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def direct(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`forward`, recorded for autograd by the functions that `register_autograd` takes."""

    # a `setup_context` of its own would have PyTorch bind the arguments by `inspect.signature` at every call
    def run(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    function: Any = type(
        "Direct", (torch.autograd.Function,), {"forward": staticmethod(run), "backward": staticmethod(backward)}
    )
    return function.apply


def refuse_second_derivative(op: str, *backwards: Any) -> None:
    """Have the registered backward ops of the public function `op` say that they have no derivative."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{op} is not differentiable twice: do not pass create_graph=True through it")

    for backward in backwards:
        backward.register_autograd(refuse)
