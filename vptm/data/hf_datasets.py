"""Data sets of Hugging Face `datasets`: a folder, or one that was fetched before. Nothing is fetched here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vptm.data.datasets import ImageDataset
from vptm.data.folders import split_of
from vptm.data.labelled_pictures import Entry, parts_of
from vptm.messages import error_line, listed, one_line

_IMAGES, _LABELS = ("image", "img", "pixel_values"), ("label", "labels")


class Row(NamedTuple):
    """A picture in a table of `datasets`, whose column gives its encoded bytes or where its file lies."""

    table: Any
    column: str
    row: int
    name: str

    def content(self) -> bytes:
        """Its encoded bytes."""
        image = self.table[self.row][self.column]
        if image is None:
            raise ValueError("the row has none")
        return image["bytes"] or Path(image["path"]).read_bytes()


def read_hf_dataset(name: str, notes: list[str]) -> dict[str, ImageDataset]:
    """The splits of a folder that `datasets` saved or can read, or of a data set in the hub's cache.

    The picture is the column of type Image, the label the one of type ClassLabel, whose names are the classes, or a
    column named label or labels; of several, the one with such a name. A train split alone, which is what `datasets`
    calls data without splits, is "all". A split other than train whose labels are all missing is left out.

    Raises:
        FileNotFoundError: `datasets` is not installed, or a name that was not fetched before; each says how to.
        ValueError: what `datasets` cannot read, or columns, splits or labels that do not fit.
    """
    if find_spec("datasets") is None:
        raise FileNotFoundError(f"data hf:{name} needs datasets: pip install datasets")
    import datasets

    folder = _folder(name)
    try:
        saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(str(folder))
    except Exception as error:  # of pyarrow, fsspec and datasets
        raise ValueError(f"data hf:{name} cannot be read: {error_line(error, first=True)}") from error
    tables = dict(found) if isinstance(found, Mapping) else {"train": found}
    entries: list[Entry] = []
    classes: list[str] | None = None
    for split, table in _splits(tables, name, notes).items():
        image = _column(table, datasets.Image, _IMAGES, "picture", name)
        label = _column(table, datasets.ClassLabel, _LABELS, "label", name)
        names = getattr(table.features[label], "names", None)
        labels = table.select_columns([label])[:][label]
        missing = [value is None or (names is not None and value < 0) for value in labels]
        if split != "train" and all(missing):
            notes.append(f"the {split} split has no labels, left out")
            continue
        if any(missing):
            raise ValueError(f"hf:{name}: row {missing.index(True)} of {split} must have a label, got none")
        if names is not None:
            classes = list(names)
        wrong = next((value for value in labels if isinstance(value, bool) or not isinstance(value, int | str)), None)
        if wrong is not None:
            raise ValueError(f"hf:{name}: {label} must hold numbers or names, got {one_line(wrong)}")
        pictures = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        entries += [
            Entry(
                Row(pictures, image, row, f"{row} of {split} in hf:{name}"),
                f"{split}/{row}",
                str(value) if names is None else names[value],
                split,
            )
            for row, value in enumerate(labels)
        ]
    return parts_of(entries, f"hf:{name}", classes)


def _folder(name: str) -> Path:
    """The folder itself, or that of a data set in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(str(snapshot_download(name, repo_type="dataset", local_files_only=True)))
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"data hf:{name} is no folder and was not fetched before: fetch it once with: "
            f"hf download --repo-type dataset {name}"
        ) from None
    except HFValidationError:
        raise FileNotFoundError(f"data not found: no folder or data set hf:{one_line(name, 1000)}") from None


def _splits(tables: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    left_out = []
    for split, table in tables.items():
        named = split_of(split)
        if named is None or named[1]:
            left_out.append(split)
        elif named[0] in found:
            raise ValueError(f"hf:{name} must name each split once, got {listed(list(tables))}")
        else:
            found[named[0]] = table
    if left_out and not found:
        raise ValueError(f"hf:{name} must have the splits train, val or test, got {listed(left_out)}")
    if left_out:
        notes.append(f"splits beside train, val and test are ignored: {listed(left_out, 10)}")
    return {"all": found["train"]} if list(found) == ["train"] else found


def _column(table: Any, kind: type, usual: tuple[str, ...], what: str, name: str) -> str:
    """The column of type `kind`, or one of a usual name among several or none."""
    typed = [column for column, feature in table.features.items() if isinstance(feature, kind)]
    if len(typed) == 1:
        return str(typed[0])
    # a picture has to be of its type, a label may be a number or a word
    allowed = typed or ([] if what == "picture" else list(table.features))
    chosen = next((column for column in usual if column in allowed), None)
    if chosen is None:
        raise ValueError(
            f"hf:{name} must have a column of type {kind.__name__} for the {what}, or one named {usual[0]} of several, "
            f"got {listed([f'{column} ({type(feature).__name__})' for column, feature in table.features.items()], 10)}"
        )
    return chosen
