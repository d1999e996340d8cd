"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The forward pass on sm90 was timed on an H200; other sizes come from static counts (`python -m vptm_kernels.aot`).
`docs/kernels.md` lists what was tried.
"""

from __future__ import annotations

from typing import NamedTuple

from .._runtime.sizes import next_power_of_2

# Keys of an image up to which all their scores stay in registers, or all keys and values in shared memory.
RESIDENT_SCORES = 208
RESIDENT_KEYS = 256


class Config(NamedTuple):
    """max_registers: of a thread, as launch option; 0 leaves it to the compiler."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


class ForwardConfig(NamedTuple):
    """`Config`, what a program of the forward kernel holds, and in which order programs run.

    scores_resident: the scores of all keys stay in registers, so that a row has one maximum and nothing is rescaled.
    keys_resident: keys and values are loaded once per image and head, for all of its rows one block after the other.
    heads_first: programs next to each other take the heads of one block of rows, not the blocks of rows of one head.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int = 0
    scores_resident: bool = False
    keys_resident: bool = False
    heads_first: bool = False


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


def loops_over_tail(dtype_bits: int, rotary_gradient: bool = False) -> bool:
    """Whether what full blocks leave is walked over in steps of 16 keys: products of float32 without tensor cores
    spill up to 3 KB where a tail of 32 keys is written out."""
    return dtype_bits == 32 or rotary_gradient


class RotaryConfig(NamedTuple):
    """while_loading: kernels turn queries and keys of rotary positions as they load them; else a pass of its own does,
    before them, of so many rows a program, and turns gradients back after them."""

    while_loading: bool
    rows: int


def rotary_config(
    dtype_bits: int, head_dim: int, bias_bits: int, prompts_attend: bool, *, interpreted: bool = False
) -> RotaryConfig:
    """Products of float32 keep their operands in registers, where turning them spills at any size worth having. Beside
    a bias on sm90, or where prompts attend on sm120, there is no room for it."""
    if interpreted:
        return RotaryConfig(True, 64)
    while_loading = dtype_bits == 16 and not bias_bits and not prompts_attend
    # 1024 elements of one half of the channels, eight for each thread of four warps
    return RotaryConfig(while_loading, max(1, 2048 // next_power_of_2(head_dim)))


def rotary_candidates(dtype_bits: int, head_dim: int, bias_bits: int, prompts_attend: bool) -> list[RotaryConfig]:
    """What a card may prefer: bytes and registers are counted, and neither form has been timed."""
    table = rotary_config(dtype_bits, head_dim, bias_bits, prompts_attend)
    return [table._replace(while_loading=False)] if table.while_loading else []


def _interpreted(length: int) -> Config:
    """The interpreter's cost is the number of steps; blocks are small enough that tests see full blocks and tails."""
    block = 16 if length <= 20 else 32 if length < 128 else 64
    return Config(block, block, 4, 1)


def asynchronous_tensor_cores(arch: str) -> bool:
    """Whether operands (wgmma), or accumulators as well (tcgen05), stay out of registers and leave room for 64 x 64."""
    return arch in ("sm90", "sm100", "sm103")


def _tensor_memory(arch: str) -> bool:
    """Whether accumulators stand outside registers, from where each warp takes its rows (tcgen05)."""
    return arch in ("sm100", "sm103")


def compiler_options(arch: str) -> dict[str, int]:
    """16 x 16 matrix instructions on AMD GPUs: with 32 x 32, two of four warps repeat the work of the others."""
    return {"matrix_instr_nonkdim": 16} if arch.startswith("gfx") else {}


