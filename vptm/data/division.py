"""Which images of a data set are trained on, validated on and tested on, and the few of a few-shot run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from vptm.data.datasets import ImageDataset


def check_classes(part: ImageDataset, name: str) -> None:
    if len(part.classes) < 2:
        raise ValueError(
            f"{name} must have at least two classes, got only {', '.join(map(repr, part.classes)) or 'none'}"
        )
    counts = np.bincount(part.labels, minlength=len(part.classes))
    if not counts.all():
        raise ValueError(f"{name}: the class {part.classes[int(counts.argmin())]!r} has no readable training image")


def _hash_order(seed: int, keys: Sequence[str]) -> np.ndarray:
    """A permutation that depends on the seed and each key alone, on every machine and version."""
    return np.argsort(np.array([hashlib.sha256(f"{seed}/{key}".encode()).hexdigest() for key in keys]), kind="stable")


def stratified_split(whole: ImageDataset, seed: int, shares: Mapping[str, float]) -> dict[str, ImageDataset]:
    chosen: dict[str, list[int]] = {split: [] for split in (*shares, "train")}
    for label, name in enumerate(whole.classes):
        members = np.flatnonzero(whole.labels == label)
        if len(members) <= len(shares):
            raise ValueError(
                f"class {name!r} has {len(members)} images, at least {len(shares) + 1} are needed to divide it into "
                f"train, {' and '.join(shares)}"
            )
        order = members[_hash_order(seed, [whole.keys[i] for i in members])]
        start = 0
        for split, share in shares.items():
            count = max(1, round(share * len(members)))
            chosen[split] += order[start : start + count].tolist()
            start += count
        chosen["train"] += order[start:].tolist()
    return {split: whole.subset(sorted(indices)) for split, indices in chosen.items()}


def few_shot(dataset: ImageDataset, shots: int, *, seed: int = 0) -> ImageDataset:
    """A balanced subset with `shots` images of every class; the draws of one seed are nested (4 shots within 8).

    Raises:
        ValueError: a class has fewer images than `shots`.

    Example:
        >>> len(few_shot(vptm.load_data("digits").train, 16))
        160
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be an integer >= 1, got {shots!r}")
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    if counts.min(initial=shots) < shots:
        name, fewest = dataset.classes[int(counts.argmin())], int(counts.min())
        works = f"at most {fewest}, or all" if fewest else "all"
        raise ValueError(f"shots must be {works}: class {name!r} has {fewest} training images, got {shots}")
    chosen: list[int] = []
    for label in range(len(dataset.classes)):
        members = np.flatnonzero(dataset.labels == label)
        chosen += members[_hash_order(seed, [dataset.keys[i] for i in members])[:shots]].tolist()
    return dataset.subset(sorted(chosen))
