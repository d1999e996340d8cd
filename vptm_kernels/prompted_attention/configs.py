"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The sizes come from static counts (`python -m vptm_kernels.aot`); none has been timed yet. `bench/NOTES.md` lists what
was tried.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def tails(tokens: int, prompts: int, block_n: int, *, pooled: bool = False) -> tuple[int, int]:
    """Widths of the one or two narrow blocks that hold what full blocks leave of tokens and prompts; 0 for none.

    Lengths of pooled prompts are known on the device only, so their tail is as wide as any length may need.
    """
    left = tokens % block_n + (min(prompts, block_n - 1) if pooled else prompts % block_n)
    if left == 0:
        return 0, 0
    one = max(16, next_power_of_2(left))
    first = one // 2
    if (first >= 16 and (second := max(16, next_power_of_2(left - first))) < first) or one > block_n:
        return (first, second) if one <= block_n else (block_n, max(16, next_power_of_2(left - block_n)))
    return one, 0


def forward_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    """arch: "sm80", "sm90", ..., "gfx942"."""
    if interpreted:
        block = 16 if tokens <= 20 else 32 if tokens < 128 else 64
        return Config(block, block, 4, 1)
    if dtype_bits >= 32:
        return Config(32, 32, 4, 1)
    if head_dim > 64:
        return Config(64, 32, 4, 1)
    return Config(64, 64, 4, 1)


def query_grad_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    return forward_config(arch, dtype_bits, head_dim, tokens, interpreted=interpreted)


def key_grad_config(arch: str, dtype_bits: int, head_dim: int, keys: int, *, interpreted: bool = False) -> Config:
    """block_m counts query rows, block_n keys; `keys` are those of one launch, tokens or prompts."""
    if interpreted:
        block = 16 if keys <= 20 else 32 if keys < 128 else 64
        return Config(block, block, 4, 1)
    block_n = min(64, max(16, next_power_of_2(keys)))
    if dtype_bits >= 32:
        return Config(32, min(32, block_n), 4, 1)
    return Config(32 if head_dim > 64 else 64, block_n, 4, 1)


def bias_grad_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    if interpreted:
        block = 16 if tokens <= 20 else 32 if tokens < 128 else 64
        return Config(block, block, 4, 1)
    return Config(32, 32, 4, 1) if dtype_bits >= 32 or head_dim > 64 else Config(64, 64, 4, 1)


def images_per_program(batch: int, programs_per_image: int) -> int:
    """How many images one program sums over: enough programs to fill a GPU twice, and no more partial sums than that.

    It does not ask the device, so that results do not depend on which GPU computed them.
    """
    chunks = max(1, min(batch, -(-264 // max(1, programs_per_image))))
    return -(-batch // chunks)