def forward_config(
    arch: str,
    dtype_bits: int,
    head_dim: int,
    tokens: int,
    keys: int,
    bias_bits: int,
    scaled: bool,
    pooled: bool,
    prompts_attend: bool,
    *,
    gathered: bool = False,
    column_bias: bool = False,
    rotary: bool = False,
    interpreted: bool = False,
) -> ForwardConfig:
    """arch: "sm80", "sm90", ..., "gfx942". keys: tokens and prompts of an image, whose number kernels know unless they
    are pooled. bias_bits: of an element, 0 for no bias. scaled: whether the kernel multiplies queries by the scale.
    gathered: the bias is read from its table; on sm100 with Triton 3.6 four warps spill 8 bytes for queries that come
    scaled, eight for others. With Triton 3.8 four spill 8 bytes there for heads of 16. column_bias: prompts have values
    for their columns; for heads of 16 four warps spill 16 bytes on sm120, and 8 on sm80 with Triton 3.6.

    On sm90, timed on an H200 (`docs/kernels.md`): with at most 128 registers a thread four programs of 64 rows fit a
    multiprocessor, and the next keys come while a block is computed. Registers spill where the kernel multiplies by the
    scale, gathers the bias, or where prompts attend; without a bias the compiler keeps to 128 by itself. Elsewhere the
    scores of up to 208 keys stay in registers for an eighth fewer instructions, where head dimensions have a scale that
    is a power of two. In float32 a bound of 128 keeps the compiler from 64 registers and some bytes spilled.
    """
    few = keys <= RESIDENT_SCORES and not pooled
    if interpreted:
        return ForwardConfig(*_interpreted(tokens), scores_resident=few)
    if dtype_bits >= 32:
        if head_dim > 64 and not arch.startswith("gfx"):
            return ForwardConfig(32, 16, 8, 1, max_registers=128)
        if head_dim <= 16 and not arch.startswith("gfx"):
            return ForwardConfig(32, 32, 8 if arch == "sm120" else 4, 1, max_registers=128)
        # with Triton 3.6 four warps spill 8 bytes on sm120, and so do eight beside a column bias, unless they may have
        # more than the 64 registers that the compiler keeps to
        registers = 128 if arch == "sm120" and column_bias else 0
        return ForwardConfig(32, 32, 8 if arch == "sm120" else 4, 1, max_registers=registers)
    if head_dim > 64:
        if asynchronous_tensor_cores(arch):
            return ForwardConfig(64, 32, 4, 1)
        return ForwardConfig(32, 16 if arch == "sm120" else 32, 4, 1)
    if not asynchronous_tensor_cores(arch):
        return ForwardConfig(64, 32, 8 if arch in ("sm80", "sm120") and head_dim <= 16 and column_bias else 4, 1)
    if rotary and arch == "sm90":
        # with Triton 3.9 64 keys a block spill 8 to 16 bytes beside 128 rows
        return ForwardConfig(64, 64, 4, 1) if pooled else ForwardConfig(128, 32, 8, 1, max_registers=128)
    if arch == "sm90" and tokens > 64 and not prompts_attend:
        if not bias_bits:
            return ForwardConfig(64, 64, 4, 3)
        if not scaled:
            large = ForwardConfig(128, 64, 8, 1, max_registers=128)
            # with two narrow blocks of a pool's keys 128 registers spill, by version of Triton 8 to 56 bytes
            narrow = pooled and tails(tokens, keys - tokens, 64, pooled=True)[1]
            return large if gathered else ForwardConfig(64, 64, 4, 2, max_registers=144 if narrow else 128)
    resident = few and arch == "sm90" and head_dim in (16, 64) and bias_bits <= 16
    warps = 8 if _tensor_memory(arch) and (head_dim <= 16 or (gathered and not scaled)) else 4
    # without the bound 96 registers and 16 to 24 bytes spilled at some head dimensions
    registers = 128 if rotary and _tensor_memory(arch) else 0
    return ForwardConfig(64, 64, warps, 1, max_registers=registers, scores_resident=resident)


def forward_candidates(
    arch: str,
    dtype_bits: int,
    head_dim: int,
    tokens: int,
    keys: int,
    bias_bits: int,
    scaled: bool,
    pooled: bool,
    prompts_attend: bool,
) -> list[ForwardConfig]:
    """What a card may prefer to the answer of `forward_config` for the same arguments; `bench.autotune` times them.

    Static counts do not decide between these: fewer bytes from cache or fewer instructions, for fewer warps or spills.
    """
    table = forward_config(arch, dtype_bits, head_dim, tokens, keys, bias_bits, scaled, pooled, prompts_attend)
    found = [table._replace(heads_first=True)]
    if asynchronous_tensor_cores(arch) and dtype_bits == 16 and head_dim <= 64:
        small, large = ForwardConfig(64, 64, 4, 1), ForwardConfig(128, 64, 8, 1, max_registers=128)
        found += [small, small._replace(num_stages=2), small._replace(num_stages=2, max_registers=128)]
        found += [large, large._replace(heads_first=True), large._replace(num_stages=2), large._replace(num_stages=3)]
        if not pooled and keys <= RESIDENT_SCORES:
            found.append(small._replace(scores_resident=True))
        if not pooled and keys <= RESIDENT_KEYS:
            found += [large._replace(keys_resident=True), small._replace(keys_resident=True, scores_resident=True)]
    return [config for config in dict.fromkeys(found) if config != table]


