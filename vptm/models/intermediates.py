"""Forms in which the rows after some blocks are given: those of timm's `forward_intermediates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

FORMATS = ("NCHW", "NLC")


def chosen_blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Blocks that `indices` names, in their order: all of None, the last n of a number, or each, from the end where it
    is negative.

    Example:
        >>> chosen_blocks(2, 12), chosen_blocks([-1, 0], 12)
        ([10, 11], [0, 11])
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 0 < indices <= depth:
            raise ValueError(f"indices must be 1 to {depth} last blocks, got {indices}")
        return list(range(depth - indices, depth))
    named: list[Any] = list(indices) if isinstance(indices, Sequence) and not isinstance(indices, str) else [None]
    if not named or not all(type(index) is int and -depth <= index < depth for index in named):
        raise ValueError(f"indices must be integers in {-depth} .. {depth - 1}, got {indices!r}")
    return sorted({index % depth for index in named})


def as_timm(
    rows: Mapping[int, Tensor],
    features: Tensor | None,
    *,
    prefix: int,
    grid: tuple[int, int],
    output_fmt: str,
    return_prefix_tokens: bool,
    output_dict: bool,
) -> Any:
    """Rows (B, T, C) after some blocks as timm gives them.

    Args:
        rows: by block, the prefix first and the patches after it; what comes behind is left out.
        features: of all rows at the end, None where they are not asked for.
        prefix: rows before the patches.
        grid: (rows, columns) of patches.
        output_fmt: "NCHW" or "NLC".
        return_prefix_tokens: pairs of patches and prefix.
        output_dict: a dictionary in place of a tuple or list.
    """
    found = [rows[block] for block in sorted(rows)]
    before = [one[:, :prefix] for one in found]
    patches = [one[:, prefix : prefix + grid[0] * grid[1]] for one in found]
    if output_fmt == "NCHW":
        patches = [one.mT.reshape(one.shape[0], one.shape[2], *grid).contiguous() for one in patches]
    with_prefix = return_prefix_tokens and prefix > 0
    if output_dict:
        out: dict[str, Any] = {"image_intermediates": patches}
        out |= {"image_intermediates_prefix": before} if with_prefix else {}
        return out if features is None else out | {"image_features": features}
    given: list[Any] = list(zip(patches, before)) if with_prefix else patches
    return given if features is None else (features, given)
