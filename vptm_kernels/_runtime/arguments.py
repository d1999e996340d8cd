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


def check_prompt_columns(
    columns: Tensor, prompts: Tensor | None, num_heads: int, of: Tensor, *, called: str, beside: str
) -> None:
    """Raise unless `columns` is a value for each head and row of `prompts`. called: the name of `of`, whose device they
    must be on; beside: what must come with them."""
    shape = shape_of(tensor("prompt_column_bias", columns))
    if prompts is None:
        raise ValueError(f"prompt_column_bias must come with {beside}")
    wanted = (num_heads, prompts.shape[-2])
    if shape != wanted or not columns.is_floating_point():
        raise ValueError(
            f"prompt_column_bias must be a floating point (H, P) = {wanted}, one value for each head and row of the "
            f"prompts, got {shape} {columns.dtype}"
        )
    if columns.device != of.device:
        raise ValueError(f"prompt_column_bias must be on the device of {called}, {of.device}, got {columns.device}")
