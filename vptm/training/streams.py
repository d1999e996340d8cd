"""Data sets that are iterated and not indexed, such as shards over a network: what an epoch of them is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def epoch_steps(train: DataLoader[Any], steps_per_epoch: int | None) -> int:
    """Batches of an epoch: all of a data set, `steps_per_epoch` of a stream, or as many as its length says.

    Raises:
        TypeError: a stream without a length, and no `steps_per_epoch`.
        ValueError: no batch, or `steps_per_epoch` for what is no stream.
    """
    kind = type(train.dataset).__name__
    if steps_per_epoch is not None:
        if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be an integer >= 1, got {steps_per_epoch!r}")
        if not isinstance(train.dataset, IterableDataset):
            raise ValueError(f"steps_per_epoch must be None for data that is no stream, got {steps_per_epoch}")
        return steps_per_epoch
    try:
        steps = len(train)
    except TypeError:
        raise TypeError(
            f"train must have a length, for the learning rate: give {kind} a __len__, or pass steps_per_epoch"
        ) from None
    if not steps:
        also = f", or steps_per_epoch where {kind} does not know" if isinstance(train.dataset, IterableDataset) else ""
        raise ValueError(
            f"train must hold at least one batch: {len(train.dataset)} images in batches of {train.batch_size}{also}"  # type: ignore[arg-type]
        )
    return steps


def epoch_batches(loader: DataLoader[Any], steps: int) -> Iterator[Any]:
    """The batches of an epoch: those of a data set, or the first `steps` of a stream, which is begun again where it
    ends before.

    Raises:
        ValueError: a stream that gives nothing when it is begun.
    """
    if not isinstance(loader.dataset, IterableDataset):
        yield from loader
        return
    given = 0
    while given < steps:
        before = given
        for batch in loader:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise ValueError(
                f"train must give batches whenever it is begun, {type(loader.dataset).__name__} gave none after {given}"
            )
