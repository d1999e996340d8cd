"""How many values a model is made with to learn, where a file asks for it: never more than the file holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HELD: ContextVar[int | None] = ContextVar("values that a file holds", default=None)


@contextmanager
def at_most(values: int) -> Iterator[None]:
    """Within it nothing is made that has more learned values.

    Example:
        >>> with at_most(100):
        ...     check_claim("prompt_length", 12 * 10 * 768)
        Traceback (most recent call last):
        ValueError: prompt_length must ask for at most the 100 values that the file holds, got 92160
    """
    before = _HELD.set(values)
    try:
        yield
    finally:
        _HELD.reset(before)


def check_claim(argument: str, values: int) -> None:
    """Raise ValueError where a file asks by `argument` for more values than it holds."""
    held = _HELD.get()
    if held is not None and values > held:
        raise ValueError(f"{argument} must ask for at most the {held} values that the file holds, got {values}")
