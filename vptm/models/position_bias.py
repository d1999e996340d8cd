"""Relative position bias of a sequence that holds more than the class token and the patches.

BEiT's table T has R = (2 Hp - 1)(2 Wp - 1) + 3 rows: one for each patch offset, then "class row to patch" (R - 3),
"patch to class column" (R - 2) and "class to class" (R - 1). Prompts and an inserted mask row have no entry of their
own; `extra_bias` says what they get, and `extended_index` writes that down as one index matrix into the table with a
zero row appended (index R).
"""

from __future__ import annotations

import re

import torch
from timm.models.beit import gen_relative_position_index
from torch import Tensor

from vptm.messages import one_of

EXTRA_BIAS_MODES = ("zero", "cls", "neutral", "grid:y,x", "learned")


def parse_extra_bias(extra_bias: str, window: tuple[int, int]) -> tuple[str, tuple[int, int] | None]:
    """Split `extra_bias` into its mode and, for "grid:y,x", the grid position, checked against the patch window (rows,
    columns)."""
    if isinstance(extra_bias, str):
        if extra_bias in ("zero", "cls", "neutral", "learned"):
            return extra_bias, None
        match = re.fullmatch(r"grid:(\d+),(\d+)", extra_bias)
        if match:
            y, x = int(match[1]), int(match[2])
            if y >= window[0] or x >= window[1]:
                raise ValueError(
                    f"extra_bias grid position must lie in the {window[0]}x{window[1]} window, got {extra_bias!r}"
                )
            return "grid", (y, x)
    one_of("extra_bias", extra_bias, EXTRA_BIAS_MODES)
    raise ValueError(f"extra_bias must give numbers for y and x, as grid:7,7, got {extra_bias!r}")


def extended_index(
    window: tuple[int, int], *, prompts: int, mask: bool, mode: str = "zero", grid: tuple[int, int] | None = None
) -> Tensor:
    """Index (T, T) int64 into a bias table with one zero row appended, for rows and columns `[class | patches | mask? |
    prompts]`.

    Modes, for extra rows and columns (T[...] as in the module text):

    - "zero", "learned": all zero;
    - "cls": extras behave as further class tokens: patch to extra R-2, extra to patch R-3, extra or class to extra or
      class R-1;
    - "neutral": as "cls", but the class row sees prompts as patches (R-3), so prompts do not gain on patches there;
    - "grid": the mask row has the bias of grid position (y, x), prompts have zero.

    The bias itself is `cat(table, zeros(1, H))[index].permute(2, 0, 1)`, (H, T, T).
    """
    base = gen_relative_position_index(window)
    tokens = base.shape[0]
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3
    first_prompt = tokens + int(mask)
    total = first_prompt + prompts
    index = torch.full((total, total), rows, dtype=torch.long)
    index[:tokens, :tokens] = base
    extras = slice(tokens, total)
    patches = slice(1, tokens)
    if mode in ("cls", "neutral"):
        index[patches, extras] = rows - 2
        index[extras, patches] = rows - 3
        index[extras, extras] = rows - 1
        index[extras, 0] = rows - 1
        index[0, extras] = rows - 1
        if mode == "neutral":
            index[0, first_prompt:] = rows - 3
    elif mode == "grid" and mask:
        if grid is None:
            raise ValueError("grid must be the (y, x) position of the mask row when mode is 'grid', got None")
        position = 1 + grid[0] * window[1] + grid[1]
        index[tokens, :tokens] = base[position]
        index[:tokens, tokens] = base[:, position]
        index[tokens, tokens] = base[position, position]
    return index
