"""The lists of pictures and labels that benchmarks are published with.

VTAB-1k has `path label` lines (train800.txt, val200.txt, train800val200.txt, test.txt), VPT's fine-grained data a json
object of {path: label} for each split (train.json, val.json, test.json), CoOp one json file with [path, label, class
name] of all splits (split_zhou_NAME.json).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vptm.data.datasets import ImageDataset
from vptm.data.folders import split_of
from vptm.data.labelled_pictures import Entry, Listed, is_file, natural, parts_of
from vptm.messages import error_line, listed, one_line

LISTS = (".txt", ".json")


def read_list(file: Path) -> dict[str, ImageDataset]:
    """The splits of a list, "all" where it has none; lists of the other splits are found beside it.

    Of train800.txt or train.json those are the files beside it that are named for val or test, as val200.txt is; of a
    list that holds the validation images too, as train800val200.txt does, only test. Paths are relative to the folder
    of the list, or to a folder in it. Classes are those of the training images; of `path label` lines, of which few may
    be training images, those of all lists.

    Raises:
        FileNotFoundError: a picture that is not there.
        ValueError: a file that is no such list, a picture twice, or a label that only images of other splits have.
    """
    if file.suffix.lower() == ".txt":
        parts = {split: _text_rows(path) for split, path in _lists_of(file).items()}
        classes: Sequence[str] | None = sorted({row[1] for rows in parts.values() for row in rows}, key=natural)
    else:
        content = _json(file)
        if content and all(isinstance(rows, list) for rows in content.values()):
            parts, classes = _coop_rows(content, file)
        else:
            parts = {split: _pairs(_json(path), path) for split, path in _lists_of(file).items()}
            classes = None
    rows = [(path, label, split) for split, found in parts.items() for path, label in found]
    return parts_of(_entries(rows, file), file, classes)


def lists_beside(folder: Path) -> list[str]:
    """Names of the training lists in a folder: train800.txt, train.json, split_zhou_Food101.json."""
    return [
        path.name
        for path in sorted(folder.glob("*"))
        if path.suffix.lower() in LISTS
        and (path.stem.lower().startswith("train") or path.stem.startswith("split_zhou_"))
    ]


def _entries(rows: Sequence[tuple[str, str, str]], file: Path) -> list[Entry]:
    """Entries of (path, label, split), whose paths are below the folder of `file` or below one folder in it."""
    folder = _folder_of(rows[0][0], file) if rows else file.parent
    images = Listed()
    for path, label, _ in rows:
        images.add(folder / path, path, label, str(file))
    return [Entry(folder / path, path, label, split) for path, label, split in rows]


def _folder_of(path: str, file: Path) -> Path:
    """The folder that a listed path is relative to: the list's own, or the one folder in it that has the picture."""
    if is_file(file.parent / path):
        return file.parent
    inner = [child for child in sorted(file.parent.iterdir()) if child.is_dir() and is_file(child / path)]
    if len(inner) > 1:
        both = listed([child.name for child in inner])
        raise ValueError(f"{file} must have its images in one folder, {one_line(path)} is in {both}")
    return inner[0] if inner else file.parent


def _lists_of(file: Path) -> dict[str, Path]:
    """The list of each split: of a train list, with those of val and test beside it; of another, itself alone."""
    named = split_of(file.stem)
    if not file.stem.lower().startswith("train"):
        return {named[0] if named and not named[1] else "all": file}
    found = {"train": file}
    for split in ("val", "test") if named else ("test",):  # train800val200 holds the validation images
        others = [
            path
            for path in sorted(file.parent.glob(f"*{file.suffix}"))
            if split_of(path.stem) == (split, ()) and path.is_file()
        ]
        if len(others) > 1:
            raise ValueError(
                f"{file} must have one list of {split} images beside it, got {listed([path.name for path in others])}"
            )
        found |= dict(zip([split], others))
    return found


def _text_rows(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8 text: {error_line(error)}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.rsplit(None, 1)  # a path may have spaces
        if len(words) == 1:
            raise ValueError(f"{file} line {number}: must be a path and a label, got {one_line(line)!r}")
        if words:
            rows.append((words[0].strip(), words[1]))
    return rows


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a json file: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} must be an object, {{path: label}} or {{split: [[path, label, class name]]}}, "
            f"got {type(content).__name__}"
        )
    return content


def _pairs(content: dict[str, Any], file: Path) -> list[tuple[str, str]]:
    for path, label in content.items():
        if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
            raise ValueError(f"{file}: the label of {one_line(path)} must be a number or a name, got {one_line(label)}")
    return [(path, str(label).strip()) for path, label in content.items()]


def _coop_rows(content: dict[str, Any], file: Path) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Rows by split, and the names of the classes in the order of their numbers."""
    names: dict[int, str] = {}
    for split, rows in content.items():
        if split not in ("train", "val", "test"):
            raise ValueError(f"{file} must have the splits train, val and test, got {one_line(split)!r}")
        for number, row in enumerate(rows):
            kinds = [type(cell) for cell in row] if isinstance(row, list) else []
            if kinds != [str, int, str]:
                raise ValueError(f"{file}: {split}[{number}] must be [path, label, class name], got {one_line(row)}")
            if names.setdefault(row[1], row[2]) != row[2]:
                raise ValueError(
                    f"{file}: label {row[1]} must have one class name, got {one_line(names[row[1]])!r} and "
                    f"{one_line(row[2])!r}"
                )
    classes = [names[number] for number in sorted(names)]
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(f"{file}: the class name {one_line(twice)!r} must have one label, got several")
    return {split: [(row[0], row[2]) for row in rows] for split, rows in content.items() if rows}, classes
