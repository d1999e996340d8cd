"""Rows of a pool for every image, checked without waiting for a device twice, or at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .private_torch import edits

# {ranges: what they were checked against}, so that a GPU tensor is read back once and not at every call.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()
# {ranges on the CPU: (version, device, copy)}, so that all layers of a model use one copy.
_copies: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_ranges(ranges: Any, batch: int, rows: int, longest: Any, device: torch.device, of: str) -> Tensor:
    """`prompt_ranges` on `device`; ValueError unless (B, 2) int32 inside a pool of `rows` with lengths <= `longest`.

    Ranges on the CPU are checked there and copied, which waits for no GPU. `of` is the tensor whose device it is.
    """
    if not isinstance(longest, int) or longest < 0:
        raise ValueError(f"max_prompt_length must be a non-negative int with prompt_ranges, got {longest!r}")
    if not isinstance(ranges, Tensor):
        raise TypeError(f"prompt_ranges must be a tensor, got {type(ranges).__name__}")
    if ranges.dtype != torch.int32 or tuple(ranges.shape) != (batch, 2):
        raise ValueError(f"prompt_ranges must be (B, 2) = ({batch}, 2) int32, got {tuple(ranges.shape)} {ranges.dtype}")
    if ranges.device != device and not ranges.is_cpu:
        raise ValueError(f"prompt_ranges must be on the CPU or on the device of {of}, {device}, got {ranges.device}")
    # Values cannot be read while a graph is traced or captured; kernels stay inside the pool whatever they are.
    if torch.compiler.is_compiling() or ranges.is_meta or type(ranges) is not Tensor:
        return ranges if ranges.device == device else ranges.to(device)
    if ranges.is_cuda and torch.cuda.is_current_stream_capturing():
        return ranges
    version = edits(ranges)
    key = (version, rows, longest)
    if version is None or _checked.get(ranges) != key:
        _check_values(ranges, rows, longest)
        _checked[ranges] = key
    if ranges.device == device:
        return ranges
    kept = _copies.get(ranges)
    if version is None or kept is None or kept[:2] != (version, device):
        with torch.inference_mode(False):  # a tensor with a version, which is checked once
            copy = ranges.to(device, non_blocking=True)
        _copies[ranges] = kept = (version, device, copy)
    _checked[kept[2]] = (edits(kept[2]), rows, longest)
    return kept[2]


def _check_values(ranges: Tensor, rows: int, longest: int) -> None:
    for image, (start, length) in enumerate(ranges.tolist()):
        if start < 0 or length < 0 or start + length > rows:
            raise ValueError(
                f"prompt_ranges must lie inside the pool of {rows} rows, "
                f"got start {start}, length {length} for image {image}"
            )
        if length > longest:
            raise ValueError(
                f"prompt_ranges must have lengths <= max_prompt_length = {longest}, got {length} for image {image}"
            )
