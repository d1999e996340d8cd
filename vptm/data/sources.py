"""What a source of pictures is, by its name or path: a data set of a package, a folder, a list, shards, a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from PIL import Image

from vptm.data.benchmark_lists import LISTS, lists_beside, read_list
from vptm.data.csv_files import read_csv_file
from vptm.data.datasets import ImageData, ImageDataset
from vptm.data.decoding import BACKGROUND, check_picture_options
from vptm.data.division import check_classes, stratified_split
from vptm.data.folders import read_folder
from vptm.data.hf_datasets import read_hf_dataset
from vptm.data.named_datasets import DATASET_NAMES, read_named
from vptm.data.several_labels import divided, read_jsonl_file
from vptm.data.torchvision_datasets import read_torchvision
from vptm.data.webdataset_shards import read_shards
from vptm.messages import error_line, hint, listed, one_line, one_of
from vptm.settings import OnBadImage
from vptm.weights.files import one_line_errors

PREFIXES = ("hf:", "hfds/", "wds/", "torch/")
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
    multi_label: bool = False,
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
            `root/{train,val,test}/class/*` (see `vptm.data.folders.read_folder` for the names of splits), a CSV file
            with the header `path,label` or `path,label,split`, its paths relative to its own folder, or a list that a
            benchmark is published with (train800.txt, train.json, split_zhou_NAME.json, see
            `vptm.data.benchmark_lists.read_list`). "hf:NAME_OR_FOLDER", also spelt "hfds/...", is read by Hugging Face
            `datasets` (`vptm.data.hf_datasets.read_hf_dataset`), "wds/PATH" is a folder of webdataset shards or one of
            them (`vptm.data.webdataset_shards.read_shards`), "torch/NAME:FOLDER" what torchvision keeps in a folder:
            cifar10, cifar100, mnist, kmnist, fashion_mnist. Nothing is fetched.
        transform: PIL image -> tensor for val and test, see `vptm.transforms`; None yields PIL images.
        train_transform: the same for train; None uses `transform`.
        on_bad_image: "error": reading a broken file raises `BadImageError` naming it. "skip": every file is decoded
            once here, broken ones are dropped and reported in `notes`.
        seed: of the division.
        holdout: False leaves an undivided source whole, in `test`.
        multi_label: the images have any number of labels, for a model with `multi_label=True`: `source` is a .jsonl
            list, see `vptm.data.several_labels.read_jsonl_file`, and items have labels (K,) of 0 and 1. Without splits
            the images are divided as they come, not within classes.
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
        read = _read_source(source, notes, background)
    name = read.name
    _check_labels_of(next(iter(read.parts.values())), name, multi_label)
    parts = {split: part.read_as(background, value_range) for split, part in read.parts.items()}
    if list(parts) == ["all"]:
        whole = parts["all"]
        if holdout:
            check_classes(whole, name)
            divide, within = (divided, "") if multi_label else (stratified_split, " within each class")
            parts = divide(whole, seed, {"test": _TEST_SHARE, "val": _VAL_SHARE})
            check_classes(parts["train"], name)
            notes.append(f"no splits given: divided{within} by seed {seed} into 70 % train, 10 % val, 20 % test")
        else:
            parts = {"test": whole}
    elif "train" in parts:
        if name == "fashion-mnist":
            parts |= stratified_split(parts["train"], seed, {"val": _VAL_SHARE})
            notes.append(f"10 % of the training images, drawn by seed {seed}, are val")
        check_classes(parts["train"], name, complete=read.complete)
        counts = parts["train"].counts()
        if without := [label for label, count in zip(parts["train"].classes, counts) if not count]:
            notes.append(f"classes without a training image: {listed(without, 10)}")
        notes += [f"no {split} images" for split in ("val", "test") if split not in parts]
    elif holdout:
        raise ValueError(f"{name} must have a train split for training, got only {', '.join(parts)}")
    if on_bad_image == "skip":
        # after the division, which so is the same whether broken files are dropped or not
        parts = {split: _drop_unreadable(part, notes) for split, part in parts.items()}
        if "train" in parts:
            check_classes(parts["train"], name, complete=read.complete)
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
        flip=read.flip,
    )


def _check_labels_of(part: ImageDataset, name: str, multi_label: bool) -> None:
    if (part.labels.ndim > 1) == multi_label:
        return
    if multi_label:
        raise ValueError(
            f"--multi-label (multi_label=True) needs a .jsonl list with several labels an image, {name} has one each"
        )
    raise ValueError(f"{name} has several labels an image, which vptm train --multi-label (multi_label=True) learns")


def absolute(source: str) -> str:
    """`source` with its path as an absolute one, where it has a prefix and names one.

    Example:
        >>> absolute("hf:/"), absolute("hf:owner/name-that-is-no-folder")
        ('hf:/', 'hf:owner/name-that-is-no-folder')
    """
    prefix = _prefix(source)
    name, colon, path = source.partition(":") if prefix == "torch/" else (prefix, "", source[len(prefix) :])
    return f"{name}{colon}{Path(path).resolve()}" if prefix and path and os.path.exists(path) else source


def _prefix(source: str) -> str:
    return next((prefix for prefix in PREFIXES if source.startswith(prefix)), "")


class _Source(NamedTuple):
    """What a name stands for: splits, what the data is called, whether its pictures may be mirrored, and whether every
    class must have a training image."""

    parts: dict[str, ImageDataset]
    name: str
    flip: bool = True
    complete: bool = True


def _read_source(source: str | Path, notes: list[str], background: str) -> _Source:
    path, text = Path(source), one_line(source, 1000)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that no system takes
        raise FileNotFoundError(f"data not found: {text}: {error_line(error)}") from None
    if isinstance(source, str) and (source in DATASET_NAMES or _prefix(source)):
        if exists:
            raise ValueError(
                f"data {source!r} is the name of a data set and of {path.resolve()}: pass ./{source} for that one, "
                "or run in another folder"
            )
        if source not in DATASET_NAMES:
            return _prefixed(source, notes)
        parts, flip = read_named(source, background)
        return _Source(parts, source, flip)
    if is_folder:
        return _Source(_image_folder(path, notes), path.resolve().name)
    if exists:
        kind = path.suffix.lower()
        if kind not in (".csv", ".jsonl", *LISTS) or not path.is_file():
            raise ValueError(
                f"data must be a folder of class folders or a .csv, .txt, .json or .jsonl list, got {text}"
            )
        if kind == ".jsonl":
            return _Source(read_jsonl_file(path), path.stem)
        if kind == ".csv":
            return _Source(read_csv_file(path), path.stem)
        return _Source(read_list(path), path.resolve().parent.name, complete=False)
    if len(path.parts) == 1 and not path.suffix:
        raise ValueError(
            f"data must be one of {', '.join(DATASET_NAMES)}, a folder, a list, or a name after "
            f"{', '.join(PREFIXES)}, got {text!r}{hint(text, DATASET_NAMES)}"
        )
    raise FileNotFoundError(f"data not found: no folder or file at {text}")


def _prefixed(source: str, notes: list[str]) -> _Source:
    prefix = _prefix(source)
    rest = source[len(prefix) :]
    if not rest:
        raise ValueError(f"data must be a name or a path after {prefix}, got {source!r}")
    if prefix == "torch/":
        return _Source(*read_torchvision(rest))
    path = Path(rest)
    if prefix == "wds/":
        if not path.exists():
            raise FileNotFoundError(f"data not found: no folder or .tar file at {one_line(rest, 1000)}")
        return _Source(read_shards(path), path.resolve().stem)
    return _Source(read_hf_dataset(rest, notes), path.resolve().name if path.exists() else rest.replace("/", "-"))


def _image_folder(root: Path, notes: list[str]) -> dict[str, ImageDataset]:
    try:
        parts, classes = read_folder(root, notes)
    except ValueError as error:
        lists = lists_beside(root)
        also = f"; its lists are read by their names, as {root / lists[0]}" if lists else ""
        raise ValueError(f"{error}{also}") from None
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
