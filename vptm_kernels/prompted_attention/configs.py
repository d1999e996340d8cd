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


def _interpreted(length: int) -> Config:
    """The interpreter's cost is the number of steps; blocks are small enough that tests see full blocks and tails."""
    block = 16 if length <= 20 else 32 if length < 128 else 64
    return Config(block, block, 4, 1)


def _asynchronous_tensor_cores(arch: str) -> bool:
    """Whether operands (wgmma), or accumulators as well (tcgen05), stay out of registers and leave room for 64 x 64."""
    return arch in ("sm90", "sm100", "sm103")


def compiler_options(arch: str) -> dict[str, int]:
    """16 x 16 matrix instructions on AMD GPUs: with 32 x 32, two of four warps repeat the work of the others."""
    return {"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {}


def forward_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    """arch: "sm80", "sm90", ..., "gfx942"."""
    if interpreted:
        return _interpreted(tokens)
    if dtype_bits >= 32:
        return Config(32, 32, 4, 1)
    if head_dim > 64:
        if _asynchronous_tensor_cores(arch):
            return Config(64, 32, 4, 1)
        return Config(32, 16 if arch == "sm120" else 32, 4, 1)
    return Config(64, 64, 4, 1) if _asynchronous_tensor_cores(arch) else Config(64, 32, 4, 1)


def keys_resident(
    arch: str, dtype_bits: int, head_dim: int, keys: int, bias_bits: int, *, interpreted: bool = False
) -> bool:
    """Whether the forward kernel holds the scores of all keys of an image instead of one block of them.

    On sm90 that is an eighth fewer instructions, and up to 208 keys leave registers for three blocks on a
    multiprocessor; head dimensions whose scale is no power of two leave them for two. Elsewhere it saves nothing:
    tcgen05 keeps scores outside registers, and mma needs them for operands.
    """
    if interpreted:
        return keys <= 208
    return keys <= 208 and arch == "sm90" and dtype_bits == 16 and head_dim in (16, 64) and bias_bits <= 16


def fits_tile(heads: int, tokens: int, element_size: int) -> bool:
    """Whether a table is expanded to a (H, N, N) tile for all kernels to read, or gathered from by every kernel.

    The tile costs a third of the gather's instructions but must stay in a second-level cache (40 MB and more).
    """
    return heads * tokens * tokens * element_size <= 32 << 20


def heads_per_table_grad(heads: int, tokens: int) -> int:
    """How many heads at a time have their dense bias gradient in memory, in float32, on its way to the table's."""
    return max(1, min(heads, (128 << 20) // (4 * tokens * tokens)))


def query_grad_config(
    arch: str, dtype_bits: int, head_dim: int, tokens: int, *, prompts_attend: bool = False, interpreted: bool = False
) -> Config:
    """prompts_attend: queries come from two tensors, and those of prompts sum over images, which takes registers."""
    if interpreted:
        return _interpreted(tokens)
    if dtype_bits >= 32:
        return Config(16, 32, 4, 1)
    if head_dim > 64:
        return Config(64, 32, 4, 1) if _asynchronous_tensor_cores(arch) else Config(32, 32, 4, 1)
    if _asynchronous_tensor_cores(arch):
        return Config(64, 32 if prompts_attend and arch != "sm90" else 64, 4, 1)
    if arch.startswith("gfx"):
        return Config(32, 16, 4, 1) if prompts_attend else Config(64, 32, 4, 1)
    # Larger blocks spill a few registers on sm120.
    return Config(64, 32, 4, 1) if arch == "sm80" else Config(32, 16 if prompts_attend else 32, 4, 1)


def key_grad_config(
    arch: str, dtype_bits: int, head_dim: int, keys: int, *, gathered: bool = False, interpreted: bool = False
) -> Config:
    """block_m counts query rows, block_n keys; `keys` are those of one launch, tokens or prompts.

    gathered: the bias is read from its table, which takes registers.
    """
    if interpreted:
        return _interpreted(keys)
    block_n = min(64, max(16, next_power_of_2(keys)))
    if dtype_bits >= 32:
        return Config(32, min(32, block_n), 4, 1)
    if arch.startswith("gfx") or ((head_dim > 64 or gathered) and not _asynchronous_tensor_cores(arch)):
        block_n = min(32, block_n)
    if head_dim > 64 and not _asynchronous_tensor_cores(arch):
        return Config(32, block_n, 8 if block_n > 16 else 4, 1)
    wide = block_n == 16 or _asynchronous_tensor_cores(arch)
    return Config(64 if wide and head_dim <= 64 else 32, block_n, 4, 1)


def bias_grad_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    if interpreted:
        return _interpreted(tokens)
    if _asynchronous_tensor_cores(arch) and dtype_bits == 16 and head_dim <= 64:
        return Config(64, 64, 4, 1)
    return Config(32, 16 if arch.startswith("gfx") else 32, 4, 1)


def table_grad_blocks(arch: str, *, interpreted: bool = False) -> tuple[int, int, int]:
    """Queries, keys and rows of the table that one step compares; each choice spills on one of the other targets."""
    # The interpreter's cost is the number of steps, a GPU's the number of registers.
    if interpreted:
        return 64, 64, 64
    return (8, 16, 32) if arch in ("sm80", "sm120") else (16, 16, 32)


def images_per_program(batch: int, programs_per_image: int) -> int:
    """How many images one program sums over: enough programs to fill a GPU twice, and no more partial sums than that.

    It does not ask the device, so that results do not depend on which GPU computed them.
    """
    chunks = max(1, min(batch, -(-264 // max(1, programs_per_image))))
    return -(-batch // chunks)
