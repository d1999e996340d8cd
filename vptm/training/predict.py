"""Labels of pictures, batch by batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vptm.data.pictures import BadImageError, image_files, left_out_note, read_image
from vptm.data.transforms import picture_options, transforms
from vptm.messages import one_of
from vptm.models.prompted_model import PromptedModel
from vptm.settings import EVALUATION_BATCH, RunSettings, choices
from vptm.training.precision import compiled, dtype_of, float32_products, in_type, resolve_precision


class Prediction(NamedTuple):
    """What a model says of a picture: the best labels with their softmax probability, best first."""

    path: Path
    top: list[tuple[str, float]]


def picture_files(paths: Iterable[Path], report: Callable[[str], None] = print) -> list[Path]:
    """The paths themselves, and the pictures in those that are folders; `report` gets a line on what is left out.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder without pictures.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"image not found: {path}")
        left_out: Counter[str] = Counter()
        found = image_files(path, left_out) if path.is_dir() else [path]
        note = f": {left_out_note(left_out)}" if left_out else ""
        if not found:
            raise ValueError(f"{path} holds no image files{note}")
        if note:
            report(f"{path}{note}")
        files += found
    return files


def predict(
    model: PromptedModel,
    files: Sequence[Path],
    *,
    top: int = 5,
    batch_size: int = EVALUATION_BATCH,
    on_bad_image: str = "error",
    precision: str | None = None,
    compile: bool = False,
    report: Callable[[str], None] = print,
) -> list[Prediction]:
    """The labels of picture files by a model, where it is.

    Equal to `model(transforms(model)(picture)[None]).softmax(1)` of every picture, by a twin of the model whose
    constants are made once.

    Args:
        model: what learned labels; unnamed ones are numbers. It is left as it is.
        files: pictures, read as the model's training pictures were.
        top: labels of a picture, at most.
        batch_size: pictures at a time.
        on_bad_image: "error" stops at a file that cannot be read, "skip" reports it and goes on.
        precision: what computes, as in `vptm.evaluate`; None is the model's own type.
        compile: `torch.compile` the model.
        report: called with a line for every file that is skipped.

    Raises:
        BadImageError: a file that cannot be read, or none of them can.
        ValueError: an argument out of range.

    Example:
        >>> import tempfile, PIL.Image
        >>> file = Path(tempfile.mkdtemp(), "x.png")
        >>> PIL.Image.new("L", (28, 28)).save(file)
        >>> len(predict(vptm.PromptedBEiT("builtin", num_classes=3), [file])[0].top)
        3
    """
    one_of("on_bad_image", on_bad_image, choices(RunSettings, "on_bad_image"))
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    place = model.prompts.weight.device
    kind = resolve_precision(precision, place, training=False)
    runs = in_type(model, dtype_of(kind), place)
    dtype, runs = runs.prompts.weight.dtype, compiled(runs) if compile else runs.sealed_twin()
    names = model.class_names or [str(k) for k in range(model.num_classes)]
    found: list[Prediction] = []
    for paths, pixels in _batches(model, files, batch_size, report if on_bad_image == "skip" else None):
        with torch.inference_mode(), float32_products(kind):
            scores = runs(pixels.to(place, dtype)).float().softmax(1).cpu()
        best = scores.topk(min(top, len(names)))
        for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist()):
            found.append(Prediction(path, [(names[k], value) for k, value in zip(indices, values)]))
    if not found:
        raise BadImageError(f"none of {len(files)} images could be read")
    return found


def _batches(
    model: PromptedModel, files: Sequence[Path], size: int, skip: Callable[[str], None] | None
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    prepare, read = transforms(model), picture_options(model)
    for start in range(0, len(files), size):
        paths, pixels = [], []
        for path in files[start : start + size]:
            try:
                pixels.append(prepare(read_image(path, **read)))
                paths.append(path)
            except BadImageError as error:
                if skip is None:
                    raise
                skip(f"skipped: {error}")
        if paths:
            yield paths, torch.stack(pixels)
