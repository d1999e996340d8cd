"""A csv file that lists pictures with their classes and splits; what is not surely that is refused."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from vptm.data.datasets import ImageDataset
from vptm.data.folders import SPLIT_NAMES
from vptm.messages import error_line, one_line


def read_csv_file(file: Path) -> dict[str, ImageDataset]:
    """Splits of a file with the header `path,label` or `path,label,split`; without splits it is "all".

    Raises:
        FileNotFoundError: a picture that is not there.
        ValueError: another header or row, an image that is listed twice, or a class that the train split lacks.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} must be a UTF-8 csv file: {error_line(error)}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if header not in (["path", "label"], ["path", "label", "split"]):
        raise ValueError(
            f"{file} must start with the header path,label or path,label,split, got {one_line(','.join(header))!r}"
        )
    parsed: list[tuple[str, str, str]] = []
    seen: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header) or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{file} row {number}: must be {','.join(header)}, got {one_line(','.join(row))!r}")
        path, label, split = row[0].strip(), row[1].strip(), row[2].strip().lower() if len(row) == 3 else None
        if split is not None and split not in SPLIT_NAMES:
            raise ValueError(
                f"{file} row {number}: split must be one of {', '.join(SPLIT_NAMES)}, got {one_line(split)!r}"
            )
        if not _is_file(file.parent / path):
            raise FileNotFoundError(f"{file} row {number}: image not found: {one_line(file.parent / path, 1000)}")
        # however it is written, by way of a link too, one file is one image
        first, its_label = seen.setdefault(os.path.realpath(file.parent / path), (path, label))
        if its_label != label:
            both = f"{one_line(its_label)!r} and {one_line(label)!r}"
            raise ValueError(f"{file} row {number}: {path} has the labels {both}")
        if len(seen) == len(parsed):
            also = "" if first == path else f", as {first} and {path}"
            raise ValueError(f"{file} row {number}: must list each image once, got {first} more than once{also}")
        parsed.append((path, label, "all" if split is None else SPLIT_NAMES[split]))
    if not parsed:
        raise ValueError(f"{file} must list images, got a header only")
    named = {split for _, _, split in parsed}
    classes = sorted({label for _, label, split in parsed if split == "train" or "train" not in named}, key=_natural)
    numbers = {label: index for index, label in enumerate(classes)}
    parts = {}
    for split in ("all", "train", "val", "test"):
        chosen = [(path, label) for path, label, of in parsed if of == split]
        if not chosen:
            continue
        if unknown := [label for _, label in chosen if label not in numbers]:
            raise ValueError(
                f"{file}: the {split} split has the label {one_line(unknown[0])!r}, which the train split does not have"
            )
        parts[split] = ImageDataset(
            [file.parent / path for path, _ in chosen],
            np.array([numbers[label] for _, label in chosen]),
            classes,
            keys=[path for path, _ in chosen],
        )
    return parts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system takes
        return False


def _natural(label: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order, before words."""
    number = label.isascii() and label.isdigit()
    digits = label.lstrip("0") if number else ""
    return not number, len(digits), digits or label
