"""The state that a run resumes from: written with a digest of its entries, and read as what anyone may have changed."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptm.weights.files import check_archive, write_atomically

STATE_FILE = "state.pt"
_VERSION = 3  # 1 had neither scaler nor digest, 2 no average
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "epoch": int,
    "learned": dict,
    "optimizer": dict,
    "best": dict,
    "best_epoch": int,
    "best_score": (list, type(None)),
    "history": list,
}


def write_state(path: Path, entries: Mapping[str, Any]) -> None:
    """Write the entries of a state, by one rename."""
    state = {"version": _VERSION, **entries}
    buffer = io.BytesIO()
    torch.save({**state, "digest": _digest(state)}, buffer)
    write_atomically(path, buffer.getvalue())


def read_state(path: Path) -> dict[str, Any]:
    """The entries of a state, with its `version`.

    Raises:
        ValueError: it is no state, of a newer version, or damaged.
    """
    try:
        check_archive(path)
    except ValueError as error:
        raise ValueError(f"{error}; use overwrite") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign files and pickled code raise many kinds
        raise ValueError(
            f"{path} must be a training state of vptm, it is cut off or something else; use overwrite"
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise ValueError(f"{path} must be a training state of version 1 to {_VERSION}, use overwrite to start again")
    entries = _ENTRIES | ({"average": (dict, type(None))} if version > 2 else {})
    for name, kind in entries.items():
        if name not in state or not isinstance(state[name], kind) or isinstance(state[name], bool):
            found = type(state[name]).__name__ if name in state else "none"
            raise ValueError(f"{path} must have the entry {name!r} of a training state, got {found}; use overwrite")
    if version > 1:
        digest = state.pop("digest", None)
        try:
            same = digest == _digest(state)
        except (RuntimeError, MemoryError):  # a mapping that holds itself, a tensor of a claimed size: more than fits
            same = False
        if not same:
            raise ValueError(f"{path} is damaged: its entries do not have the digest written with them; use overwrite")
    _take_scalars(state["optimizer"].get("state"))
    if not len(state["history"]) == state["epoch"] >= state["best_epoch"] >= 0:
        raise ValueError(f"{path} is damaged: its epochs do not agree; use overwrite")
    return state


def _take_scalars(steps: Any) -> None:
    """What an optimiser holds for a parameter that was a scalar, the temperature, as for the one element that it is."""
    for held in steps.values() if isinstance(steps, dict) else ():
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor) and name != "step"}
        if all(value.ndim == 0 for value in tensors.values()):
            held |= {name: value.reshape(1) for name, value in tensors.items()}


def _digest(value: Any) -> str:
    """Of nested mappings, sequences, tensors and plain values: keys, order, types and bytes."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        digest.update(f"{type(part).__name__} ".encode())
        if isinstance(part, Mapping):
            for key, item in part.items():
                add(key)
                add(item)
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        elif isinstance(part, Tensor):
            if part.numel() * part.element_size() > part.untyped_storage().nbytes():
                part = part.as_strided((part.untyped_storage().nbytes() // part.element_size(),), (1,), 0)
            flat = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{part.dtype} {tuple(part.shape)} {zlib.crc32(flat.numpy().data)}".encode())
        else:
            digest.update(repr(part).encode(errors="surrogatepass"))
        digest.update(b";")

    add(value)
    return digest.hexdigest()
