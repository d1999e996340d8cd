"""Pictures with any number of labels each: the data set, its division, and the list that names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vptm.data.datasets import ImageDataset
from vptm.data.division import hash_order
from vptm.data.folders import SPLIT_NAMES
from vptm.data.labelled_pictures import ORDER, Listed, natural
from vptm.data.labels import check_several
from vptm.messages import error_line, one_line

_KEYS = {"file_name", "labels", "split"}


class SeveralLabelsDataset(ImageDataset):
    """Images with labels (N, K) of 0 and 1; item i is `(transform(PIL image), labels (K,) uint8)`."""

    def _checked(self, labels: Any, classes: int) -> np.ndarray:
        found = np.asarray(labels)
        check_several(found, classes)
        return found.astype(np.uint8)

    def label(self, index: int) -> Tensor:
        """Labels (K,) uint8 of 0 and 1."""
        return torch.from_numpy(self.labels[index])

    def counts(self) -> np.ndarray:
        """Images of each class, (K,)."""
        return self.labels.sum(0, dtype=np.int64)

    def renumbered(self, numbers: np.ndarray, classes: list[str]) -> ImageDataset:
        """The same images with class k as class `numbers[k]` of `classes`."""
        labels = np.zeros((len(self), len(classes)), np.uint8)
        labels[:, numbers] = self.labels
        return self.with_labels(labels, classes)


def divided(whole: ImageDataset, seed: int, shares: Mapping[str, float]) -> dict[str, ImageDataset]:
    """Parts of the images by `shares`, at least one each, and the rest as "train"; drawn by `seed` and the keys.

    Raises:
        ValueError: too few images.
    """
    if len(whole) <= len(shares):
        raise ValueError(f"at least {len(shares) + 1} images are needed to divide them, got {len(whole)}")
    order, start, parts = hash_order(seed, whole.keys), 0, {}
    for split, share in shares.items():
        count = max(1, round(share * len(whole)))
        parts[split] = whole.subset(sorted(order[start : start + count]))
        start += count
    return {**parts, "train": whole.subset(sorted(order[start:]))}


def read_jsonl_file(file: Path) -> dict[str, ImageDataset]:
    """Splits of a list of pictures with their labels, as Hugging Face's image folders have it in `metadata.jsonl`: an
    object a line, `{"file_name": "a.jpg", "labels": ["cat", "dog"]}`, with a "split" in each or in none; without splits
    it is "all". Paths are relative to the file. A picture may have no label.

    The classes are the labels of the train split, or of all where there is none, in their natural order.

    Raises:
        FileNotFoundError: a picture that is not there.
        ValueError: a line that is no such object, an image that is listed twice, or a label that the train split lacks.
    """
    rows: list[tuple[str, list[str], str]] = []
    seen = Listed()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text: {error_line(error)}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file} line {number}"
            path, labels, split = _row(line, where)
            seen.add(file.parent / path, path, "", where)
            rows.append((path, labels, split))
    if not rows:
        raise ValueError(f"{file} must list images, got none")
    named = {split for _, _, split in rows}
    if "all" in named and len(named) > 1:
        raise ValueError(f"{file} must give every image a split, or none, got both")
    trained = {label for _, labels, split in rows if split == "train" or "train" not in named for label in labels}
    classes = sorted(trained, key=natural)
    numbers = {label: index for index, label in enumerate(classes)}
    parts: dict[str, ImageDataset] = {}
    for split in (split for split in ORDER if split in named):
        chosen = [(path, labels) for path, labels, its in rows if its == split]
        table = np.zeros((len(chosen), len(classes)), np.uint8)
        for row, (path, labels) in enumerate(chosen):
            if unknown := [label for label in labels if label not in numbers]:
                raise ValueError(
                    f"{file}: {one_line(path, 200)} of the {split} split has the label {one_line(unknown[0])!r}, which "
                    "the train split does not have"
                )
            table[row, [numbers[label] for label in labels]] = 1
        paths = [path for path, _ in chosen]
        parts[split] = SeveralLabelsDataset([file.parent / path for path in paths], table, classes, keys=paths)
    return parts


def _row(line: str, where: str) -> tuple[str, list[str], str]:
    """Path, labels and split of one line."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    row: dict[str, Any] = found if isinstance(found, dict) else {}
    path, labels, split = row.get("file_name"), row.get("labels"), row.get("split")
    named = isinstance(path, str) and path.strip() and row.keys() <= _KEYS and isinstance(labels, list)
    if not named or not all(isinstance(label, str) and label.strip() for label in labels or ()):
        raise ValueError(
            f'{where}: must be {{"file_name": "...", "labels": ["...", ...]}}, with a "split" or without, got '
            f"{one_line(line, 200)}"
        )
    if split is not None and (not isinstance(split, str) or split.lower() not in SPLIT_NAMES):
        raise ValueError(f"{where}: split must be one of {', '.join(SPLIT_NAMES)}, got {one_line(repr(split), 100)}")
    every: list[str] = list(labels or ())
    if len(set(every)) < len(every):
        raise ValueError(f"{where}: labels must be there once each, got {one_line(every, 200)}")
    return str(path), every, "all" if split is None else SPLIT_NAMES[split.lower()]
