"""Modes of a model that hold for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vptm.frozen.rows import PromptedRows


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every part of `model` in eval mode; afterwards each is in the mode it was in, also where parts differed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def checkpointing(model: PromptedRows, asked: bool) -> Iterator[None]:
    """`model.grad_checkpointing` is True where it is `asked` for; afterwards it is what it was."""
    before = model.grad_checkpointing
    model.grad_checkpointing = before or asked
    try:
        yield
    finally:
        model.grad_checkpointing = before
