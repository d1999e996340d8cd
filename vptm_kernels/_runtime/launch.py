"""Launching a compiled Triton kernel again, without binding and specialising its arguments again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


class Launch:
    """One kernel with the grid, integers and constants of one call signature; called with its tensors.

    The first call lets Triton bind, specialise and compile; later ones relaunch what came of it. That is right while
    all that Triton specialises on stays as it was: the device, and of each tensor whether there is one, its dtype and
    whether its address is a multiple of 16. `Plans` keep by these; new allocations start on multiples of 16.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_kernel", "_run", "_scalars", "_tail")

    def __init__(
        self, kernel: Any, grid: Sequence[int], scalars: Sequence[float], constants: Mapping[str, Any]
    ) -> None:
        self._kernel, self._grid, self._scalars, self._constants = kernel, (*grid, 1, 1)[:3], scalars, constants
        self._compiled: Any = None
        self._run: Callable[..., None] | None = None
        self._tail: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        run = self._run
        if run is not None:
            run(*tensors, *self._tail)
        elif self._compiled is None:
            compiled = self._kernel[self._grid](*tensors, *self._scalars, **self._constants)
            # the interpreter compiles nothing, and a handle loads the kernel, which an ahead-of-time build cannot
            self._compiled = compiled if hasattr(compiled, "__getitem__") else None
        else:
            names = self._kernel.arg_names[len(tensors) + len(self._scalars) :]
            self._tail = (*self._scalars, *(self._constants[name] for name in names))
            self._run = self._compiled[self._grid]
            self._run(*tensors, *self._tail)
