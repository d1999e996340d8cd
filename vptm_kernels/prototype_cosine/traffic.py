"""Bytes that launches of the prototype kernels move, as formulas of their arguments; see `vptm_kernels.aot.Traffic`.

With B rows, C channels, V tokens, D dims, the blocks of each and `tiles` blocks of tokens over all splits, logits take

    row blocks * V * C of the token weight  +  tiles * B * C of the hidden states

for every block of dims (readout, reader_grad) or of result channels (hidden_grad, where activations are recomputed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .._runtime.sizes import cdiv
from ..aot import Traffic

Arguments = Mapping[str, Any]


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _tiles(a: Arguments) -> int:
    """Blocks of tokens over all splits, the last of which may hold fewer."""
    full, left = divmod(a["V"], a["per_split"])
    return full * cdiv(a["per_split"], a["BLOCK_V"]) + cdiv(left, a["BLOCK_V"])


def _logits(a: Arguments, tiles: int, row_blocks: int) -> int:
    """Logits of all rows and tokens, once."""
    bias = _bytes(a["bias"]) if a["HAS_BIAS"] else 0
    return tiles * _bytes(a["hidden"]) + row_blocks * (_bytes(a["weight"]) + bias)


def _inputs(a: Arguments) -> int:
    return _bytes(a["hidden"], a["weight"], *([a["bias"]] if a["HAS_BIAS"] else []))


def _readout(a: Arguments) -> Traffic:
    row_blocks, dim_blocks = cdiv(a["B"], a["BLOCK_B"]), cdiv(a["D"], a["BLOCK_D"])
    # Maximum, sum, sum of activations and of their squares; logits have the last one only.
    stored = _bytes(a["part"]) + _bytes(a["statistics"]) // (4 if a["ACTIVATION"] == 0 else 1) + _bytes(a["seen_part"])
    cache = dim_blocks * _logits(a, _tiles(a), row_blocks) + row_blocks * _bytes(a["reader"]) + stored
    return Traffic(cache, _inputs(a) + _bytes(a["reader"]) + stored)


def _combine(a: Arguments) -> Traffic:
    row_blocks, dim_blocks = cdiv(a["B"], a["BLOCK_B"]), cdiv(a["D"], a["BLOCK_D"])
    statistics, kept = _bytes(a["statistics"]), _bytes(a["out"])
    kept += (_bytes(a["squared"]) if a["SQUARES"] else 0) + (_bytes(a["saved"]) if a["ACTIVATION"] else 0)
    # The maximum is read twice, and the sum of activations by log-softmax alone.
    read = (1, 4, 5)[a["ACTIVATION"]] * statistics // 4
    once = (1, 3, 4)[a["ACTIVATION"]] * statistics // 4
    part = _bytes(a["part"], a["seen_part"])
    cache = _bytes(a["part"]) + row_blocks * _bytes(a["seen_part"]) + dim_blocks * read + kept
    return Traffic(cache, part + once + kept)


def _reader_grad(a: Arguments) -> Traffic:
    tiles, dim_blocks = cdiv(a["V"], a["BLOCK_V"]), cdiv(a["D"], a["BLOCK_D"])
    kept = _bytes(a["out"])
    saved = a["B"] * a["saved"].element_size() if a["ACTIVATION"] else 0
    logits = _logits(a, tiles, cdiv(a["B"], a["BLOCK_B"])) + tiles * saved
    return Traffic(
        dim_blocks * logits + tiles * _bytes(a["grad"]) + kept, _inputs(a) + saved + _bytes(a["grad"]) + kept
    )


def _hidden_grad(a: Arguments) -> Traffic:
    tiles, row_blocks = _tiles(a), cdiv(a["B"], a["BLOCK_B"])
    channel_blocks = cdiv(a["hidden"].shape[1], a["BLOCK_O"]) if a["FOR_HIDDEN"] else 1
    recomputed = a["ACTIVATION"] != 0 or a["SQUARES"]
    per_row = 0
    if recomputed:
        per_row = a["B"] * a["saved"].element_size() * (2 * (a["ACTIVATION"] != 0) + a["SQUARES"])
    once = tiles * _bytes(a["grad"]) + row_blocks * _bytes(a["reader"])
    once += _logits(a, tiles, row_blocks) + tiles * per_row if recomputed else 0
    stored = (_bytes(a["part"]) if a["FOR_HIDDEN"] else 0) + (_bytes(a["bias_part"]) if a["FOR_BIAS"] else 0)
    cache = channel_blocks * once + (row_blocks * _bytes(a["weight"]) if a["FOR_HIDDEN"] else 0) + stored
    read = _inputs(a) if recomputed else _bytes(a["weight"])
    return Traffic(cache, read + _bytes(a["grad"], a["reader"]) + per_row + stored)


KERNELS: dict[str, Callable[[Arguments], Traffic]] = {
    "prototype_cosine_readout_kernel": _readout,
    "prototype_cosine_combine_kernel": _combine,
    "prototype_cosine_reader_grad_kernel": _reader_grad,
    "prototype_cosine_hidden_grad_kernel": _hidden_grad,
}