def fits_tile(heads: int, tokens: int, element_size: int) -> bool:
    """Whether a table is expanded to a (H, N, N) tile for all kernels to read, or gathered from by every kernel.

    The tile costs a third of the gather's instructions but must stay in a second-level cache (40 MB and more).
    """
    return heads * tokens * tokens * element_size <= 32 << 20


def heads_per_table_grad(heads: int, tokens: int) -> int:
    """How many heads at a time have their dense bias gradient in memory, in float32, on its way to the table's."""
    return max(1, min(heads, (128 << 20) // (4 * tokens * tokens)))


def query_grad_config(
    arch: str,
    dtype_bits: int,
    head_dim: int,
    tokens: int,
    *,
    prompts_attend: bool = False,
    prompt_columns: bool = False,
    column_bias: bool = False,
    bias_bits: int = 0,
    rotary: bool = False,
    interpreted: bool = False,
) -> Config:
    """prompts_attend: queries come from two tensors, and those of prompts sum over images, which takes registers.
    prompt_columns: the bias has columns of prompts. column_bias: prompts have values for their columns. bias_bits: of
    an element; on sm120 with Triton 3.6 64 columns in float32 spill 8 bytes.
    """
    if interpreted:
        return _interpreted(tokens)
    if dtype_bits >= 32:
        if arch.startswith("gfx"):
            return Config(16, 32, 4, 1)
        return Config(16, 16, 8, 1) if head_dim > 64 else Config(32, 32, 8, 1)
    if head_dim > 64:
        if asynchronous_tensor_cores(arch) and (_tensor_memory(arch) or not prompts_attend):
            return Config(64, 32, 8 if _tensor_memory(arch) else 4, 1)
        if arch == "sm90":
            # of 64 rows four warps spill 112 bytes, and eight are wrong: see `block_sizes` in bench/autotune.py
            return Config(16, 32, 4, 1)
        # 32 x 32 has a tenth fewer instructions for a score, and spills by version of Triton.
        if arch.startswith("gfx"):
            return Config(16, 16, 4, 1) if prompts_attend else Config(32, 32, 4, 1)
        # without the bound 168 registers and 8 bytes spilled with Triton 3.9
        registers = 255 if arch == "sm80" and prompts_attend and column_bias else 0
        return Config(16, 32 if prompts_attend else 64, 4, 1, max_registers=registers)
    if _tensor_memory(arch):
        if prompts_attend:
            # without the bound 8 to 24 bytes are spilled at 128 registers, by number of prompts
            return Config(64, 32, 4, 1, max_registers=200)
        # without the bound 80 registers and 8 bytes spilled with Triton 3.9
        registers = 144 if column_bias else 0
        return Config(64, 64, 8 if prompt_columns or column_bias else 4, 1, max_registers=registers)
    if arch == "sm90":
        if prompts_attend and column_bias and not bias_bits:  # 64 x 64 spills 16 bytes with Triton 3.6
            return Config(128, 32, 8, 1)
        return Config(128, 32, 8, 1, max_registers=128) if rotary else Config(64, 64, 4, 1)
    if arch.startswith("gfx"):
        return Config(16 if column_bias else 32, 16, 4, 1) if prompts_attend else Config(64, 32, 4, 1)
    if arch == "sm80":
        return Config(32, 16 if column_bias else 32, 4, 1) if prompts_attend else Config(64, 32, 4, 1)
    # Larger blocks spill a few registers on sm120; 32 x 32 has a fifth fewer instructions and half of the warps.
    return Config(32, 16, 4, 1) if prompts_attend else Config(16, 32 if bias_bits > 16 or column_bias else 64, 4, 1)


def query_grad_candidates(arch: str, dtype_bits: int, head_dim: int, tokens: int) -> list[Config]:
    """What a card may prefer: 128 rows read two thirds of the bytes and have 16 warps for 12, but with some dtypes and
    numbers of prompts 128 registers spill up to 100 bytes."""
    if arch != "sm90" or dtype_bits != 16 or head_dim > 64:
        return []
    return [Config(128, 64, 8, 1, max_registers=128)]


def key_grad_config(
    arch: str,
    dtype_bits: int,
    head_dim: int,
    keys: int,
    *,
    of_prompts: bool = False,
    prompts_attend: bool = False,
    column_grad: bool = False,
    gathered: bool = False,
    rotary: bool = False,
    interpreted: bool = False,
) -> Config:
    """block_m counts query rows, block_n keys; `keys` are those of one launch, tokens or prompts.

    of_prompts: sums over images, which takes registers, and more with queries from two tensors (prompts_attend), or
    where scores are summed over their rows as well (column_grad). gathered: the bias is read from its table, which
    takes more still.
    """
    if interpreted:
        return _interpreted(keys)
    block_n = min(64, max(16, next_power_of_2(keys)))
    if dtype_bits >= 32:
        if arch.startswith("gfx"):
            return Config(32, min(32, block_n), 4, 1)
        if head_dim > 64:
            return Config(16, 16, 8, 1, max_registers=168)
        if arch == "sm80":
            return Config(32, min(32, block_n), 8, 1, max_registers=128)
        # with Triton 3.6 the compiler takes 96 of them on sm120 and spills 32 bytes
        registers = 128 if block_n == 16 else 168 if arch == "sm120" else 0
        return Config(16, min(32, block_n), 4, 1, max_registers=registers)
    if arch.startswith("gfx") or ((head_dim > 64 or gathered or column_grad) and not asynchronous_tensor_cores(arch)):
        block_n = min(32, block_n)
    if head_dim > 64 and (rotary or (column_grad and _tensor_memory(arch))):
        block_n = min(32, block_n)
    if head_dim <= 16 and rotary and _tensor_memory(arch):  # 64 keys of prompts spill 16 bytes with Triton 3.6
        block_n = min(32, block_n)
    if arch == "sm120" and prompts_attend:  # 64 keys of tokens spill 16 bytes without a bias
        block_n = min(32, block_n)
    # with Triton 3.6 32 queries spill 8 to 16 bytes there
    block_m = 16 if arch == "sm120" and of_prompts and (column_grad or rotary) else 32
    if rotary and not asynchronous_tensor_cores(arch):
        return Config(block_m, min(32, block_n), 8 if head_dim > 64 and block_n > 16 else 4, 1)
    if head_dim > 64 and not asynchronous_tensor_cores(arch):
        return Config(block_m, block_n, 8 if block_n > 16 else 4, 1)
    narrow = block_n == 16 and not (arch == "sm80" and of_prompts and prompts_attend)
    wide = narrow or asynchronous_tensor_cores(arch)
    warps = 8 if of_prompts and block_n >= 32 and _tensor_memory(arch) else 4
    # unbounded it takes 188 with Triton 3.9, which spills up to 24 bytes at 168, where three programs would fit
    registers = 176 if rotary and arch == "sm90" and not of_prompts and head_dim <= 64 else 0
    return Config(64 if wide and head_dim <= 64 else block_m, block_n, warps, 1, max_registers=registers)


def key_grad_candidates(arch: str, dtype_bits: int, head_dim: int, keys: int) -> list[Config]:
    """What a card may prefer: with 168 registers three programs fit a multiprocessor for two with 174, and some numbers
    of prompts spill 28 bytes."""
    if arch != "sm90" or dtype_bits != 16 or head_dim > 64 or keys < 64:
        return []
    return [Config(64, 64, 4, 1, max_registers=168)]


def bias_grad_config(arch: str, dtype_bits: int, head_dim: int, tokens: int, *, interpreted: bool = False) -> Config:
    if interpreted:
        return _interpreted(tokens)
    if asynchronous_tensor_cores(arch) and dtype_bits == 16 and head_dim <= 64:
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
