"""Labels of pictures, as they are read: by one task, or by many on one backbone."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vptm.data.decoding import BadImageError, read_image, to_8_bit
from vptm.data.labels import class_labels
from vptm.data.picture_files import image_files, left_out_note
from vptm.data.transforms import picture_options, transforms
from vptm.messages import check_integer, one_of
from vptm.models.opening import load_adapter
from vptm.models.prompted_model import PromptedModel
from vptm.serving.task_bank import TaskBank, TaskInfo
from vptm.serving.thresholds import threshold_of
from vptm.settings import EVALUATION_BATCH, RunSettings, choices
from vptm.training.graphs import InferenceGraph, check_graph
from vptm.training.precision import compiled, dtype_of, float32_products, in_type, resolve_precision

_TOP = 5
_READERS = 4  # threads that read pictures while a batch is computed; decoders let go of the interpreter


class Prediction(NamedTuple):
    """What a task says of a picture: the best labels with their softmax probability, best first; of a multi-label model
    those whose probability, a sigmoid, is at least the threshold, which may be none, or all.

    path: None for what was no file. task: its name, where there are several.
    """

    path: Path | None
    top: list[tuple[str, float]]
    task: str | None = None


class Unreadable(NamedTuple):
    """A file that is no picture, and why."""

    path: Path
    reason: str


def picture_files(paths: Iterable[str | Path], report: Callable[[str], None] = print) -> list[Path]:
    """Files as they are, the pictures in folders, and the files that patterns match; each once.

    `report` gets a line on what of a folder is left out.

    Raises:
        FileNotFoundError: a path that does not exist, or a pattern that matches nothing.
        ValueError: a folder without pictures.
    """
    files: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            left_out: Counter[str] = Counter()
            found = image_files(path, left_out)
            note = f": {left_out_note(left_out)}" if left_out else ""
            if not found:
                raise ValueError(f"{path} holds no image files{note}")
            if note:
                report(f"{path}{note}")
        elif path.exists():
            found = [path]
        else:
            found = sorted(map(Path, glob.iglob(str(given), recursive=True)))
            if not found:
                raise FileNotFoundError(f"image not found: {path}")
        files.update(dict.fromkeys(found))
    return list(files)


def predictions(
    model: PromptedModel | TaskBank,
    images: Iterable[str | Path | Image.Image | Tensor],
    *,
    top: int | None = None,
    threshold: float | None = None,
    batch_size: int = EVALUATION_BATCH,
    precision: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Iterator[Prediction | Unreadable]:
    """What `predict` gives, one after the other while images are still read; a file that cannot be read is said to be.

    No more than two batches of images are held, however many there are.

    Args:
        model: what learned labels; or a bank of tasks: then every image has a prediction by each, in their order.
        images: files, PIL images, or tensors (channels, height, width) that are normalised for every model.
        top: labels of a prediction, at most; None is 5, and of a multi-label model all.
        threshold: least probability of a label of multi-label models, in 0..1; None is 0.5, in a bank each task's own.
        batch_size: images at a time.
        precision: what computes, as in `vptm.evaluate`; None is the model's own type. A bank has its own.
        compile: `torch.compile` the model; not a bank.
        cuda_graph: as in `vptm.evaluate`; not of a bank.

    Raises:
        FileNotFoundError, TypeError, ValueError: a file that is not there, what is no image, an argument out of range.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    check_integer("top", top, 1, optional=True)
    tasks: dict[str | None, PromptedModel | TaskInfo] = {None: model} if isinstance(model, PromptedModel) else {}
    if isinstance(model, TaskBank):
        tasks |= {name: model.info(name) for name in model.names}
    least = _thresholds(tasks, threshold)
    run = _runner(model, precision, compile, cuda_graph)
    prepare = {name: (transforms(task), picture_options(task)) for name, task in tasks.items()}
    source = iter(images)
    with ThreadPoolExecutor(_READERS) as readers:

        def start() -> list[Any]:
            return [readers.submit(_read, image, prepare) for image in islice(source, batch_size)]

        reading = start()
        while reading:
            batch, reading = [future.result() for future in reading], start()
            yield from _predicted(run, tasks, batch, top, least)


