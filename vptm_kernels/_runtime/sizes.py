"""Types and sizes that every op rounds up to."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over inputs of this type are made in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def needs_int64(reach: int) -> bool:
    """Whether offsets inside one image or head leave 32 bits."""
    return reach >= 2**31


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
