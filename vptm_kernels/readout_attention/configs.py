"""Block sizes of the kernels by architecture, dtype and shape: plain Python, no search at run time.

The sizes come from static counts (`python -m vptm_kernels.aot --cases readout_attention`); none has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple

from .._runtime.sizes import next_power_of_2


class Config(NamedTuple):
    """tokens: of one program, which is one split of an image; channels: read at a time."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int


def _channels(width: int, at_most: int) -> int:
    """The widest block that divides the width, so that no load needs a mask, else one that does not."""
    dividing = [block for block in (at_most, at_most // 2) if block >= 16 and width % block == 0]
    return dividing[0] if dividing else min(at_most, max(16, next_power_of_2(width)))


def forward_config(arch: str, stream_bits: int, dtype_bits: int, tokens: int, width: int) -> Config:
    """stream_bits of the tokens, dtype_bits of the query and the weights. arch: "sm80", "sm90", ..., "gfx942", or "cpu"
    for the interpreter.

    It does not ask for the batch: the last one of an epoch would compile kernels of its own. Splits of 64 tokens give a
    large batch few sums of H*C elements to write, and one image a few programs.
    """
    if arch == "cpu":
        # Small enough that tests see several splits and blocks, ragged ones too; the cost is the number of steps.
        return Config(16 if tokens < 64 else 64, 16 if width < 64 else 128, 4, 1)
    if dtype_bits >= 32:
        return Config(min(32, max(16, next_power_of_2(tokens))), _channels(width, 32), 4, 1)
    # 64 channels of float32 spill 8 bytes on sm90; 64 that are masked up to 592, by version of Triton.
    masked = width % 32 != 0
    channels = _channels(width, 64 if stream_bits == 16 and not masked else 32)
    # 32 that are masked spill on gfx950 in two stages.
    return Config(min(64, max(16, next_power_of_2(tokens))), channels, 4, 1 if masked and arch == "gfx950" else 2)


def backward_config(arch: str, stream_bits: int, dtype_bits: int, tokens: int, width: int) -> Config:
    config = forward_config(arch, stream_bits, dtype_bits, tokens, width)
    # Two stages spill 8 bytes on sm100 in float16 with Triton 3.8, and on sm120 on float32 tokens with 3.9.
    single = arch in ("sm100", "sm103") or (arch == "sm120" and stream_bits == 32)
    return config._replace(num_stages=1) if single and dtype_bits == 16 else config


def merge_channels(arch: str, width: int) -> int:
    """Channels of one program that merges the splits."""
    return 16 if arch == "cpu" and width < 64 else min(128, max(16, next_power_of_2(width)))
