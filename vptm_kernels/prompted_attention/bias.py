"""BEiT's relative position bias: the table, which entry a pair of tokens uses, and the dense form the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a dense bias that start on multiples of this many elements can be read 16 bytes at a time.
ROW_ALIGNMENT = 16


class RelativePositionBias(NamedTuple):
    """A relative position bias table and the position of every token (BEiT, arXiv 2106.08254; Swin's formulation).

    table: (R, H) floating point, R = (2*Hp - 1) * (2*Wp - 1) + 3, added to the scaled scores. Rows 0 .. R-4 hold patch
        pairs by offset, `(dy + Hp - 1) * (2*Wp - 1) + dx + Wp - 1` with d = query - key; then class->patch,
        patch->class, class->class. 16-bit Triton attention holds a float16 table in float16, any other in float32, so
        that no value overflows; the forward loop for float16 has a seventh fewer instructions.
    window: (Hp, Wp), the patch grid.
    token_ids: (N,) int32: 0 for the class token, 1 + y*Wp + x for a patch, -1 (as any other value) for a token without
        a position, whose row and column are zero. None means (0, 1, ..., Hp*Wp).

    >>> import torch
    >>> from vptm_kernels import RelativePositionBias
    >>> RelativePositionBias(torch.randn(9 * 9 + 3, 4), (5, 5)).dense().shape
    torch.Size([4, 26, 26])
    """

    table: Tensor
    window: tuple[int, int]
    token_ids: Tensor | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(H, N, N) bias on aligned rows, which kernels read in place: build it once when the table is frozen.

        dtype: float16 for 16-bit Triton attention, unless the table holds larger values.
        """
        bias = expand_table(self.table if dtype is None else self.table.to(dtype), self.window, self.token_ids)
        return align_rows(bias)


def table_rows(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3


def relative_position_index(window: tuple[int, int], token_ids: Tensor) -> Tensor:
    """(N, N) row of the table for every query and key; R (one past the end) where either has no position."""
    height, width = window
    rows = table_rows(window)
    ids = token_ids.long()
    ids = torch.where((ids >= 0) & (ids <= height * width), ids, -1)
    patch = (ids - 1).clamp(min=0)
    offset = patch + torch.div(patch, width, rounding_mode="floor") * (width - 1)
    index = offset[:, None] - offset[None, :] + (rows - 4) // 2
    query, key = ids[:, None], ids[None, :]
    index = torch.where(key == 0, rows - 2, index)
    index = torch.where(query == 0, torch.where(key == 0, rows - 1, rows - 3), index)
    return torch.where((query < 0) | (key < 0), rows, index)


def expand_table(table: Tensor, window: tuple[int, int], token_ids: Tensor | None) -> Tensor:
    """(H, N, N) dense bias of a (R, H) table."""
    if token_ids is None:
        token_ids = torch.arange(window[0] * window[1] + 1, device=table.device)
    index = relative_position_index(window, token_ids)
    padded = torch.cat([table, table.new_zeros(1, table.shape[1])])
    n = index.shape[0]
    return padded.index_select(0, index.flatten()).view(n, n, -1).permute(2, 0, 1)


def reduce_to_table(dense: Tensor, window: tuple[int, int], token_ids: Tensor | None) -> Tensor:
    """(R, H) sum of the entries of a (H, N, N) gradient that share a table row, in a fixed order."""
    if token_ids is None:
        token_ids = torch.arange(window[0] * window[1] + 1, device=dense.device)
    index = relative_position_index(window, token_ids).flatten()
    heads = dense.shape[0]
    table = dense.new_zeros(table_rows(window) + 1, heads)
    source = dense.permute(1, 2, 0).reshape(-1, heads)
    # On a GPU index_add_ uses atomics and index_put_ sorts; on a CPU index_put_ uses atomics and index_add_ is serial.
    if dense.device.type == "cpu":
        table.index_add_(0, index, source)
    else:
        table.index_put_((index,), source, accumulate=True)
    return table[:-1]


def align_rows(bias: Tensor) -> Tensor:
    """The same (H, rows, columns) values in a buffer whose rows start on multiples of ROW_ALIGNMENT elements."""
    columns = bias.shape[-1]
    padded = -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.nn.functional.pad(bias, (0, padded - columns))[..., :columns]
