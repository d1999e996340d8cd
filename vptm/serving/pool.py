"""Rows of tensors that are given out in ranges, taken back, and moved together where holes waste memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Pool:
    """Tensors (capacity, ...) side by side, of which a range of rows is given out at a time.

    A tensor is never written where a range is in use, and growing or packing makes new tensors: whoever holds the old
    ones reads what was there. Not for several threads at once.

    Args:
        shapes: of one row of each tensor.
        dtype, device: of all of them.

    Attributes:
        tensors: of `capacity` rows each.
        used: rows that are given out.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = list(shapes)
        self.row_bytes = sum(math.prod(shape) for shape in self.shapes) * dtype.itemsize
        self.tensors = tuple(torch.zeros(0, *shape, dtype=dtype, device=device) for shape in self.shapes)
        self.used = 0
        self._free: list[tuple[int, int]] = []  # (start, length), ascending, never touching each other

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[0]

    def find(self, length: int) -> int | None:
        """Where `length` rows are free side by side, None where nowhere; 0 for no rows."""
        if length == 0:
            return 0
        return next((start for start, free in self._free if free >= length), None)

    def grown(self, length: int) -> int:
        """The least capacity that has `length` more rows at its end."""
        tail = self._free[-1] if self._free and sum(self._free[-1]) == self.capacity else (self.capacity, 0)
        return tail[0] + length

    def grow(self, capacity: int) -> None:
        """Make tensors of more rows; every range stays where it is."""
        before = self.capacity
        # one tensor at a time, so that only one of them is there twice
        grown = list(self.tensors)
        for i, old in enumerate(grown):
            grown[i] = torch.cat([old, old.new_zeros(capacity - before, *old.shape[1:])])
        self.tensors = tuple(grown)
        self._give_back(before, capacity - before)

    def take(self, length: int) -> int:
        """Start of `length` rows, which `find` says are there."""
        start = self.find(length)
        assert start is not None
        if length:
            place = next(i for i, (begin, _) in enumerate(self._free) if begin == start)
            _, free = self._free.pop(place)
            if free > length:
                self._free.insert(place, (start + length, free - length))
        self.used += length
        return start

    def give_back(self, start: int, length: int) -> None:
        """Make a range free again; nobody may read it any more."""
        self.used -= length
        self._give_back(start, length)

    def _give_back(self, start: int, length: int) -> None:
        if length == 0:
            return
        joined: list[tuple[int, int]] = []
        for begin, free in sorted([*self._free, (start, length)]):
            if joined and sum(joined[-1]) == begin:
                joined[-1] = joined[-1][0], joined[-1][1] + free
            else:
                joined.append((begin, free))
        self._free = joined

    def pack(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Move all ranges in use, (start, length) each, to the front of new tensors without a free row; new starts."""
        starts, total = [], 0
        for _, length in ranges:
            starts.append(total)
            total += length
        index = torch.cat([torch.arange(start, start + length) for start, length in ranges] or [torch.arange(0)])
        index = index.to(self.tensors[0].device)
        self.tensors = tuple(tensor[index] for tensor in self.tensors)
        self.used, self._free = total, []
        return starts
