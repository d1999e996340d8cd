"""A run measured on its own images or others, without those that it learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vptm.data.datasets import ImageDataset
from vptm.data.labels import class_labels
from vptm.data.sources import load_data
from vptm.data.split_list import SplitList
from vptm.data.transforms import picture_options, transforms
from vptm.messages import one_line, one_of
from vptm.models.opening import load_adapter
from vptm.models.prompted_model import PromptedModel
from vptm.settings import EVALUATION_BATCH, Split
from vptm.training.devices import device_of, loader_of
from vptm.training.evaluate import evaluate
from vptm.training.graphs import check_graph
from vptm.training.ranks import first_reports, join, local_device
from vptm.training.run_folder import located, recorded_data

SPLITS = get_args(Split)


@dataclass(frozen=True)
class RunEvaluation:
    """What `vptm evaluate --json` prints: `scores` are those of `vptm.evaluate`; `left_out` counts, by split, images
    that the run had learned from or was chosen by."""

    split: str
    data: str
    classes: list[str]
    left_out: dict[str, int]
    scores: dict[str, Any]


def evaluate_run(
    run: Path,
    *,
    data: str | None = None,
    split: str = "test",
    include_trained: bool = False,
    confusion: bool = False,
    on_bad_image: str = "error",
    batch_size: int = EVALUATION_BATCH,
    workers: int | None = None,
    source: str | None = None,
    device: str = "auto",
    impl: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    cuda_graph: bool = False,
    report: Callable[[str], None] = print,
) -> RunEvaluation:
    """Measure a run on its test images or on other data, in the processes that `torchrun` started each its share.

    Other data must have labels that the run knows; without splits of its own it is evaluated whole. The run's own data
    is known again where it moved. Images that the run was trained on, or whose accuracy chose its epoch, are counted
    and left out, by the contents of their files.

    Args:
        run: a run or adapter folder.
        data: as `vptm.load_data` takes it; None is what the run was trained on.
        split: "test", "val" or "train".
        include_trained: count what the run learned from, too.
        confusion: also give the confusion matrix, where an image has one label.
        on_bad_image, batch_size, workers: of reading.
        source: backbone weights, where they moved since training.
        device, impl, precision, compile, cuda_graph: what computes.
        report: called with lines on what is found.

    Raises:
        FileNotFoundError: a run or data that does not exist.
        ValueError: an argument out of range, labels that the run does not know, or no image that may be counted.
    """
    one_of("split", split, SPLITS)
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    place = local_device(device_of(device))
    check_graph(cuda_graph, place)
    join(place)
    report = first_reports(report)
    model = load_adapter(run, source=source, impl=impl)
    own = recorded_data(run)
    if data is None and own is None:
        raise ValueError(f"{run} does not record its data: pass --data")
    chosen = data if data is not None else str(own)
    # a division made at training time is kept, so test images are never training images
    same = own is not None and located("data", chosen) == own
    listed = SplitList.read(run)
    read: dict[str, Any] = {"transform": transforms(model), "on_bad_image": on_bad_image, **picture_options(model)}
    read["multi_label"] = model.multi_label
    with asking_for_moved_data(data is None):
        loaded = load_data(chosen, holdout=same, **read)
    if not same and listed is not None and listed.is_within(loaded.parts()):
        report(f"{chosen} holds the run's own images: divided as for training")
        same, loaded = True, load_data(chosen, **read)
    for note in loaded.notes:
        report(f"{loaded.name}: {note}")
    part = loaded.parts().get(split)
    if not part:
        raise ValueError(f"{chosen} has no {split} images")
    left_out: dict[str, int] = {}
    if listed is not None:
        part, left_out = _without_trained(part, listed, split if same else None, include_trained, report)
    else:
        report(f"{run} keeps no list of its images: whether it was trained on some of these is not known")
    loader = loader_of(_with_labels_of(model, part), batch_size, workers, place)
    confusion = confusion and not model.multi_label
    how: dict[str, Any] = {"precision": precision, "compile": compile, "cuda_graph": cuda_graph, "distributed": True}
    scores = evaluate(model, loader, device=place, confusion=confusion, **how)
    names = class_labels(model.class_names, model.num_classes)
    return RunEvaluation(split, loaded.name, names, left_out, scores)


@contextmanager
def asking_for_moved_data(recorded: bool) -> Iterator[None]:
    """Data that a run recorded and that is not where it was: say how to give its new place."""
    try:
        yield
    except FileNotFoundError as error:
        if not recorded:
            raise
        raise FileNotFoundError(f"{error}; where the run's data moved, --data gives its new place") from None


def _without_trained(
    part: ImageDataset, listed: SplitList, same: str | None, keep: bool, report: Callable[[str], None]
) -> tuple[ImageDataset, dict[str, int]]:
    """`part` without what a run was trained on or chosen by, and how many images that are; with `keep`, with them.

    `same` is the split of the run's own data that `part` is, whose images it may hold; None for other data.
    """
    hashes = part.content_hashes()
    expected = listed.keys(same)
    used = [
        None if expected.get(key) == digest else split
        for key, digest, split in zip(part.keys, hashes, listed.used(hashes))
    ]
    splits = {"val": ("train",), "train": ()}.get(same or "", ("train", "val"))
    counts = {split: count for split in splits if (count := used.count(split))}
    for split, count in counts.items():
        how = "were trained on" if split == "train" else "chose the epoch"
        report(f"{count} of {len(part)} images {how}: {'counted, as asked' if keep else 'left out'}")
    if keep or not counts:
        return part, {}
    rest = part.subset([index for index, split in enumerate(used) if split not in counts])
    if not len(rest):
        raise ValueError(
            f"data must have images that the run was not trained on, all {len(part)} were used: "
            "--include-trained counts them"
        )
    return rest, counts


def _with_labels_of(model: PromptedModel, part: ImageDataset) -> ImageDataset:
    """`part` with its labels renumbered by name to the model's classes."""
    names = model.class_names
    if names is None or names == part.classes:
        return part
    if unknown := [name for name in part.classes if name not in names]:
        raise ValueError(one_line(f"the data has the label {unknown[0]!r}, the run knows {', '.join(names)}"))
    number = np.array([names.index(name) for name in part.classes])
    return part.renumbered(number, names)
