"""What is refused before anything is trained or written: settings, loaders, images and labels that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
from timm.optim import list_optimizers
from torch.utils.data import DataLoader, IterableDataset

from vptm.data.datasets import ImageDataset
from vptm.data.labels import check_labels, check_several, check_shares, dataset_labels
from vptm.messages import error_line, hint, listed, one_line
from vptm.models.prompted_model import PromptedModel
from vptm.models.prompts import TOKEN_ROWS
from vptm.models.verbalizers import PrototypicalVerbalizer
from vptm.settings import TrainSettings
from vptm.training.batches import images_and_labels
from vptm.training.groups import trained_groups
from vptm.training.label_kinds import labels_of
from vptm.training.ranks import Ranks, check_shared
from vptm.training.seeding import generators_kept

# settings that need validation images, and what they are without any
NEED_VALIDATION: dict[str, Any] = {"early_stopping": None, "val_every": 1}


def check_loaders(train: Any, val: Any, settings: TrainSettings) -> None:
    """TypeError unless both are DataLoaders, `val` may be None; ValueError where batches do not divide into parts."""
    for name, loader in (("train", train), ("val", val)):
        if not isinstance(loader, DataLoader) and not (name == "val" and loader is None):
            raise TypeError(f"{name} must be a torch DataLoader, got {type(loader).__name__}")
    for name, off in NEED_VALIDATION.items():
        if val is None and (value := getattr(settings, name)) != off:
            raise ValueError(f"{name} needs validation images, got {value} without any")
    check_parts(train.batch_size, settings.accumulate)


def check_parts(batch_size: int | None, accumulate: int) -> None:
    """ValueError where batches of that many images, None where it is not known, do not divide into equal parts."""
    if (batch_size or accumulate) % accumulate:
        raise ValueError(f"accumulate must divide the batch of {batch_size} images, got {accumulate}")


def check_settings(settings: TrainSettings) -> None:
    """ValueError naming settings of `fit` that exclude each other, or an optimiser that timm does not have."""
    if settings.accumulate > 1 and (settings.protoverb_weight or settings.reformation):
        name = "protoverb_weight" if settings.protoverb_weight else "reformation"
        raise ValueError(f"accumulate must be 1 with {name}, which compares the images of a batch with each other")
    if settings.compile and settings.reformation:
        raise ValueError("compile must be False with reformation, whose frozen features are kept between steps")
    if settings.cuda_graph:
        kept = "reformation, whose frozen features are kept between steps"
        again = "grad_checkpointing, which asks for random states"
        for name, off, why in (
            ("compile", False, "compile"),
            ("accumulate", 1, "accumulate"),
            ("reformation", 0.0, kept),
            ("grad_checkpointing", False, again),
        ):
            if getattr(settings, name) != off:
                raise ValueError(f"cuda_graph must be False with {why}")
    known, optimizer = [str(name) for name in list_optimizers()], settings.optimizer
    if optimizer not in known:
        raise ValueError(
            f"optimizer must be one of timm.optim.list_optimizers(), got {optimizer!r}{hint(optimizer, known)}"
        )


def check_together(
    settings: TrainSettings, train: DataLoader[Any], val: DataLoader[Any] | None, ranks: Ranks, wrapped: bool
) -> None:
    """ValueError where several processes cannot train as one does."""
    if ranks.count == 1:
        return
    if wrapped:
        raise ValueError(f"model must be passed itself to {ranks.count} processes, not in a wrapper")
    if settings.protoverb_weight:
        raise ValueError(f"protoverb_weight must be 0 in {ranks.count} processes: it compares the images of a batch")
    check_shared(train, ranks, "train")
    if val is not None:
        check_shared(val, ranks, "val")
    size, total = train.batch_size, 0 if isinstance(train.dataset, IterableDataset) else len(train.dataset)  # type: ignore[arg-type]
    if settings.reformation and size and not train.drop_last and 0 < total % size < ranks.count:
        raise ValueError(
            f"reformation needs an image for each of {ranks.count} processes in every batch, the last has "
            f"{total % size}: use drop_last"
        )
    if size and size % (settings.accumulate * ranks.count) and settings.accumulate > 1:
        raise ValueError(
            f"accumulate must divide the {size / ranks.count:g} images of a process in a batch, "
            f"got {settings.accumulate}"
        )


def check_model(model: PromptedModel, settings: TrainSettings) -> None:
    """ValueError unless `model` can be trained as `settings` say: it learns something, from finite values."""
    if settings.protoverb_weight and not isinstance(model.verbalizer, PrototypicalVerbalizer):
        raise ValueError(f"protoverb_weight needs verbalizer='prototypical', got {type(model.verbalizer).__name__}")
    if next(model.trainable_parameters(), None) is None:
        raise ValueError("model must have trainable parameters, all of them are frozen")
    trained = trained_groups(model)
    for argument in ("lr_of", "weight_decay_of"):
        for name in getattr(settings, argument) or ():
            if name not in trained:
                raise ValueError(
                    f"{argument} must name groups that the model learns, {listed(trained, 6)}, got {name!r}"
                )
    if not any((settings.lr_of or {}).get(name, 1.0) for name in trained):
        raise ValueError(f"lr_of must leave a rate above 0, got 0 for all that the model learns, {listed(trained, 6)}")
    model.check_finite()
    if settings.relative_prompt_lr:
        prompts = model.prompts
        if not prompts.holds_tokens or not prompts.weight.requires_grad:
            got = prompts.described() if prompts.weight.requires_grad else "prompts that do not learn"
            raise ValueError(f"relative_prompt_lr needs {TOKEN_ROWS}, got {got}")
        if prompts.relative_size() == 0:
            raise ValueError("relative_prompt_lr needs prompts that are not all zero, got zeros, whose rate would be 0")


def check_data(
    model: PromptedModel, loader: DataLoader[Any], name: str, *, cast: bool, shares: bool
) -> np.ndarray | None:
    """Refuse images the model does not take and labels outside 0..K-1; of a stream those of its first batch, which is
    read once more then.

    Args:
        model: what is trained.
        loader: its data set is looked at.
        name: what messages call it.
        cast: whether images are cast to the type that computes; else they must have the model's.
        shares: whether labels may be shares of the classes.

    Returns:
        The labels (N,) int64, (N, K) of a multi-label model, or shares (N, K) float64, of the loader's data set; None
        of a stream. A data set that does not carry them is read once.
    """
    first = _first_label(model, loader, name, cast, shares)
    return _labels(loader, model, name, first)


def _first_label(model: PromptedModel, loader: DataLoader[Any], name: str, cast: bool, shares: bool) -> Any:
    """The first item's label, after a look at the batch that is made of it; None of a stream."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        # by the loader: begun in this process, a stream may not know that it is shared among workers
        with generators_kept(loader, None):
            batch = next(iter(loader), None)
        if batch is None:
            raise ValueError(f"{name} must hold at least one image, it is empty")
        _check_batch(model, batch, name, cast, shares)
        labels_of(model).learned(images_and_labels(batch)[1])
        return None
    if len(dataset) == 0:
        return None
    with generators_kept(loader, None):  # reading an image may draw augmentation
        item = dataset[0]
        try:
            # timm's Mixup takes an even number of items
            some = [item] if loader.batch_size == 1 else [item, item]
            batch = item if loader.batch_size is None and loader.batch_sampler is None else loader.collate_fn(some)
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise TypeError(f"{name} must give tensors that its collate_fn can batch: {error_line(error)}") from error
    if loader.batch_sampler is None:
        images_and_labels(batch, name)
    else:
        _check_batch(model, batch, name, cast, shares)
    return images_and_labels(item, name, tensors=False)[1]


