"""Images with labels: a data set of files or arrays, and the parts that a source is divided into."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vptm.data.decoding import BACKGROUND, BadImageError, read_image, read_upload
from vptm.data.labels import check_labels
from vptm.messages import error_line


class Record(Protocol):
    """A picture that is no file of its own, as in an archive or a table."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def content(self) -> bytes:
        """Its encoded bytes; OSError or ValueError where it has none."""


class Decoded(NamedTuple):
    """What is kept of a picture: its pixels (H, W) or (H, W, 3) uint8, and where it was read."""

    source: Path | Record
    pixels: np.ndarray


class ImageDataset(Dataset[tuple[Any, int]]):
    """Images with labels; item i is `(transform(PIL image), label)`, or the PIL image itself without a transform.

    Args:
        images: file paths, records or (H, W) / (H, W, 3) uint8, or (N, H, W) / (N, H, W, 3) uint8.
        labels: (N,) integers, indices into `classes`.
        classes: label names.
        keys: N stable names (relative paths or row numbers); splits and few-shot draws depend on them alone.
        transform: PIL image -> anything a DataLoader collates.
        background, value_range: how files are read, see `vptm.data.decoding.to_8_bit`.
    """

    def __init__(
        self,
        images: Sequence[Path | Record | np.ndarray | Decoded] | np.ndarray,
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
        self.labels = self._checked(labels, len(classes))
        self.classes = list(classes)
        self.keys = list(keys)
        self.transform = transform
        self.background, self.value_range = background, value_range

    def _checked(self, labels: Any, classes: int) -> np.ndarray:
        found = np.asarray(labels, dtype=np.int64)
        check_labels(found, classes)
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> Any:
        """The label of one image."""
        return int(self.labels[index])

    def counts(self) -> np.ndarray:
        """Images of each class, (K,)."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def renumbered(self, numbers: np.ndarray, classes: list[str]) -> ImageDataset:
        """The same images with class k as class `numbers[k]` of `classes`."""
        return self.with_labels(numbers[self.labels], classes)

    def image(self, index: int) -> Image.Image:
        """The untransformed image; raises `BadImageError` where its file or record cannot be decoded."""
        item: Any = self.images[index]
        if isinstance(item, Decoded):
            return Image.fromarray(item.pixels)
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        if isinstance(item, Path | str):
            return read_image(item, background=self.background, value_range=self.value_range)
        return read_upload(_content(item), background=self.background, value_range=self.value_range, name=item.name)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.label(index)

    def _with(self, **changes: Any) -> ImageDataset:
        names = ("images", "labels", "classes", "keys", "transform", "background", "value_range")
        return type(self)(**({name: getattr(self, name) for name in names} | changes))

    def subset(self, indices: Iterable[int] | np.ndarray) -> ImageDataset:
        """The images at `indices`, in that order, with the same transform."""
        chosen = np.asarray(list(indices), dtype=np.int64)
        images = self.images[chosen] if isinstance(self.images, np.ndarray) else [self.images[i] for i in chosen]
        return self._with(images=images, labels=self.labels[chosen], keys=[self.keys[i] for i in chosen])

    def read_as(self, background: str | None, value_range: tuple[float, float] | None) -> ImageDataset:
        """The same images, whose files are read as `vptm.data.decoding.to_8_bit` says."""
        return self._with(background=background, value_range=value_range)

    def in_memory(self, most: int) -> ImageDataset:
        """The same images, decoded once and kept, where that takes at most `most` bytes; else this data set.

        Raises:
            BadImageError: a file cannot be decoded.
        """
        if isinstance(self.images, np.ndarray):
            return self
        kept: list[Any] = []
        held = 0
        for index in range(len(self)):
            item, image = self.images[index], self.image(index)
            pixels = np.asarray(image)
            kept.append(item if isinstance(item, np.ndarray | Decoded) else Decoded(item, pixels))
            held += pixels.nbytes
            # judged by those so far: a set that is too large is not decoded up to the limit first
            if held * len(self) > most * len(kept) or image.mode not in ("L", "RGB"):
                return self
        return self._with(images=kept)

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
        """SHA-256 of each image's file or record, or of the shape and bytes of its pixels: wherever it lies, the same
        image has the same one. Reads every file once.

        Raises:
            FileNotFoundError: a file that is gone.
        """

        def digest(item: Any) -> str:
            if isinstance(item, np.ndarray):
                return hashlib.sha256(f"{item.shape}".encode() + item.tobytes()).hexdigest()
            source = item.source if isinstance(item, Decoded) else item
            if not isinstance(source, Path | str):
                return hashlib.sha256(_content(source)).hexdigest()
            try:
                return hashlib.sha256(Path(source).read_bytes()).hexdigest()
            except FileNotFoundError:
                raise FileNotFoundError(f"image not found: {source}") from None

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


def _content(record: Record) -> bytes:
    try:
        return record.content()
    except (OSError, ValueError) as error:
        raise BadImageError(f"cannot read image {record.name}: {error_line(error)}") from error


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
