"""Pictures listed one by one with the names of their classes: the data sets of their splits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vptm.data.datasets import ImageDataset
from vptm.messages import one_line

ORDER = ("all", "train", "val", "test")


class Entry(NamedTuple):
    """One labelled picture: an item of `ImageDataset`, its key, the name of its class, and its split or "all"."""

    image: Any
    key: str
    label: str
    split: str


def parts_of(entries: Iterable[Entry], where: object, classes: Sequence[str] | None = None) -> dict[str, ImageDataset]:
    """Data sets by split, with the classes in their natural order: `classes`, or those of the training images, or of
    all where there is no train split.

    Raises:
        ValueError: no entry, or a label that is no class, naming `where`.
    """
    found = list(entries)
    if not found:
        raise ValueError(f"{where} must list images, got none")
    named = {entry.split for entry in found}
    if classes is None:
        trained = {entry.label for entry in found if entry.split == "train" or "train" not in named}
        classes = sorted(trained, key=natural)
    numbers = {label: index for index, label in enumerate(classes)}
    parts = {}
    for split in ORDER:
        chosen = [entry for entry in found if entry.split == split]
        if not chosen:
            continue
        if unknown := [entry.label for entry in chosen if entry.label not in numbers]:
            raise ValueError(
                f"{where}: the {split} split has the label {one_line(unknown[0])!r}, which the train split does not "
                "have"
            )
        parts[split] = ImageDataset(
            [entry.image for entry in chosen],
            np.array([numbers[entry.label] for entry in chosen]),
            classes,
            keys=[entry.key for entry in chosen],
        )
    return parts


class Listed:
    """Each picture once, under one label, however its path is written."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str]] = {}

    def add(self, file: Path, path: str, label: str, where: str) -> None:
        """One more; FileNotFoundError or ValueError, beginning with `where`, where it is not there or was listed."""
        if not is_file(file):
            raise FileNotFoundError(f"{where}: image not found: {one_line(file, 1000)}")
        count = len(self._seen)
        # by way of a link too, one file is one image
        first, its_label = self._seen.setdefault(os.path.realpath(file), (path, label))
        if its_label != label:
            both = f"{one_line(its_label)!r} and {one_line(label)!r}"
            raise ValueError(f"{where}: {path} has the labels {both}")
        if len(self._seen) == count:
            also = "" if first == path else f", as {first} and {path}"
            raise ValueError(f"{where}: must list each image once, got {first} more than once{also}")


def is_file(path: Path) -> bool:
    """Whether there is such a file, also of names that no system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def natural(label: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order, before words."""
    number = label.isascii() and label.isdigit()
    digits = label.lstrip("0") if number else ""
    return not number, len(digits), digits or label
