"""Which files are pictures, and all of them below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image

from vptm.data.decoding import FORMATS, formats


@cache
def suffixes() -> frozenset[str]:
    """What names of pictures end in, as ".png"."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in formats()}
    return frozenset(known | {".mpo"})  # several JPEG images in one file, the first of which is read


def is_picture(path: Path) -> bool:
    """Whether a file is one for `read_image`: by its suffix, and where that is unknown or missing by its content."""
    if path.suffix.lower() in suffixes():
        return True
    try:
        with Image.open(path, formats=formats()):
            return True
    except Exception:  # what is no picture makes Pillow's readers raise many kinds
        return False


def image_files(folder: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """Every image file below `folder`, sorted; hidden files and folders are left out.

    Args:
        folder: looked through to any depth; linked folders below it are not entered.
        left_out: counts, by suffix or kind, what else is there.

    Raises:
        OSError: a folder that cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    found: list[Path] = []
    folders = [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif path.is_dir():
                    left_out["linked folder"] += 1
                elif not path.is_file():  # a link that leads nowhere, or to itself, which the entry would not bear
                    left_out["broken link" if entry.is_symlink() else "special file"] += 1
                elif is_picture(path):
                    found.append(path)
                else:
                    left_out[path.suffix.lower() or "no suffix"] += 1
    return sorted(found)


def left_out_note(left_out: Counter[str], shown: int = 6) -> str:
    """What `image_files` counted, as "left out 42 files that are no images (AVIF, ...): 40 .heic, 2 .txt"."""
    kinds: Sequence[tuple[str, int]] = left_out.most_common()
    listed = [f"{count} {kind}" for kind, count in kinds[:shown]]
    if rest := sum(count for _, count in kinds[shown:]):
        listed.append(f"{rest} others")
    return f"left out {left_out.total()} files that are no images of {', '.join(FORMATS)}: {', '.join(listed)}"
