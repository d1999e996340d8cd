"""Which images a run was trained, validated and tested on: their names and the hashes of their contents.

A folder moves and grows; the list still tells which of its images were learned from.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vptm.data.datasets import ImageDataset
from vptm.messages import error_line, one_line
from vptm.weights.files import write_atomically

SPLIT_FILE = "split.csv"
_HEADER = ("split", "path", "sha256")
SPLITS = ("train", "val", "test")


class ListedImage(NamedTuple):
    """One image of a run: its split, its key in the data set, and `ImageDataset.content_hashes` of it."""

    split: str
    key: str
    sha256: str


@dataclass(frozen=True)
class SplitList:
    """The images of a run.

    Example:
        >>> from vptm.data.sources import load_data
        >>> data = load_data()
        >>> images = SplitList.of({"train": data.train, "test": data.test})
        >>> len(images.keys("train")), images.used(data.test.content_hashes()[:3])
        (640, ['test', 'test', 'test'])
    """

    images: tuple[ListedImage, ...]

    @classmethod
    def of(cls, parts: Mapping[str, ImageDataset]) -> SplitList:
        """The list of data sets by split; reads every image file once."""
        return cls(
            tuple(
                ListedImage(split, key, digest)
                for split, part in parts.items()
                for key, digest in zip(part.keys, part.content_hashes())
            )
        )

    @classmethod
    def read(cls, folder: Path) -> SplitList | None:
        """The list in a run folder, None where there is none; ValueError where the file is not such a list."""
        path = folder / SPLIT_FILE
        if not path.is_file():
            return None
        try:
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
                header, *rows = csv.reader(lines, strict=True)
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path} must be a csv file: {error_line(error)}") from None
        if tuple(header) != _HEADER or any(len(row) != 3 or row[0] not in SPLITS for row in rows):
            raise ValueError(f"{path} must list {','.join(_HEADER)} of the images of a run, got something else")
        return cls(tuple(ListedImage(*row) for row in rows))

    def write(self, folder: Path) -> None:
        """Write `split.csv`, replaced by a rename; names that are not UTF-8 keep their bytes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(self.images)
        write_atomically(folder / SPLIT_FILE, text.getvalue().encode("utf-8", "surrogateescape"))

    def keys(self, split: str | None) -> dict[str, str]:
        """Key and hash of every image of a split; empty for None."""
        return {image.key: image.sha256 for image in self.images if image.split == split}

    def repeated(self) -> dict[str, int]:
        """How many images of val and test have the contents of a training image, where any has."""
        trained = {image.sha256 for image in self.images if image.split == "train"}
        counts = Counter(image.split for image in self.images if image.split != "train" and image.sha256 in trained)
        return dict(counts)

    def used(self, hashes: Sequence[str]) -> list[str | None]:
        """For each hash the split whose image has that content, train before val before test; None for a new one."""
        split_of: dict[str, str] = {}
        for split in reversed(SPLITS):
            split_of |= dict.fromkeys(self.keys(split).values(), split)
        return [split_of.get(digest) for digest in hashes]

    def difference(self, other: SplitList) -> str | None:
        """What `other` has not as it is here, on one line; None where both list the same images."""
        for split in SPLITS:
            mine, theirs = self.keys(split), other.keys(split)
            if not mine or not theirs:  # a run that was not to be tested may be now
                continue
            kinds = {
                "gone": [key for key in mine if key not in theirs],
                "new": [key for key in theirs if key not in mine],
                "changed": [key for key, digest in mine.items() if theirs.get(key, digest) != digest],
            }
            found = [f"{len(keys)} {kind}, such as {one_line(keys[0])}" for kind, keys in kinds.items() if keys]
            if found:
                return f"of its {len(mine)} {split} images {'; '.join(found)}"
        return None

    def is_within(self, parts: Mapping[str, ImageDataset]) -> bool:
        """Whether every image of the list is in the data, under the same key and with the same content."""
        wanted = {image.key: image.sha256 for image in self.images}
        found = [
            part.subset([index for index, key in enumerate(part.keys) if key in wanted]) for part in parts.values()
        ]
        if not wanted or sum(map(len, found)) != len(wanted):
            return False
        return all([wanted[key] for key in part.keys] == part.content_hashes() for part in found)
