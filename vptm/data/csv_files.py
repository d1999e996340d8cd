"""A csv file that lists pictures with their classes and splits; what is not surely that is refused."""

from __future__ import annotations

import csv
from pathlib import Path

from vptm.data.datasets import ImageDataset
from vptm.data.folders import SPLIT_NAMES
from vptm.data.labelled_pictures import Entry, Listed, parts_of
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
    parsed: list[Entry] = []
    images = Listed()
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        where = f"{file} row {number}"
        if len(row) != len(header) or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{where}: must be {','.join(header)}, got {one_line(','.join(row))!r}")
        path, label, split = row[0].strip(), row[1].strip(), row[2].strip().lower() if len(row) == 3 else None
        if split is not None and split not in SPLIT_NAMES:
            raise ValueError(f"{where}: split must be one of {', '.join(SPLIT_NAMES)}, got {one_line(split)!r}")
        images.add(file.parent / path, path, label, where)
        parsed.append(Entry(file.parent / path, path, label, "all" if split is None else SPLIT_NAMES[split]))
    if not parsed:
        raise ValueError(f"{file} must list images, got a header only")
    return parts_of(parsed, file)
