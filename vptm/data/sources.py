"""What a source of pictures is, by its name or path: a data set of a package, a folder, a csv file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from vptm.data.csv_files import read_csv_file
from vptm.data.datasets import ImageData, ImageDataset
from vptm.data.decoding import BACKGROUND, check_picture_options
from vptm.data.division import check_classes, stratified_split
from vptm.data.folders import read_folder
from vptm.data.named_datasets import DATASET_NAMES, read_named
from vptm.messages import error_line, hint, one_line, one_of
from vptm.settings import OnBadImage
from vptm.weights.files import one_line_errors

ON_BAD_IMAGE = get_args(OnBadImage)
_TEST_SHARE, _VAL_SHARE = 0.2, 0.1


def load_data(
    source: str | Path = "builtin",
    *,
    transform: Callable[[Image.Image], Any] | None = None,
    train_transform: Callable[[Image.Image], Any] | None = None,
    on_bad_image: str = "error",
    seed: int = 0,
    holdout: bool = True,
    background: str = BACKGROUND,
    value_range: tuple[float, float] | None = None,
) -> ImageData:
    """Load images and labels as train, val and test data sets.

    A source without given splits is divided within each class: 20 % test, 10 % val, at least one image each, the rest
    train. The draw orders the images by a hash of (seed, relative path), so it is the same on every machine and
    hardly moves when files are added. A source with a train and a test part and no val part gets no val part, except
    "fashion-mnist", where 10 % of the training images become val.

    Args:
        source: "builtin" (a shipped Fashion-MNIST subset: 64 train, 32 val, 150 test images per class),
            "fashion-mnist", "digits", "mnist5k", "stamps" (96 x 96 colour photos and drawings of 11 kinds of things),
            all from packages (each refusal says how to install it), an image folder `root/class/*` or
            `root/{train,val,test}/class/*` (see `vptm.data.folders.read_folder` for the names of splits), or a CSV file
            with the header `path,label` or `path,label,split`, its paths relative to its own folder.
        transform: PIL image -> tensor for val and test, see `vptm.transforms`; None yields PIL images.
        train_transform: the same for train; None uses `transform`.
        on_bad_image: "error": reading a broken file raises `BadImageError` naming it. "skip": every file is decoded
            once here, broken ones are dropped and reported in `notes`.
        seed: of the division.
        holdout: False leaves an undivided source whole, in `test`.
        background, value_range: how pictures with transparency, or of more than 8 bits, are read, see
            `vptm.data.decoding.to_8_bit`.

    Raises:
        FileNotFoundError: a path that does not exist, or a package data set that is not installed.
        ValueError: unknown name, a name that is also that of a file or folder here, no images, an empty class, one
            class only, labels that do not match, folders that may be splits and may be classes.

    Example:
        >>> data = load_data("digits")
        >>> len(data.classes), data.train[0][0].size
        (10, (8, 8))
    """
    one_of("on_bad_image", on_bad_image, ON_BAD_IMAGE)
    if not isinstance(source, (str, Path)):
        raise TypeError(f"data must be a name or a path, got {type(source).__name__}")
    if not str(source):
        raise ValueError("data must be a name or a path, got an empty one")
    check_picture_options(background, value_range)
    notes: list[str] = []
    with one_line_errors(one_line(source, 200)):
        found, name, flip = _read_source(source, notes, background)
    parts = {split: part.read_as(background, value_range) for split, part in found.items()}
    if list(parts) == ["all"]:
        whole = parts["all"]
        if holdout:
            check_classes(whole, name)
            parts = stratified_split(whole, seed, {"test": _TEST_SHARE, "val": _VAL_SHARE})
            notes.append(
                f"no splits given: divided within each class by seed {seed} into 70 % train, 10 % val, 20 % test"
            )
        else:
            parts = {"test": whole}
    elif "train" in parts:
        if name == "fashion-mnist":
            parts |= stratified_split(parts["train"], seed, {"val": _VAL_SHARE})
            notes.append(f"10 % of the training images, drawn by seed {seed}, are val")
        check_classes(parts["train"], name)
        notes += [f"no {split} images" for split in ("val", "test") if split not in parts]
    elif holdout:
        raise ValueError(f"{name} must have a train split for training, got only {', '.join(parts)}")
    if on_bad_image == "skip":
        # after the division, which so is the same whether broken files are dropped or not
        parts = {split: _drop_unreadable(part, notes) for split, part in parts.items()}
        if "train" in parts:
            check_classes(parts["train"], name)
    first = next(iter(parts.values()))
    train = parts.get("train", first.subset([]))
    test_transform = {split: parts[split].with_transform(transform) for split in ("val", "test") if split in parts}
    return ImageData(
        train=train.with_transform(transform if train_transform is None else train_transform),
        val=test_transform.get("val"),
        test=test_transform.get("test"),
        classes=first.classes,
        name=name,
        notes=tuple(notes),
        flip=flip,
    )


def _read_source(source: str | Path, notes: list[str], background: str) -> tuple[dict[str, ImageDataset], str, bool]:
    path = Path(source)
    if isinstance(source, str) and source in DATASET_NAMES:
        if path.exists():
            raise ValueError(
                f"data {source!r} is the name of a data set and of {path.resolve()}: pass ./{source} for that one, "
                "or run in another folder"
            )
        parts, flip = read_named(source, background)
        return parts, source, flip
    text = one_line(source, 1000)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that no system takes
        raise FileNotFoundError(f"data not found: {text}: {error_line(error)}") from None
    if is_folder:
        return _image_folder(path, notes), path.resolve().name, True
    if exists:
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise ValueError(f"data must be a folder of class folders or a .csv file, got {text}")
        return read_csv_file(path), path.stem, True
    if len(path.parts) == 1 and not path.suffix:
        raise ValueError(
            f"data must be one of {', '.join(DATASET_NAMES)}, a folder or a .csv file, "
            f"got {text!r}{hint(text, DATASET_NAMES)}"
        )
    raise FileNotFoundError(f"data not found: no folder or file at {text}")


def _image_folder(root: Path, notes: list[str]) -> dict[str, ImageDataset]:
    parts, classes = read_folder(root, notes)
    number = {name: index for index, name in enumerate(classes)}
    return {
        split: ImageDataset(
            listing.paths,
            np.array([number[name] for name in listing.names]),
            classes,
            keys=[path.relative_to(root).as_posix() for path in listing.paths],
        )
        for split, listing in parts.items()
    }


def _drop_unreadable(part: ImageDataset, notes: list[str]) -> ImageDataset:
    bad = part.unreadable()
    if not bad:
        return part
    notes += [f"skipped: {message}" for message in bad.values()]
    return part.subset([index for index in range(len(part)) if index not in bad])
