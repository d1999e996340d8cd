"""What equal calls have in common, kept by signature: plans hold sizes, constants and launches, never a tensor."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import Tensor

_MOST = 1024
_kept: list[Plans[object]] = []

Kept = TypeVar("Kept")


class Plans(Generic[Kept]):
    """Plans by signature, all dropped when there are 1024. Threads may make one twice, of which either will do."""

    def __init__(self) -> None:
        self._by_signature: dict[Hashable, Kept] = {}
        self.get = self._by_signature.get
        _kept.append(self)  # type: ignore[arg-type]

    def keep(self, key: Hashable, plan: Kept) -> Kept:
        if len(self._by_signature) >= _MOST:
            self._by_signature.clear()
        self._by_signature[key] = plan
        return plan

    def clear(self) -> None:
        self._by_signature.clear()

    def __len__(self) -> int:
        return len(self._by_signature)


def forget_plans() -> None:
    """Plan every call anew, for whoever changes what plans are made from: block sizes, the target, the interpreter."""
    for plans in _kept:
        plans.clear()


def signature(t: Tensor | None) -> Hashable:
    """All of a tensor that checks, constants, block sizes and Triton's specialisation depend on."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16)


def place(t: Tensor | None) -> Hashable:
    """`signature`, and how far the tensor may be read beyond its own elements."""
    return None if t is None else (signature(t), t.storage_offset(), t.untyped_storage().nbytes())
