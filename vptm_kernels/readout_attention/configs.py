"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The sizes come from static counts (`python -m vptm_kernels.aot --cases readout_attention`); none has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """tokens: of one program, which is one split of an image; channels: read at a time."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _channels(width: int, at_most: int) -> int:
    """The widest block that divides the width, so that no load needs a mask, else one that does not."""
    dividing = [block for block in (at_most, at_most // 2) if block >= 16 and width % block == 0]
    return dividing[0] if dividing else min(at_most, max(16, next_power_of_2(width)))


def split_tokens(batch: int, tokens: int, at_most: int) -> int:
    """Tokens of one split: few for a small batch, so that its programs fill a GPU too, many for a large one, because
    every split writes sums of H*C elements. It does not ask the device, so that results do not depend on it."""
    block = 16
    while block < at_most and block < tokens and batch * -(-tokens // (2 * block)) >= 132:
        block *= 2
    return block


def forward_config(arch: str, stream_bits: int, dtype_bits: int, batch: int, tokens: int, width: int) -> Config:
    """stream_bits of the tokens, dtype_bits of the query and the weights. arch: "sm80", "sm90", ..., "gfx942", or "cpu"
    for the interpreter."""
    if arch == "cpu":
        # Small enough that tests see several splits and blocks, ragged ones too; the cost is the number of steps.
        return Config(16 if tokens < 64 else 64, 16 if width < 64 else 128, 4, 1)
    if dtype_bits >= 32:
        return Config(split_tokens(batch, tokens, 32), _channels(width, 32), 4, 1)
    split = split_tokens(batch, tokens, 128)
    # With 4 warps 128 tokens spill 8 bytes on sm90, and so do 64 channels of float32.
    return Config(split, _channels(width, 64 if stream_bits == 16 else 32), 8 if split == 128 else 4, 2)


def backward_config(arch: str, stream_bits: int, dtype_bits: int, batch: int, tokens: int, width: int) -> Config:
    config = forward_config(arch, stream_bits, dtype_bits, batch, tokens, width)
    return config if arch == "cpu" else config._replace(tokens=min(config.tokens, 64), num_warps=4)


def merge_channels(arch: str, width: int) -> int:
    """Channels of one program that merges the splits."""
    return 16 if arch == "cpu" and width < 64 else min(128, max(16, next_power_of_2(width)))
