"""Which images of a data set are trained on, validated on and tested on, and the few of a few-shot run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from vptm.data.datasets import ImageDataset
from vptm.messages import one_line


def check_classes(part: ImageDataset, name: str, *, complete: bool = True) -> None:
    """Refuse fewer than two classes, and, where it must be `complete`, one without an image; `name` is the data's, for
    messages."""
    if len(part.classes) < 2:
        only = f"only {_named(part.classes[0])}" if part.classes else "none"
        raise ValueError(f"{name} must have at least two classes, got {only}")
    counts = part.counts()
    if complete and not counts.all():
        empty = _named(part.classes[int(counts.argmin())])
        raise ValueError(f"{name}: the class {empty} has no readable training image")


def _named(label: str) -> str:
    return one_line(repr(label), 200)


def hash_order(seed: int, keys: Sequence[str]) -> np.ndarray:
    """A permutation that depends on the seed and each key alone, on every machine and version."""
    # names of files may be no UTF-8
    texts = (f"{seed}/{key}".encode("utf-8", "surrogateescape") for key in keys)
    return np.argsort(np.array([hashlib.sha256(text).hexdigest() for text in texts]), kind="stable")


def stratified_split(whole: ImageDataset, seed: int, shares: Mapping[str, float]) -> dict[str, ImageDataset]:
    """Parts of every class by `shares`, at least one image each, and the rest as "train"; drawn by `seed` and the keys.

    Raises:
        ValueError: a class of too few images.
    """
    chosen: dict[str, list[int]] = {split: [] for split in (*shares, "train")}
    for label, name in enumerate(whole.classes):
        members = np.flatnonzero(whole.labels == label)
        if len(members) <= len(shares):
            raise ValueError(
                f"class {_named(name)} has {len(members)} images, at least {len(shares) + 1} are needed to divide it "
                f"into train, {' and '.join(shares)}"
            )
        order = members[hash_order(seed, [whole.keys[i] for i in members])]
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
        ValueError: a class has fewer images than `shots`; the message names the largest number that works.

    Example:
        >>> len(few_shot(vptm.load_data("digits").train, 16))
        160
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be an integer >= 1, got {shots!r}")
    if dataset.labels.ndim > 1:
        raise ValueError(f"shots must be all for images of several labels, got {shots}")
    counts = dataset.counts()
    fewest = int(counts.min()) if len(counts) else 0
    name = _named(dataset.classes[int(counts.argmin())]) if len(counts) else "none"
    if not fewest:
        raise ValueError(f"every class must have a training image for {shots} shots, got none of {name}")
    if fewest < shots:
        raise ValueError(
            f"shots must be at most {fewest}, or all: class {name} has {fewest} training images, got {shots}"
        )
    chosen: list[int] = []
    for label in range(len(dataset.classes)):
        members = np.flatnonzero(dataset.labels == label)
        chosen += members[hash_order(seed, [dataset.keys[i] for i in members])[:shots]].tolist()
    return dataset.subset(sorted(chosen))