def _check_batch(model: PromptedModel, batch: Any, name: str, cast: bool, shares: bool) -> None:
    images, labels = images_and_labels(batch, name)
    weight = model.prompts.weight
    images = images.to(weight.device)
    model.of_size(images).check_images(images.to(weight.dtype) if cast and images.is_floating_point() else images)
    if labels.ndim == 2 and labels_of(model).are_shares(labels) and not shares:
        raise ValueError(f"{name} labels must be integers for validation and ProtoVerb's losses, got shares")


def _labels(loader: DataLoader[Any], model: PromptedModel, name: str, first: Any) -> np.ndarray | None:
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        return None
    classes, one = model.num_classes, np.asarray(first)
    if isinstance(dataset, ImageDataset) and len(dataset.classes) != classes:
        raise ValueError(f"{name} images must have the model's {classes} classes, got {len(dataset.classes)}")
    shares = not model.multi_label and one.dtype.kind == "f" and one.shape == (classes,)
    ndim = 2 if shares or model.multi_label else 1
    labels = dataset_labels(dataset, ndim)
    if labels is None or (len(labels) and not np.array_equal(labels[0], one)):
        with generators_kept(loader, None):
            labels = _read_labels(dataset, name) if ndim == 1 else _read_several(dataset, name, shares)
    if len(labels) == 0:
        raise ValueError(f"{name} must hold at least one image, it is empty")
    if shares:
        check_shares(labels, name=f"{name} labels")
        return labels.astype(np.float64)
    (check_labels if ndim == 1 else check_several)(labels, classes, name=f"{name} labels")
    return labels.astype(np.int64)


def _read_labels(dataset: Any, name: str) -> np.ndarray:
    """The label of every item, which decodes every image."""
    labels = []
    for index in range(len(dataset)):
        label = np.asarray(images_and_labels(dataset[index], name, tensors=False)[1])
        if label.ndim or label.dtype.kind not in "iub":
            raise ValueError(
                f"{name} labels must be (N,) integers, got shape {label.shape} of {label.dtype} at index {index}"
            )
        labels.append(int(label))
    return np.array(labels, dtype=np.int64)


def _read_several(dataset: Any, name: str, shares: bool) -> np.ndarray:
    """The labels or shares (N, K) of every item, which decodes every image."""
    items = (images_and_labels(dataset[index], name, tensors=False)[1] for index in range(len(dataset)))
    rows = [np.asarray(labels) for labels in items]
    if len({row.shape for row in rows}) > 1 or any(row.dtype.kind not in "iufb" for row in rows):
        wanted, shown = "shares of the classes" if shares else "0 or 1", one_line(rows[0], 100)
        raise ValueError(f"{name} labels must be {wanted}, as many for each image, got {shown} at index 0")
    return np.array(rows)