def predict(
    model: PromptedModel | TaskBank | str | Path | Mapping[str, PromptedModel | str | Path],
    images: Iterable[str | Path | Image.Image | Tensor] | str | Path | Tensor,
    *,
    top: int | None = None,
    threshold: float | None = None,
    batch_size: int = EVALUATION_BATCH,
    on_bad_image: str = "error",
    precision: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    report: Callable[[str], None] = print,
) -> list[Prediction]:
    """The labels of pictures.

    Equal to `model(transforms(model)(picture)[None]).softmax(1)` of every picture, by a twin of the model whose
    constants are made once.

    Args:
        model: what learned labels, or its adapter folder; unnamed ones are numbers. Or several of them by name, on one
            backbone, or a bank of them. They are left as they are.
        images: files, folders and patterns such as "photos/**/*.jpg", read as the model's training pictures were; PIL
            images; or a normalised tensor (B, channels, height, width).
        top: labels of a picture, at most; None is 5, and of a multi-label model all.
        threshold: least probability of a label of multi-label models, in 0..1; None is 0.5, in a bank each task's own.
        batch_size: pictures at a time.
        on_bad_image: "error" stops at a file that cannot be read, "skip" reports it and goes on.
        precision: what computes, as in `vptm.evaluate`; None is the model's own type.
        compile: `torch.compile` the model; one alone.
        cuda_graph: as in `vptm.evaluate`; of one model alone.
        report: called with a line for every file that is skipped, and on what of a folder is left out.

    Returns:
        For every picture one prediction, or one of each model, in order.

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
    asked = model if isinstance(model, PromptedModel) or not isinstance(model, str | Path | Mapping) else None
    if isinstance(model, str | Path):
        asked = load_adapter(model)
    elif isinstance(model, Mapping):
        asked = _bank(model, precision)
    if not isinstance(asked, PromptedModel | TaskBank):
        raise TypeError(f"model must be a model, an adapter folder or several by name, got {type(asked).__name__}")
    given = [images] if isinstance(images, str | Path) else list(images)
    listed: list[Any] = []
    for image in given:
        listed += picture_files([image], report) if isinstance(image, str | Path) else [image]
    found: list[Prediction] = []
    options: dict[str, Any] = {"threshold": threshold, "precision": precision, "compile": compile}
    options["cuda_graph"] = cuda_graph
    for each in predictions(asked, listed, top=top, batch_size=batch_size, **options):
        if isinstance(each, Prediction):
            found.append(each)
        elif on_bad_image == "error":
            raise BadImageError(each.reason)
        else:
            report(f"skipped: {each.reason}")
    if listed and not found:
        raise BadImageError(f"none of {len(listed)} images could be read")
    return found


def _bank(models: Mapping[str, PromptedModel | str | Path], precision: str | None) -> TaskBank:
    if not models:
        raise ValueError("model must be at least one task by name, got none")
    first = next(iter(models.values()))
    opened = first if isinstance(first, PromptedModel) else load_adapter(first)
    kind = resolve_precision(precision, opened.prompts.weight.device, training=False)
    bank = TaskBank(opened, dtype=dtype_of(kind))
    for name, model in models.items():
        bank.add(name, opened if model is first else model)
    return bank


_Run = Callable[["str | None", Tensor], Tensor]


def _runner(model: PromptedModel | TaskBank, precision: str | None, compile: bool, cuda_graph: bool) -> _Run:
    """Scores of a batch by the task of a name."""
    if isinstance(model, TaskBank):
        for name, asked in (("compile", compile), ("cuda_graph", cuda_graph)):
            if asked:
                raise ValueError(f"{name} must be False for several tasks: a bank runs as it is")
        return lambda name, images: model.predict(images.to(model.device, model.dtype), [str(name)] * len(images))
    place = model.prompts.weight.device
    check_graph(cuda_graph, place, compile=compile)
    kind = resolve_precision(precision, place, training=False)
    runs = in_type(model, dtype_of(kind), place)
    dtype = runs.prompts.weight.dtype
    sealed: Any = compiled(runs) if compile else runs.sealed_twin()
    sealed = InferenceGraph(sealed) if cuda_graph else sealed

    def run(_: str | None, images: Tensor) -> Tensor:
        with float32_products(kind):
            scores: Tensor = sealed(images.to(place, dtype))
        return scores

    return run


def _read(
    image: str | Path | Image.Image | Tensor, prepare: Mapping[str | None, tuple[Callable[..., Tensor], dict[str, Any]]]
) -> tuple[Path | None, dict[str | None, Tensor]] | Unreadable:
    """A picture as each task wants it."""
    if isinstance(image, Tensor):
        return None, dict.fromkeys(prepare, image)
    pixels: dict[str | None, Tensor] = {}
    path = Path(image) if isinstance(image, str | Path) else None
    for name, (transform, options) in prepare.items():
        try:
            if path is not None:
                picture = read_image(path, **options)
            elif isinstance(image, Image.Image):
                picture = to_8_bit(image, **options)
            else:
                raise TypeError(f"images must be files, PIL images or tensors, got {type(image).__name__}")
        except BadImageError as error:
            assert path is not None
            return Unreadable(path, str(error))
        pixels[name] = transform(picture)
    return path, pixels


def best_classes(
    scores: Tensor, top: int | None, thresholds: float | Sequence[float] | None = None
) -> list[list[tuple[int, float]]]:
    """For every row of class scores (B, K) the best classes, `top` or all, with their softmax probability, best first,
    those of score -inf last; with a threshold, or one for each row, those with at least that sigmoid probability."""
    scores = scores.float().cpu()
    best = scores.topk(scores.shape[1] if top is None else min(top, scores.shape[1])).indices
    shares = (scores.softmax(1) if thresholds is None else scores.sigmoid()).gather(1, best)
    least = thresholds if isinstance(thresholds, Sequence) else [thresholds or 0.0] * len(scores)
    return [
        [(k, value) for k, value in zip(classes, values) if value >= lowest]
        for classes, values, lowest in zip(best.tolist(), shares.tolist(), least, strict=True)
    ]


def _thresholds(
    tasks: Mapping[str | None, PromptedModel | TaskInfo], given: float | None
) -> dict[str | None, float | None]:
    """The least probability of a label of every task, None of one whose images have one label."""
    if not tasks:
        return {}
    own = {
        name: threshold_of("", task.multi_label, None) if isinstance(task, PromptedModel) else task.threshold
        for name, task in tasks.items()
    }
    if given is None:
        return own
    least = threshold_of("", any(value is not None for value in own.values()), given)
    return {name: None if value is None else least for name, value in own.items()}


def _predicted(
    run: _Run,
    tasks: Mapping[str | None, PromptedModel | TaskInfo],
    batch: Sequence[tuple[Path | None, dict[str | None, Tensor]] | Unreadable],
    top: int | None,
    thresholds: Mapping[str | None, float | None],
) -> Iterator[Prediction | Unreadable]:
    readable = [each for each in batch if not isinstance(each, Unreadable)]
    answers: dict[str | None, list[list[tuple[str, float]]]] = {}
    for name, task in tasks.items() if readable else ():
        pixels = torch.stack([images[name] for _, images in readable])
        with torch.inference_mode():
            names, least = class_labels(task.class_names, task.num_classes), thresholds[name]
            best = best_classes(run(name, pixels), _TOP if top is None and least is None else top, least)
            answers[name] = [[(names[k], share) for k, share in row] for row in best]
    place = 0
    for each in batch:
        if isinstance(each, Unreadable):
            yield each
            continue
        for name in tasks:
            yield Prediction(each[0], answers[name][place], name)
        place += 1
