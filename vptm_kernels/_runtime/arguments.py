"""What argument checks of all ops share."""

from __future__ import annotations

from torch import Tensor


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def shape_of(t: Tensor) -> tuple[int, ...]:
    """As messages print it."""
    return tuple(t.shape)
