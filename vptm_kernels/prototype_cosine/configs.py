"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The sizes come from static counts (`python -m vptm_kernels.aot --cases prototype_cosine`); none has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple

from .._runtime.sizes import next_power_of_2

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


def forward_config(arch: str, dtype_bits: int, dim: int, aligned: bool, log_softmax: bool = False) -> Config:
    """aligned: every row starts at a multiple of 16 bytes. Other rows are read an element at a time, and the addresses
    of a full tile would not fit the registers. log_softmax: its sums take registers; with Triton 3.6, 64 channels at a
    time spill 24 bytes on sm90.

    It does not ask for the batch: the last one of an epoch would compile kernels of its own. A few rows in a block of
    64 waste products, of which reading the token head leaves plenty.
    """
    if arch == "cpu":
        return Config(16, 32, 16, 16, 4, 1)
    stages = 1 if arch.startswith("gfx") else 2
    dims = min(max(16, next_power_of_2(dim)), 128)
    if dtype_bits >= 32 or not aligned:
        rows = 16 if arch.startswith("gfx") and not aligned else 32
        return Config(rows, 32, 32, min(dims, 64), 4, stages)
    # On sm100 64 channels at a time spill 8 to 24 bytes, 64 tokens up to 80 and eight warps 32, by version of Triton.
    if arch == "sm100":
        return Config(64, 32, 32, dims, 4, stages)
    # On sm120 with Triton 3.6 64 channels at a time spill 16 bytes.
    narrow = (log_softmax and arch == "sm90") or arch == "sm120"
    return Config(64, 64, 32 if narrow else 64, dims, 8, stages)


def reader_grad_config(arch: str, dtype_bits: int, dim: int, aligned: bool) -> Config:
    return forward_config(arch, dtype_bits, dim, aligned)


def hidden_grad_config(arch: str, dtype_bits: int, dim: int, aligned: bool, recompute: bool) -> Config:
    """dims: rows of the reader that one product takes. The channels of the result stand in `channels`.

    recompute: whether logits are needed again. Where they are not the loop is so short that pipelining it makes ptxas
    serialise the tensor-core instructions (C7514). In float32 pipelining spills up to 48 bytes, by version of Triton.
    """
    config = forward_config(arch, dtype_bits, dim, aligned)
    dims = 32 if dtype_bits >= 32 or not aligned else 64
    if arch == "cpu" or (arch == "sm100" and not aligned):  # 32 spill 8 bytes there
        dims = 16
    # On sm120 four warps spill 8 bytes in float32, with Triton 3.8.
    warps = 8 if arch == "sm120" and dtype_bits >= 32 else config.num_warps
    stages = config.num_stages if recompute and dtype_bits < 32 else 1
    return config._replace(dims=dims, num_warps=warps, num_stages=stages)


def channels(arch: str, dtype_bits: int, width: int, aligned: bool) -> int:
    """Channels of the hidden gradient that one program sums."""
    if arch == "cpu":
        return 16
    return min(max(16, next_power_of_2(width)), 64 if dtype_bits >= 32 or not aligned else 128)


class CombineConfig(NamedTuple):
    """splits that one step adds, rows and dims of a program."""

    splits: int
    rows: int
    dims: int
    num_warps: int


def combine_config(arch: str, splits: int, dim: int) -> CombineConfig:
    """Small tiles of the result, so that programs cover a GPU though the result is small, and many splits a step: 128
    splits one after the other would wait for memory 128 times. splits: the most that any batch has.
    """
    if arch == "cpu":
        return CombineConfig(2, 16, 16, 4)
    # 16 a step spill 8 bytes on sm90 and sm100 with Triton 3.6.
    return CombineConfig(min(8, next_power_of_2(splits)), 4, min(32, max(16, next_power_of_2(dim))), 4)


def cosine_warps(arch: str, dtype_bits: int) -> int:
    """Of prototypes. Four spill 16 bytes on sm120 in float32 with Triton 3.6."""
    return 8 if arch == "sm120" and dtype_bits >= 32 else 4


def task_linear_blocks(arch: str) -> tuple[int, int]:
    """Rows and columns of a head that one program multiplies at a time. 64 x 64 spill 8 bytes on sm100, Triton 3.6."""
    return (16, 16) if arch == "cpu" else (64, 32 if arch == "sm100" else 64)


def tokens_per_split(arch: str, tokens: int, other_programs: int, block: int) -> int:
    """Tokens that one program walks over, so that the programs fill the device about once.

    A small batch is cut into as many splits as there are multiprocessors, a large one into few, because every split
    writes partial sums as large as the result.
    """
    blocks = -(-tokens // block)
    # The interpreter has three splits, one of them ragged: two steps of combine_config.
    available = 3 if arch == "cpu" else MULTIPROCESSORS.get(arch, AMD_COMPUTE_UNITS if arch.startswith("gfx") else 108)
    splits = max(1, min(blocks, available if arch == "cpu" else available // max(1, other_programs)))
    return -(-blocks // splits) * block
