"""The device that computes, and the processes that read pictures for it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

_MOST_WORKERS = 8


def device_of(name: str) -> torch.device:
    """The device that --device names: auto is a GPU where there is one.

    Raises:
        ValueError: another name, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} was asked for, torch sees {torch.cuda.device_count()} GPUs")
    return place


def loader_of(
    part: Dataset[Any],
    batch_size: int,
    workers: int | None,
    place: torch.device,
    *,
    shuffle: bool = False,
    sampler: Sampler[int] | None = None,
) -> DataLoader[Any]:
    """Batches of images as --workers says they are read: in processes of their own, and into pinned memory, where a GPU
    computes; by default in one process for a batch, a processor or eight, whichever are fewest."""
    gpu = place.type == "cuda"
    if workers is None:
        batches = -(-len(part) // batch_size)  # type: ignore[arg-type]
        workers = min(_MOST_WORKERS, _processors(), batches) if gpu else 0
    return DataLoader(part, batch_size, shuffle=shuffle, sampler=sampler, num_workers=workers, pin_memory=gpu)


def _processors() -> int:
    """Those this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
