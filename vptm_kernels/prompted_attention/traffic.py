"""Bytes that launches of the attention kernels move, as formulas of their arguments; see `vptm_kernels.aot.Traffic`.

With N tokens and P prompts, rows = N or N + P, keys = N + P, row = D elements of qkv, width = bytes of the bias of one
query (token columns padded to 16, and prompt columns), per image and head:

    forward       row blocks * keys * 2 row  +  rows * (2 row + width + lse)
    query_grad    row blocks * keys * 2 row  +  rows * (4 row + width + lse + delta)
    key_grad      key blocks * rows * (2 row + lse + delta)  +  rows * width of its keys  +  keys * 2 row
    bias_grad     column blocks * rows * (2 row + lse + delta)  +  row blocks * columns * 2 row

and what is stored of gradients. One row block stands for all where keys are resident. Rotary positions add the cosines
and sines of every token row that is turned, and once those of gradients that are turned back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .._runtime.sizes import cdiv
from ..aot import Traffic
from .kernels_common import TABLE

Arguments = Mapping[str, Any]


class _Sizes:
    """What all formulas start from."""

    def __init__(self, a: Arguments) -> None:
        self.batch, self.heads, tokens = a["qkv_ptr"].shape[0], a["H"], a["N"]
        self.tokens, self.prompts = tokens, a["P"]
        self.rows = tokens + (a["P"] if a["PROMPT_QUERIES"] else 0)
        self.row = a["D"] * a["qkv_ptr"].element_size()
        self.lse = 0 if a["lse_ptr"] is None else a["lse_ptr"].element_size()
        self.entry = a["bias_ptr"].element_size() if a["KIND"] else 0
        # A gathered table is read once per pair, of tokens only.
        self.padded = tokens if a["KIND"] == TABLE.value else cdiv(tokens, 16) * 16
        self.extra = a["P"] if a["PROMPT_COLUMNS"] else 0
        self.images_and_heads = self.batch * self.heads
        # cosines and sines of all tokens of one head, and of all heads as they lie in memory
        self.angles = self.tables = 0
        if a["ROTARY"]:
            entries = (a["cos_ptr"].element_size() + a["sin_ptr"].element_size()) * tokens
            self.angles = entries * (a["D"] // 2)
            self.tables = self.angles * (self.heads if a["TABLE_H"] else 1)

    def bias(self, images: int) -> int:
        """Bytes of the tiles of `images` images, which share them."""
        return images * self.heads * self.rows * (self.padded + self.extra) * self.entry

    def prompt_bytes(self, a: Arguments) -> int:
        t = a["prompt_ptr"]
        return 0 if t is None or not self.prompts else t.numel() * t.element_size()


def _forward(a: Arguments) -> Traffic:
    s = _Sizes(a)
    blocks = 1 if a["KEYS_RESIDENT"] else cdiv(s.rows, a["BLOCK_M"])
    out = s.images_and_heads * s.rows * (s.row + (s.lse if a["WITH_LSE"] else 0))
    keys = s.images_and_heads * ((s.tokens + s.prompts) * 2 * s.row + s.angles)
    queries = s.images_and_heads * (s.rows * s.row + s.angles)
    memory = s.images_and_heads * s.tokens * 3 * s.row + s.prompt_bytes(a) + s.bias(1) + out + s.tables
    return Traffic(blocks * keys + queries + s.bias(s.batch) + out, memory)


def _query_grad(a: Arguments) -> Traffic:
    s = _Sizes(a)
    rows = s.prompts if a["OF_PROMPTS"] else s.tokens
    of_rows = s.images_and_heads * rows * (2 * s.row + 2 * s.lse + (s.lse if a["HAS_DLSE"] else 0))
    chunks = a["grad_ptr"].shape[0]
    grad = chunks * s.heads * rows * a["D"] * a["grad_ptr"].element_size()
    keys = s.images_and_heads * ((s.tokens + s.prompts) * 2 * s.row + s.angles)
    turned = 0 if a["OF_PROMPTS"] else (s.images_and_heads + chunks * s.heads) * s.angles
    bias = s.bias(1) * rows // s.rows
    blocks = cdiv(rows, a["BLOCK_M"])
    memory = s.images_and_heads * s.tokens * (2 if a["OF_PROMPTS"] else 3) * s.row + s.prompt_bytes(a)
    cache = blocks * keys + s.images_and_heads * rows * s.row + turned + bias * s.batch + of_rows + grad
    return Traffic(cache, memory + bias + of_rows + grad + s.tables)


def _key_grad(a: Arguments) -> Traffic:
    s = _Sizes(a)
    keys = s.prompts if a["OF_PROMPTS"] else s.tokens
    blocks = cdiv(keys, a["BLOCK_N"])
    of_rows = s.row + s.lse + (s.row if a["FUSE_DELTA"] else s.lse)
    of_rows += s.lse if a["FUSE_DELTA"] and a["HAS_DLSE"] else 0
    columns = s.extra if a["OF_PROMPTS"] else s.padded
    bias = s.heads * s.rows * columns * s.entry
    chunks = a["grad_ptr"].shape[0]
    grad = chunks * s.heads * keys * 2 * a["D"] * a["grad_ptr"].element_size()
    rows = s.images_and_heads * (s.rows * (s.row + of_rows) + s.angles)
    turned = 0 if a["OF_PROMPTS"] else (s.images_and_heads + chunks * s.heads) * s.angles
    cache = blocks * rows + bias * s.batch + s.images_and_heads * keys * 2 * s.row + turned + grad
    # Queries of prompts are shared by the images, and so are their keys unless every image has its own.
    queries = s.images_and_heads * s.tokens * s.row + (s.heads * s.prompts * s.row if a["PROMPT_QUERIES"] else 0)
    key_bytes = s.prompt_bytes(a) if a["OF_PROMPTS"] else s.images_and_heads * keys * 2 * s.row
    if a["OF_PROMPTS"] and a["PROMPT_QUERIES"]:
        key_bytes = key_bytes * 2 // 3
    return Traffic(cache, queries + s.images_and_heads * s.rows * of_rows + bias + key_bytes + grad + s.tables)


def _bias_grad(a: Arguments) -> Traffic:
    s = _Sizes(a)
    rows, columns, heads = a["grad_rows"], a["grad_columns"], a["heads"]
    pairs = s.batch * heads
    queries = pairs * rows * (2 * s.row + 2 * s.lse)
    keys = pairs * columns * 2 * s.row
    chunks = cdiv(s.batch, a["images"])
    bias = heads * rows * (s.padded if columns == s.tokens else columns) * s.entry
    grad = chunks * heads * rows * columns * a["grad_ptr"].element_size()
    blocks = cdiv(columns, a["BLOCK_N"]), cdiv(rows, a["BLOCK_M"])
    cache = blocks[0] * queries + blocks[1] * keys + sum(blocks) * pairs * s.angles + chunks * bias + grad
    return Traffic(cache, queries + keys + bias + grad + s.tables)


KERNELS: dict[str, Callable[[Arguments], Traffic]] = {
    "prompted_attention_forward_kernel": _forward,
    "prompted_attention_query_grad_kernel": _query_grad,
    "prompted_attention_key_grad_kernel": _key_grad,
    "prompted_attention_bias_grad_kernel": _bias_grad,
}
