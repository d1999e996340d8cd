"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The sizes come from static counts (`python -m vptm_kernels.aot --cases prototype_cosine`); none has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple

MULTIPROCESSORS = {"sm80": 108, "sm86": 84, "sm89": 142, "sm90": 132, "sm100": 148, "sm120": 188}
AMD_COMPUTE_UNITS = 304


class Config(NamedTuple):
    """rows, tokens, width (of the inner product over C), dims (rows of the reader, or channels of the result)."""

    rows: int
    tokens: int
    width: int
    dims: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def forward_config(arch: str, dtype_bits: int, batch: int, dim: int) -> Config:
    if arch == "cpu":
        return Config(16, 32, 16, 16, 4, 1)
    rows = 16 if batch <= 16 else 32 if batch <= 32 or dtype_bits >= 32 else 64
    dims = min(max(16, next_power_of_2(dim)), 64 if dtype_bits >= 32 else 128)
    stages = 1 if arch.startswith("gfx") else 2
    return Config(rows, 32 if dtype_bits >= 32 else 64, 32 if dtype_bits >= 32 else 64, dims, 4, stages)


def reader_grad_config(arch: str, dtype_bits: int, batch: int, dim: int) -> Config:
    return forward_config(arch, dtype_bits, batch, dim)


def hidden_grad_config(arch: str, dtype_bits: int, batch: int, dim: int) -> Config:
    """dims: rows of the reader that one product takes. The channels of the result stand in `channels`."""
    return forward_config(arch, dtype_bits, batch, dim)._replace(
        dims=16 if arch == "cpu" else 64 if dtype_bits < 32 else 32
    )


def channels(arch: str, dtype_bits: int, width: int) -> int:
    """Channels of the hidden gradient that one program sums."""
    if arch == "cpu":
        return 16
    return min(max(16, next_power_of_2(width)), 64 if dtype_bits >= 32 else 128)


def tokens_per_split(arch: str, tokens: int, other_programs: int, block: int) -> int:
    """Tokens that one program walks over, so that the programs fill the device about once.

    A small batch is cut into as many splits as there are multiprocessors, a large one into few, because every split
    writes partial sums as large as the result.
    """
    blocks = -(-tokens // block)
    # The interpreter has two splits, one of them ragged.
    available = 2 if arch == "cpu" else MULTIPROCESSORS.get(arch, AMD_COMPUTE_UNITS if arch.startswith("gfx") else 108)
    splits = max(1, min(blocks, available if arch == "cpu" else available // max(1, other_programs)))
    return -(-blocks // splits) * block
