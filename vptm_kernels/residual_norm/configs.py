"""Rows of one program and its warps: plain Python, no search at run time; none has been timed yet."""

from __future__ import annotations

from .._runtime.sizes import next_power_of_2

MAX_WIDTH = 8192  # a program holds whole rows
_PROGRAMS = 264  # that share the sums of parameter gradients: two for each multiprocessor of a large GPU


def row_block(arch: str, width: int) -> tuple[int, int]:
    """(rows, warps): 2048 elements of 4 warps, or one row with 16 elements a thread."""
    padded = next_power_of_2(width)
    if arch == "cpu":
        return 16, 4
    return max(1, 2048 // padded), min(16, max(4, padded // 512))


def blocks_per_program(row_blocks: int, sums: bool) -> int:
    """How many blocks of rows one program takes. It does not ask the device, so that sums do not depend on it."""
    return -(-row_blocks // _PROGRAMS) if sums else 1
