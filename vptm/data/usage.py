"""What is said of pictures before they are trained on: how many are used, which cannot be read, which are all dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from vptm.data.datasets import ImageDataset
from vptm.data.decoding import BadImageError
from vptm.messages import one_line


def class_lines(parts: Mapping[str, ImageDataset | None], pool: ImageDataset, shown: int = 20) -> Iterator[str]:
    """How many images of each class are used, and how many of those to train on, `pool`, are left out."""
    names = [one_line(name) for name in pool.classes]
    counts = {split: part.counts() for split, part in parts.items() if part}
    left_out = pool.counts() - counts["train"]
    width = max(len(name) for name in names[:shown])
    yield f"{len(names)} classes, images of each:"
    for k, name in enumerate(names[:shown]):
        cells = [
            f"{split} {count[k]}" + (f" ({left_out[k]} left out)" if split == "train" and left_out[k] else "")
            for split, count in counts.items()
        ]
        yield f"  {name:{width}}  {', '.join(cells)}"
    if len(names) > shown:
        rest = [f"{split} {count[shown:].sum()}" for split, count in counts.items()]
        yield f"  and {len(names) - shown} more classes: {', '.join(rest)} in all"
    if left_out.any():
        yield (
            f"{counts['train'].sum()} of {len(pool)} training images are used, {left_out.sum()} are left out: "
            "--shots all uses every one"
        )
    else:
        yield f"all {len(pool)} training images are used"


def dark_line(part: ImageDataset) -> str | None:
    """Where 16-bit pictures hold 10 or 12 bits: by their files' depth they are all but black."""
    used = part.brightest()
    if used is None or used[0] >= used[1] / 8:
        return None
    return (
        f"the pictures of more than 8 bits use values up to {used[0]:g} of {used[1]:g} and are as dark as that: "
        f"--value-range 0,{used[0]:g} would spread them"
    )


def refuse_unreadable(parts: Iterable[ImageDataset | None]) -> None:
    """Decode every image once: one epoch of decoding against a run that is lost late.

    Raises:
        BadImageError: naming the first that cannot be read.
    """
    for part in parts:
        bad = {} if part is None else part.unreadable()
        if bad:
            others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise BadImageError(f"{next(iter(bad.values()))}{others}; --on-bad-image skip leaves such files out")
