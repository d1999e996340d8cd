"""One run of a method: pictures, a model, where it starts, training and the test."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from vptm.data.balance import balanced_sampler
from vptm.data.datasets import ImageData, ImageDataset
from vptm.data.division import few_shot
from vptm.data.sources import load_data
from vptm.data.split_list import SplitList
from vptm.data.transforms import transforms
from vptm.data.usage import class_lines, dark_line, refuse_unreadable
from vptm.messages import WITH_PATHS, one_line
from vptm.methods.protoverb import fit_prototypes
from vptm.methods.spt import init_prompts
from vptm.methods.vipamin import init_vipamin
from vptm.models.adapter_saving import save_adapter
from vptm.models.opening import open_model
from vptm.models.prompted_model import PromptedModel
from vptm.settings import EVALUATION_BATCH, BEiTSettings, RunSettings, parse_shots
from vptm.terminal import progress_bar
from vptm.training.callbacks import check_log, logger_of
from vptm.training.checks import check_parts, check_settings
from vptm.training.confusion import plot_confusion
from vptm.training.devices import device_of, loader_of
from vptm.training.evaluate import evaluate
from vptm.training.evaluate_run import asking_for_moved_data
from vptm.training.facts import peak_memory
from vptm.training.fit import FitResult, fit
from vptm.training.graphs import check_graph
from vptm.training.precision import resolve_precision
from vptm.training.ranks import Ranks, check_images_for_all, first_reports, is_first, join, local_device
from vptm.training.run_folder import (
    CONFUSION_FILE,
    RUN_FILE,
    check_run_folder,
    check_writable,
    holds_progress,
    read_run,
    update_run_file,
)
from vptm.training.scores import by_name
from vptm.weights.adapter_format import read_adapter_config
from vptm.weights.beits import check_is_there
from vptm.weights.files import WriteError

DEMONSTRATION = "built for 28x28 grey clothing pictures, a demonstration"
_RUNS = "runs"
_MOST_DECODED = 2**29  # bytes of a split


@dataclass
class TrainedRun:
    """What a run came to.

    folder: with the adapter, `run.json`, `split.csv`, `metrics.csv`, `curves.png` and, where the test images were read,
    `confusion.png`. stopped: where it was interrupted, None where it is done. best_epoch, best_val_accuracy: of the
    epoch that is kept. prototype_losses: before and after the steps on the prototypes alone, after which validation
    accuracy is val_accuracy. test: scores on the test images, where they were read, by the names of the classes.
    val_map: mean average precision of that epoch on validation images, of a multi-label run, which has no accuracy.
    """

    folder: Path
    stopped: str | None = None
    best_epoch: int | None = None
    best_val_accuracy: float | None = None
    prototype_losses: list[float] | None = None
    val_accuracy: float | None = None
    test: dict[str, Any] | None = None
    val_map: float | None = None


def train_run(
    settings: RunSettings,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> TrainedRun:
    """Learn labels from a few images, as `vptm train` does.

    The epoch best on validation images is kept; test images are read once, at the end. A finished run that is resumed
    is read again.

    Args:
        settings: what to learn, from which images, and how; `RunSettings.from_options` fits them to a kind of model.
        out: run folder; None takes the next free `runs/DATA-N`.
        resume: go on with the run in `out`, which has the same settings.
        overwrite: replace the run in `out`.
        command: how the run was started, kept in `run.json`.
        report: called with lines on what is used.

    Raises:
        ValueError: settings, data or weights that do not fit together, or another run in `out`.
        FileNotFoundError: data or weights that do not exist.
        BadImageError: an image that cannot be read.
        WriteError: files of the run cannot be written.

    Example:
        >>> import tempfile
        >>> from vptm.settings import RunSettings
        >>> settings = RunSettings.from_options({"shots": "1", "epochs": 1, "test": False}, "beit")
        >>> train_run(settings, Path(tempfile.mkdtemp(), "run"), report=lambda line: None).best_epoch
        1
    """
    place = checked_place(settings)
    ranks = join(place)
    check_images_for_all(settings.batch_size, ranks, "--batch-size")
    report = first_reports(report)
    _check_folder(out, ranks, resume=resume, overwrite=overwrite)
    run_of = opened(settings, place, resume=resume, report=report)
    data, parts, model, loaders = run_of.data, run_of.parts, run_of.model, run_of.loaders
    folder = ranks.first(_free_folder(data.name) if out is None else out)
    if not (resume and holds_progress(folder)):
        _start(settings, model, loaders, place)
    listed = SplitList.of(parts)
    for split, repeated in listed.repeated().items():
        report(f"{repeated} {split} images have the contents of training images")
    result = fit(
        model,
        loaders["train"],
        loaders.get("val"),
        **settings.train_settings.keywords(),
        cache_frozen=not settings.augment,
        run_dir=folder,
        resume=resume,
        overwrite=overwrite,
        device=place,
        info={
            "command": command,
            "settings": settings.options(),
            "data": {
                "name": data.name,
                "images": {split: len(part) for split, part in parts.items()},
                "notes": list(data.notes),
            },
        },
        images=listed,
        callbacks=[] if ranks.index else logger_of(settings.log, folder, settings.options()),
    )
    if resume and not ranks.index:
        update_run_file(folder, settings=settings.options())  # where the data lies now
    run = TrainedRun(folder, None, result.best_epoch, result.best_val_accuracy, None, result.best_val_accuracy)
    if result.interrupted:
        run.stopped = f"after epoch {len(result.history)} of {settings.train_settings.epochs}"
        return run
    try:
        _finish(settings, model, loaders, data.classes, run, ranks)
    except KeyboardInterrupt:
        run.stopped = "before the test"
        return run
    if ranks.index:  # the first process writes
        return run
    outcome = {"best_epoch": run.best_epoch, "val_accuracy": run.val_accuracy, "test": run.test}
    if model.multi_label:
        run.val_map = outcome["val_map"] = result.best_val_map
    update_run_file(folder, result=outcome, cost=_cost(model, result, len(parts["train"]), peak_memory(place)))
    return run


def checked_place(settings: RunSettings) -> torch.device:
    """Where a run computes; what of its settings cannot be is refused, before any picture is read.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: see `train_run`.
    """
    check_log(settings.log)
    check_settings(settings.train_settings)
    check_parts(settings.batch_size, settings.train_settings.accumulate)
    place = local_device(device_of(settings.device))
    check_graph(settings.train_settings.cuda_graph, place)
    resolve_precision(settings.train_settings.precision, place, training=True)
    check_is_there(settings.model)
    return place


def _check_folder(out: Path | None, ranks: Ranks, *, resume: bool, overwrite: bool) -> None:
    """Refuse in every process a run folder that the first one, which writes it, may or can not use."""
    refusal: ValueError | None = None
    if not ranks.index:
        try:
            if out is not None:
                check_run_folder(out, resume=resume, overwrite=overwrite)
            check_writable(Path(_RUNS) if out is None else out)
        except ValueError as error:
            refusal = error
    refusal = ranks.first(refusal)
    if refusal is not None:
        raise refusal


class OpenedRun(NamedTuple):
    """What a run is made of: its data, the images that are used by split, the model before it has learned, and batches
    of each split, and of the training images as they are, "support"."""

    data: ImageData
    parts: dict[str, ImageDataset]
    model: PromptedModel
    loaders: dict[str, DataLoader[Any]]


def opened(
    settings: RunSettings, place: torch.device, *, resume: bool = False, report: Callable[[str], None] = print
) -> OpenedRun:
    """What `train_run` trains on, and what it trains; see there."""
    with asking_for_moved_data(resume):
        several = settings.model_settings.multi_label
        data = load_data(settings.data, on_bad_image=settings.on_bad_image, multi_label=several, **settings.reading())
    parts = _parts(settings, data, report)
    if not resume:
        _check_class_means(settings, parts["train"])
    seed = settings.train_settings.seed
    torch.manual_seed(seed)
    model = open_model(settings.model, len(data.classes), **settings.model_settings.keywords())
    model.class_names = data.classes
    model.default_cfg |= settings.reading()  # kept with the adapter, so that other pictures are read in the same way
    chosen = settings.model_settings
    if type(chosen) is not BEiTSettings:
        how = f"{chosen.prompt_mode} prompts, read-out {chosen.readout}, verbalizer {chosen.verbalizer}"
        report(f"{settings.model} is {chosen.whom}: {how}")
    if settings.model == "builtin" and data.name not in ("builtin", "fashion-mnist"):
        report(f"the built-in model is {DEMONSTRATION}")
    if settings.finetune:
        model.unfreeze()
    _look_at(settings, parts, report)
    return OpenedRun(data, parts, model, _loaders(settings, data, parts, model, place))


def _look_at(settings: RunSettings, parts: dict[str, ImageDataset], report: Callable[[str], None]) -> None:
    """Decode every image, which takes longest of all that may be refused."""
    if settings.on_bad_image == "error":
        refuse_unreadable(parts.values())
    if dark := dark_line(parts["train"]):
        report(dark)


def _parts(settings: RunSettings, data: ImageData, report: Callable[[str], None]) -> dict[str, ImageDataset]:
    """The images that are used, by split."""
    for note in data.notes:
        report(one_line(f"{data.name}: {note}", WITH_PATHS))
    shots, seed = parse_shots(settings.shots), settings.train_settings.seed
    train = data.train if shots is None else few_shot(data.train, shots, seed=seed)
    found = {"train": train, "val": data.val, "test": data.test if settings.test else None}
    parts = {split: part for split, part in found.items() if part}
    for line in class_lines(parts, data.train):
        report(line)
    if settings.shuffle_labels:
        draw = np.random.default_rng(seed)
        for split in ("train", "val"):  # true validation labels would still select the luckiest epoch
            if split in parts:
                parts[split] = parts[split].with_labels(draw.permutation(parts[split].labels))
    return parts


def _check_class_means(settings: RunSettings, train: ImageDataset) -> None:
    """ValueError where prototypes, whitened or not, cannot start at the mean of a class without a training image."""
    if settings.prototype_init == "xavier" or (counts := train.counts()).all():
        return
    empty = one_line(train.classes[int(counts.argmin())])
    raise ValueError(
        f"--prototype-init {settings.prototype_init} needs a training image of every class, got none of {empty!r}: "
        "--prototype-init xavier starts at random"
    )


def _loaders(
    settings: RunSettings, data: ImageData, parts: dict[str, ImageDataset], model: PromptedModel, place: torch.device
) -> dict[str, DataLoader[Any]]:
    """Batches of each split, and of the training images as they are, "support"."""
    prepare = transforms(model)
    flip = data.flip if settings.flip is None else settings.flip
    changed = transforms(model, train=True, flip=flip) if settings.augment else prepare

    def loader(part: ImageDataset, batch_size: int = EVALUATION_BATCH, **order: Any) -> DataLoader[Any]:
        return loader_of(part, batch_size, settings.workers, place, **order)

    # what is read in every epoch is decoded once, where it is few
    parts = {split: part if split == "test" else part.in_memory(_MOST_DECODED) for split, part in parts.items()}
    found = {split: loader(part.with_transform(prepare)) for split, part in parts.items() if split != "train"}
    order = {"sampler": balanced_sampler(parts["train"].labels)} if settings.balanced_sampler else {"shuffle": True}
    train = loader(parts["train"].with_transform(changed), settings.batch_size, **order)
    return {"train": train, "support": loader(parts["train"].with_transform(prepare)), **found}


def _start(
    settings: RunSettings, model: PromptedModel, loaders: dict[str, DataLoader[Any]], place: torch.device
) -> None:
    """Prompts and prototypes where the settings let them start."""
    seed, images = settings.train_settings.seed, settings.init_images
    if settings.prompt_init == "vipamin":
        init_vipamin(
            model.to(place),
            loaders["train"],
            neighbours=settings.init_neighbours,
            orthogonal=settings.init_orthogonal,
            images=256 if images is None else images,
            seed=seed,
        )
    elif settings.prompt_init != "uniform":
        init_prompts(model.to(place), loaders["train"], settings.prompt_init, images=images, seed=seed)
    if settings.init_rescale:
        model.prompts.rescale()
    if settings.prototype_init != "xavier":
        verbalizer: Any = model.to(place).verbalizer
        with progress_bar(is_first()) as bar:
            task = bar.add_task("class means", total=len(loaders["support"]), note="")
            support = _counted(loaders["support"], partial(bar.advance, task))
            verbalizer.init_prototypes(model, support, whiten=settings.prototype_init == "whitened")


def _counted(loader: Iterable[Any], step: Callable[[], object]) -> Iterator[Any]:
    for batch in loader:
        yield batch
        step()


def _finish(
    settings: RunSettings,
    model: PromptedModel,
    loaders: dict[str, DataLoader[Any]],
    classes: list[str],
    run: TrainedRun,
    ranks: Ranks,
) -> None:
    """Steps on the prototypes alone, by the first process, and the test, by all, where the run did not have one."""
    if not ranks.index:
        if not (run.folder / RUN_FILE).is_file():
            raise WriteError(f"run folder {run.folder} is gone, it was removed while the run trained")
        run.test = (read_run(run.folder).get("result") or {}).get("test")
        if settings.prototype_steps:
            _fit_prototypes(settings, model, loaders, run)
    run.test = ranks.first(run.test)
    if settings.prototype_steps and ranks.count > 1:
        learned = ranks.first({name: tensor.cpu() for name, tensor in model.learned_state_dict().items()})
        model.load_learned_state_dict(learned)
    if run.test is None and "test" in loaders:
        precision, several = settings.train_settings.precision, model.multi_label
        found = evaluate(model, loaders["test"], precision=precision, confusion=not several, distributed=True)
        run.test = by_name(found, classes)
        if "confusion" in found and not ranks.index:
            plot_confusion(found["confusion"], classes, run.folder / CONFUSION_FILE)


def _fit_prototypes(
    settings: RunSettings, model: PromptedModel, loaders: dict[str, DataLoader[Any]], run: TrainedRun
) -> None:
    """Steps on the prototypes alone, where the adapter does not have them."""
    steps = settings.prototype_steps
    kept = read_adapter_config(run.folder).get("extra") or {}
    fitted = kept.get("prototype_losses")
    if kept.get("prototype_steps") == steps and isinstance(fitted, list) and len(fitted) == 2:
        run.prototype_losses, run.val_accuracy = fitted, kept.get("val_accuracy")  # the adapter of a finished run
        return
    losses = fit_prototypes(model, loaders["support"], steps=steps, lr=settings.prototype_lr)
    run.prototype_losses = [losses[0], losses[-1]]
    if "val" in loaders:
        run.val_accuracy = evaluate(model, loaders["val"], precision=settings.train_settings.precision)["accuracy"]
    extra = {"epoch": run.best_epoch, "val_accuracy": run.val_accuracy, "prototype_steps": steps}
    save_adapter(model, run.folder, extra=extra | {"prototype_losses": run.prototype_losses})


def _cost(model: PromptedModel, result: FitResult, images: int, memory: int) -> dict[str, Any]:
    """What training took: parameters, training images a second with validation, peak memory in bytes, the share of the
    time in which the model waited for data."""
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    seconds = sum(row["seconds"] for row in result.history)
    waiting = None if result.pace is None else result.pace.waiting
    speed = images * len(result.history) / seconds if seconds else None
    facts = {"trainable_parameters": trained, "images_per_second": speed, "peak_memory": memory}
    return facts | {"waiting_for_data": waiting}


def _free_folder(name: str) -> Path:
    number = 1
    while (folder := Path(_RUNS) / f"{name}-{number}").exists():
        number += 1
    return folder


def resume_command(folder: Path) -> str:
    """What continues a run that was stopped."""
    return f"vptm train --resume --out {shlex.quote(str(folder))}"
